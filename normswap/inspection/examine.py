"""The story of an inspection: what is there, what would become of it, what is wrong, what to pick."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.analysis.dataflow import find_flow
from normswap.analysis.flow import Flow
from normswap.analysis.running import GIVE_INPUTS, Seen, TooCostly, run_model
from normswap.analysis.selection import check_model, shared_tensors
from normswap.analysis.sites import Site, SiteKind, find_sites
from normswap.conversion.accounting import count_elements
from normswap.conversion.pipeline import undisturbed
from normswap.errors import ModelError
from normswap.inspection.advice import Facts, advise
from normswap.inspection.findings import Observations, find_problems
from normswap.inspection.kinds import kinds_of
from normswap.inspection.outcomes import outcomes_of
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import LAYERS, TRANSPOSED
from normswap.report.inspection import Finding, Inspection, Layer, Outcome
from normswap.targets.context import Context, Swap
from normswap.targets.options import Options, Purpose
from normswap.targets.target import TARGETS, plan_norm

_MOST_LAYERS_RUN = 4000  # norms and weight layers of a model that is run on made-up inputs, though nobody has asked
_UNMEASURED = "sizes of maps are not known"


def inspect(model: nn.Module, *, example_inputs: Any = None) -> Inspection:
    """What norms and weight layers `model` has, what each target would do to them, what is wrong, and what to pick.

    Args:
        model: is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. The model is run on them in eval
            mode to see the sizes of feature maps, which the numbers of groups depend on.

    Raises:
        ModelError: for what is no model, a lazy one, or inputs that it does not run on.
    """
    return examine(model, example_inputs)


@undisturbed()
def examine(
    model: nn.Module,
    inputs: Any = None,
    name: str = "example inputs",
    *,
    probe_only: bool = False,
    progress: Callable[[str], None] = lambda phase: None,
) -> Inspection:
    """`inspect`, with word of each phase.

    Args:
        model: is not changed.
        inputs: as `example_inputs` of `inspect`.
        name: what the inputs are, for the inspection and for errors.
        probe_only: the inputs were made up: a run on them has a budget, and it is no error where it fails.
        progress: called with the name of each phase.
    """
    check_model(model)
    progress("finding norms and convolutions")
    sites = find_sites(model)
    progress("finding how layers are connected")
    flow = find_flow(model, sites)
    seen: Mapping[str, Seen] = {}
    probe, unmeasured = "", tuple[Finding, ...]()
    if probe_only and inputs is not None and len(sites) > _MOST_LAYERS_RUN:
        note = f"not run: {len(sites):,} layers, more than {_MOST_LAYERS_RUN:,}; {GIVE_INPUTS}"
        unmeasured = (Finding(_UNMEASURED, ("",), note),)
    elif inputs is not None:
        progress("running the model")
        try:
            seen, probe = run_model(model, inputs, sites, probe_only, name).seen, name
        except TooCostly as error:
            unmeasured = (Finding(_UNMEASURED, ("",), str(error)),)
        except ModelError:
            if not probe_only:
                raise
    progress("trying the targets")
    by_path = {site.path: site for site in sites}
    proven = {} if probe_only else seen  # what noise of a guessed shape shows is no proof of what the model reads
    context = Context(Options(), flow, by_path, shared_tensors(model), seen=proven, measured_exact=bool(proven))
    norms, weights = (kinds_of((s for s in sites if s.kind == kind), context) for kind in get_args(SiteKind))
    groups = {first: _auto_groups(first, context) for first in norms}
    first_of = {site: first for first, alike in norms.items() for site in alike}
    layers = tuple(_describe_layer(site, seen, groups[first_of[site]] if site in first_of else {}) for site in sites)
    outcomes = tuple(outcomes_of(model, norms, weights, context))
    statistics = {layer.paths[0]: layer.statistics for layer in layers}
    findings = (*find_problems(model, Observations(sites, flow, statistics)), *unmeasured)
    advice = advise(_facts(sites, layers, outcomes, flow))
    return Inspection(type(model).__name__, *count_elements(model), layers, outcomes, findings, advice, probe)


def _facts(sites: Sequence[Site], layers: Sequence[Layer], outcomes: Sequence[Outcome], flow: Flow) -> Facts:
    return Facts(
        layers,
        {outcome.target: outcome for outcome in outcomes},
        [layer for layer, site in zip(layers, sites, strict=True) if isinstance(site.module, _BatchNorm)],
        [layer for layer, site in zip(layers, sites, strict=True) if site.base in LAYER_NORMALIZED],
        [layer for layer, site in zip(layers, sites, strict=True) if site.base in LAYERS["rnn"]],
        [site.path for site in sites if site.path in flow.along_time],
        [site.path for site in sites if site.kind == "norm" and flow.calls.get(site.path, 0) > 1],
    )


def _describe_layer(site: Site, seen: Mapping[str, Seen], auto_groups: Mapping[str, int]) -> Layer:
    module = site.module
    gradients = {p.requires_grad for p in module._parameters.values() if p is not None}
    known = site.base is not None
    groups = site.groups if site.kind == "norm" else getattr(module, "groups", None)
    return Layer(
        site.paths,
        site.kind,
        site.name,
        _describe_size(site) if site.kind == "weight" and known else "",
        site.channels if known and (site.kind == "weight" or site.form) else None,
        groups if isinstance(groups, int) else None,
        seen[site.path].spatial if site.path in seen and site.layer_kind == "conv" else None,
        any(gradients) if gradients else None,
        site.statistics if site.kind == "norm" else "",
        site.obstacle,
        dict(auto_groups),
    )


def _auto_groups(site: Site, context: Context) -> dict[str, int]:
    """The groups that `gn` gives a norm, by purpose."""
    asked = {purpose: replace(context, options=Options(purpose=purpose)) for purpose in get_args(Purpose)}
    plans = {purpose: plan_norm(site, TARGETS["gn"], context) for purpose, context in asked.items()}
    return {purpose: plan.groups for purpose, plan in plans.items() if isinstance(plan, Swap) and plan.groups}


def _describe_size(site: Site) -> str:
    """What a weight layer takes and gives: `3 → 64, 7×7, stride 2`, `512 → 1000`, `28 → 64, 2 layers`."""
    module: Any = site.module
    if site.layer_kind == "conv" and hasattr(module, "kernel_size"):
        parts = [f"{module.in_channels} → {module.out_channels}", "×".join(map(str, module.kernel_size))]
        parts += [f"stride {_in_short(module.stride)}"] if set(module.stride) != {1} else []
        parts += ["transposed"] if isinstance(module, TRANSPOSED) else []
        if module.groups > 1:
            parts.append("depthwise" if module.groups == module.out_channels else f"{module.groups} groups")
        return ", ".join(parts)
    if site.layer_kind == "linear":
        return f"{module.in_features} → {module.out_features}"
    if hasattr(module, "input_size"):
        layers = getattr(module, "num_layers", 1)
        return f"{module.input_size} → {module.hidden_size}{f', {layers} layers' if layers > 1 else ''}"
    return ""


def _in_short(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "×".join(map(str, values))
