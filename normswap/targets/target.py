"""The targets that a user names, a norm form, a weight form or a pair of them, and the plan for each site."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from normswap.analysis.sites import Site
from normswap.errors import OptionError
from normswap.layers.norms import ACTIVATED
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import PLAIN
from normswap.layers.torch_normalization import kind_of_normalization
from normswap.target_table import (
    NORM_FORMS,
    PLAIN_FORM,
    RECURRENT_FORMS,
    TARGET_FORMS,
    WEIGHT_FORMS,
    Form,
    nearest_target,
)
from normswap.targets import norms, plain, weights
from normswap.targets.context import Context, Swap
from normswap.targets.options import Options

PlanFunction = Callable[[Site, Context], Swap | str]

NORM_FUNCTIONS: Mapping[str, PlanFunction] = {
    "gn": norms.to_group_norm,
    "ln": norms.to_layer_norm,
    "in": norms.to_instance_norm,
    "pn": norms.to_position_norm,
    "est": norms.to_estimated,
    "bcn": norms.to_batch_channel,
    "bn": norms.to_batch_norm,
    "frozen": norms.to_frozen,
    "fold": plain.to_folded_or_plain,
    "plain": plain.to_plain_norm,
}
"""What builds the swap of a norm, by the name of the form that it becomes."""
WEIGHT_FUNCTIONS: Mapping[str, PlanFunction] = {
    "ws": weights.to_standardized,
    "wn": weights.to_normalized,
    "plain": plain.to_plain_weight,
}
"""Likewise of a weight layer."""
RECURRENT_FUNCTIONS: Mapping[str, PlanFunction] = {"ln": weights.to_layer_normalized}
"""Likewise of a recurrent layer, with the option `recurrent`."""


@dataclass(frozen=True)
class Target:
    """A norm form, a weight form, or both."""

    name: str
    norm: Form | None
    weight: Form | None


TARGETS: dict[str, Target] = {name: Target(name, *forms) for name, forms in TARGET_FORMS.items()}
"""Every target by name: each norm form, each weight form, and each pair of them."""

PLAIN_TARGET = Target("plain torch", PLAIN_FORM, PLAIN_FORM)
"""What the option `--fold` makes of a conversion's result; it is no target that a user names."""
FOLD = TARGETS["fold"]
"""What `normswap.fold` and the command `fold` convert to."""


RECURRENT_TARGETS: dict[str, Target] = {
    f"recurrent-{name}": Target(f"recurrent-{name}", None, None) for name in RECURRENT_FORMS
}
"""What a conversion is called that changes recurrent layers alone, which the option `recurrent` asks for."""


BY_CLASS = {
    "GroupNorm": "gn", "LayerNorm": "ln", "SyncBatchNorm": "bn", "FrozenBatchNorm2d": "frozen",
    **{f"InstanceNorm{dims}d": "in" for dims in (1, 2, 3)}, **{f"BatchNorm{dims}d": "bn" for dims in (1, 2, 3)},
}  # fmt: skip
"""Targets by the class, or its name, that norms become."""


def parse_target(name: str | type | None, recurrent: str | None = None) -> Target:
    """The target called `name`; without one, that of the option `recurrent`, by itself.

    Raises `OptionError`, which names the nearest one.
    """
    if name is None:
        if recurrent is None:
            raise OptionError("no target: give to (--to), such as gn-ws, or recurrent=ln (--recurrent ln)")
        return RECURRENT_TARGETS[f"recurrent-{recurrent}"]
    name = BY_CLASS.get(name.__name__ if isinstance(name, type) else name, name)
    if isinstance(name, str) and name in TARGETS:
        return TARGETS[name]
    near = nearest_target(str(name))
    raise OptionError(f"unknown target {name!r}; {f'did you mean {near}? ' if near else ''}normswap targets lists all")


def check_options(target: Target, options: Options) -> None:
    """Raise `OptionError` for an option that was given, other than its default, and that `target` has no use for."""
    of_forms = {name for form in (target.norm, target.weight) if form is not None for name in form.options}
    forms = (*NORM_FORMS.values(), *WEIGHT_FORMS.values())
    for option in dict.fromkeys(name for form in forms for name in form.options):
        if option not in of_forms and getattr(options, option) != getattr(Options(), option):
            able = ", ".join(form.name for form in forms if option in form.options)
            raise OptionError(f"{option}: has no effect with the target {target.name}; it is for {able}")
    rescales = options.ws == "strict" or options.recurrent is not None
    if target.norm is None and not rescales and options.transfer != Options().transfer:
        raise OptionError(f"transfer: has no effect with the target {target.name}, which changes no norms")
    if options.calibrate is None and options.calibrate_seconds != Options().calibrate_seconds:
        raise OptionError("calibrate_seconds: needs data; give --calibrate (calibrate=) too")


def plan_norm(site: Site, target: Target, context: Context) -> Swap | str:
    """The swap of a normalization, or why it is left."""
    if site.obstacle:
        return site.obstacle
    if not site.form:
        if isinstance(site.module, nn.LayerNorm):
            return f"normalizes over {tuple(site.module.normalized_shape)}, with a gain for each position"
        return f"{site.name} is not a norm that can be converted"
    if site.path in context.flow.touched:
        return "has tensors that a forward reads directly"
    if problem := site.damage or ("" if target is PLAIN_TARGET else _misplaced(site, context)):
        return problem
    if target.norm is not None and target.norm.within_sample and _mixes_samples(site, context):
        return "has several samples in its channels (a split batch), so that a norm within a sample cannot replace it"
    if target.norm is not None:
        swap = NORM_FUNCTIONS[target.norm.name](site, context)
        return _with_activation(site, swap, target) if isinstance(swap, Swap) and site.is_activated else swap
    if site.path in context.rescaling:
        return norms.rescale_statistics(site, context)
    return f"{target.name} changes no norms"


def _with_activation(site: Site, swap: Swap, target: Target) -> Swap:
    """`swap` for a norm that has an activation behind it, which stays: its modules are carried over to the new one."""
    new, name = swap.module, type(swap.module).__name__
    if type(new) is nn.Identity:
        return replace(swap, module=nn.Sequential(), after="its activation")  # its children come into the empty one
    if _folds(target):  # to plain torch: the parts one after the other
        if not isinstance(new, nn.Sequential):
            new = nn.Sequential(OrderedDict(norm=new))
        return replace(swap, module=new, after=f"{swap.after}, activation")
    new.__class__ = ACTIVATED[type(new)]
    return replace(swap, after=swap.after.replace(name, type(new).__name__, 1))


def _folds(target: Target) -> bool:
    return target is PLAIN_TARGET or target.norm is FOLD.norm


def _mixes_samples(site: Site, context: Context) -> bool:
    """Whether the code, or a run on the user's inputs, shows a norm that has samples in its channels."""
    return site.path in context.flow.mixing or (site.path in context.seen and context.seen[site.path].mixes)


def _misplaced(site: Site, context: Context) -> str:
    """Why a norm that takes several layouts cannot be exchanged for one that takes (N, C, *spatial)."""
    seen = context.seen.get(site.path)
    if site.form == "last" and seen is None and context.flow.ranks.get(site.path) != {2}:
        return "normalizes the last of maybe several dimensions: if there are two, give --input-shape (example_inputs)"
    if site.form == "last" and seen is not None and seen.dims != 2:
        return f"normalizes the last of {seen.dims} dimensions, where channels are the second"
    dims = site.spatial_dims
    if "group" in site.form and dims and seen is not None and seen.dims != dims + 2:
        return "runs without a batch dimension"
    return ""


def plan_weight(site: Site, target: Target, context: Context) -> Swap | str:
    """The swap of a weight layer, or why it is left."""
    options = context.options
    folds = _folds(target)
    by_torch = kind_of_normalization(site.module) if site.base is not None and not site.obstacle else ""
    if folds and site.base is not None and (by_torch or site.obstacle):
        bake = plain.without_torchs_normalization if by_torch else plain.to_baked_weight
        baked = bake(site, context)
        form = target.weight if target is not PLAIN_TARGET and isinstance(baked, Swap) else None
        return baked if form is None else replace(baked, note=f"for {form.name}, convert once more")  # type: ignore[type-var]
    if by_torch and (target.weight is not None or options.recurrent):
        return f"is normalized already, by torch's {by_torch}"
    if options.recurrent and site.layer_kind == "rnn" and site.base is not None and target is not PLAIN_TARGET:
        swap = site.obstacle or RECURRENT_FUNCTIONS[options.recurrent](site, context)
        if isinstance(swap, Swap) or target.weight is None or "rnn" not in options.layers:
            return swap
    if target is FOLD and (site.base in PLAIN or site.base in LAYER_NORMALIZED.values()) and not site.obstacle:
        return plain.to_plain_weight(site, context)
    if target.weight is None or site.base is None:
        return site.obstacle if site.base is None else f"{target.name} changes norms only"
    if site.layer_kind not in options.layers and target is not PLAIN_TARGET:
        return f"is not among the layers to change: {', '.join(options.layers)}"
    if site.obstacle:
        return site.obstacle
    return WEIGHT_FUNCTIONS[target.weight.name](site, context)
