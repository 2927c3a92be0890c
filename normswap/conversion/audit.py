"""The proof of a conversion: no layer was missed, and the output moved no more than it may."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.analysis.drift import layer_drifts, output_drift
from normswap.analysis.running import run_model
from normswap.analysis.sites import find_sites
from normswap.conversion.accounting import is_meant
from normswap.conversion.evidence import Evidence
from normswap.conversion.planning import Plan
from normswap.conversion.request import Phase, Request
from normswap.errors import ModelError, NormswapError
from normswap.report.report import Drift
from normswap.targets.context import Place, Swap
from normswap.targets.options import Options
from normswap.targets.target import Target

_NUDGE = 16  # times the rounding of an input, by which it is moved to see what that does
_EXACT = 1e5  # times the rounding of the coarsest parameter: more than any chain of layers adds up to


def prove_nothing_missed(model: nn.Module, plan: Plan, target: Target, options: Options) -> None:
    """A second walk: each layer that the target is for and that the model has now is one that the report names."""
    named = {path for change in plan.changes for path in change.paths} | {entry.path for entry in plan.left}
    missed = [
        path
        for site in find_sites(model)
        if is_meant(site, target, options)
        for path in site.paths
        if path not in named and path.rpartition(".")[0] not in named  # a norm may become two
    ]
    if missed:
        raise NormswapError(f"{missed[0]}: neither changed nor left; this is a bug in normswap, please report it")


def check_exact_half(work: nn.Module, original: nn.Module, evidence: Evidence) -> None:
    """Raise `ModelError` where the output moved of `work`, in which only what is exact has changed so far.

    Noise tells nothing of a model that selects by small differences, as detectors do: it is no error there.
    """
    try:
        after = run_model(work, evidence.inputs).output
        _check_exact(work, output_drift(evidence.output, after, evidence.inputs_name), "half of this conversion")
    except ModelError:
        if not evidence.made_up or is_steady(original, evidence):
            raise


def measure_drift(model: nn.Module, plan: Plan, evidence: Evidence, request: Request) -> Drift | None:
    """How far the output and the changed layers moved on the inputs of before; None where there are none.

    None too where that would mislead: of what is not exact, on noise or in a network that was never trained. Raises
    `ModelError` where the model does not run any more, or moved though it should not have.
    """
    if evidence.inputs is None:
        return None
    request.begin(Phase.RUN_AFTER)
    name = evidence.inputs_name
    changed = {swap.site.path for swap in plan.swaps} - _in_sums(plan.swaps)
    before = {path: sketch for path, sketch in evidence.sketches.items() if path in changed}
    try:
        after = run_model(model, evidence.inputs, taps=before)
        drift = output_drift(evidence.output, after.output, name)
    except ModelError as error:
        raise ModelError(f"after conversion {error}; leave what it needs with exclude=") from error
    if all(swap.exact for swap in plan.swaps):
        _check_exact(model, drift, "this conversion")
    elif evidence.noise or plan.untrained:
        return None
    return replace(drift, layers=tuple(layer_drifts(before, after.sketches)))


def _in_sums(swaps: Sequence[Swap]) -> set[str]:
    """Layers that give something else than before, and so does one beside them: the sum is the same."""
    norms = [absorption for swap in swaps for absorption in swap.absorptions if absorption.place is Place.BESIDE]
    mergers = [swap.merger for swap in swaps if swap.merger is not None]
    layers = {norm.site for norm in norms} | {site for merger in mergers for site in (merger.site, merger.branch)}
    return {s.site.path for s in swaps if s.site in layers or any(a.site in layers for a in s.absorptions)}


def is_steady(model: nn.Module, evidence: Evidence) -> bool:
    """Whether the output of `model`, as it was before, hardly moves with its inputs: then a larger move tells."""

    def nudged(tensor: Tensor) -> Tensor:
        return tensor * (1 + _NUDGE * torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else tensor

    inputs = pytree.tree_map_only(Tensor, nudged, evidence.inputs)
    drift = output_drift(evidence.output, run_model(model, inputs).output, evidence.inputs_name)
    return drift.relative_l2 is not None and not _is_moved(model, drift)


def _is_moved(model: nn.Module, drift: Drift) -> bool:
    """Whether the output moved by more than rounding."""
    rounding = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    return drift.relative_l2 is not None and drift.relative_l2 > _EXACT * rounding


def _check_exact(model: nn.Module, drift: Drift, what: str) -> None:
    """Raise `ModelError` where the output of an exact conversion moved by more than rounding."""
    if _is_moved(model, drift):
        raise ModelError(
            f"{what} should be exact, but on {drift.probe} the output moved by {drift.relative_l2:.2g} "
            "(relative L2): the forward does something that could not be seen; leave the layers concerned with "
            "exclude=, and please report it"
        )
