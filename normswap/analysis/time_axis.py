"""Which norms of a model stand where a norm within a sample would reach along time, or into padding.

Behind a causal convolution no output may depend on later positions, and none of a padded batch on the padding. A
batch norm in eval mode keeps that; a norm that takes its statistics over the positions of a sample does not.
"""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from normswap.analysis import operations
from normswap.analysis.sites import Site
from normswap.layers.reparametrized import LAYERS, PLAIN

APART = ("data", "batch", "position")
"""The forms of norms that let no position of a sample act on another, in eval mode."""
CAUSAL, PADDED = "a causal network", "sequences that may be padded"
_NAMED_CAUSAL = re.compile(r"causal(?!.*att)|chomp|stream", re.IGNORECASE)  # causal attention is another thing
_NAMED_LENGTHS = re.compile(r"(len|lens|lengths?)$", re.IGNORECASE)
_NAMED_PADDED = re.compile(
    rf"mask|padding|^(is_|non_?)?pads?$|^valid$|n(um)?_frames$|^durations?$|{_NAMED_LENGTHS.pattern}", re.IGNORECASE
)
_POINTWISE_MODULES = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
_SAME_VALUES = ("expand", "repeat", "to", "clone", "detach", "type_as")  # what a stream has kept, brought into shape
_POSITIONS = 32  # of the trial of a convolution with a forward of its own; its reach has to be less

ModuleOf = Callable[[fx.Node], nn.Module | None]


# ---- in a traced graph ----


def near_causal_layers(nodes: Sequence[fx.Node], module_of: ModuleOf) -> set[fx.Node]:
    """The nodes before and behind convolutions that see no later positions: padded on one side, or cut at the end."""
    cut = _cut_behind(nodes, module_of)
    causal = {node for node in nodes if _is_causal(node, module_of, cut)}
    if not causal:
        return set()
    behind, before = set(causal), set(causal)
    for node in nodes:
        behind |= {node} if behind & {*node.all_input_nodes} else set()
    for node in reversed(nodes):
        before |= {node} if before & {*node.users} else set()
    return behind | before


def _is_causal(node: fx.Node, module_of: ModuleOf, cut: Collection[fx.Node]) -> bool:
    module, source = module_of(node), operations.input_of(node)
    is_function = node.op == "call_function" and node.target in (F.conv1d, F.conv2d, F.conv3d)
    if not isinstance(module, LAYERS["conv"]) and not is_function:
        return False
    if source is not None and (_pads_one_side(source, module_of(source)) or _goes_on(source)):
        return True
    if isinstance(module, nn.modules.conv._ConvNd) and type(module).forward is not _plain(module).forward:
        return sees_no_later_positions(module)
    return _pads(module) and node in cut


def _plain(module: nn.Module) -> Any:
    """The known class that a convolution is of."""
    return next(cls for cls in type(module).__mro__ if cls in PLAIN or cls in LAYERS["conv"])


def _pads(module: Any) -> bool:
    return module is not None and isinstance(module.padding, tuple) and any(size > 0 for size in module.padding)


def _pads_one_side(node: fx.Node, module: Any) -> bool:
    """Whether a value is padded before its first position and not behind its last, along one dimension."""
    padding: Any
    if module is not None:
        padding = module.padding if type(module).__module__ == "torch.nn.modules.padding" else ()
    else:
        padding = node.args[1] if node.target is F.pad and len(node.args) > 1 else node.kwargs.get("pad", ())
    if not isinstance(padding, tuple | list) or not all(type(size) is int for size in padding[1::2]):
        return False
    sides = list(zip(padding[::2], padding[1::2], strict=False))
    # Along both dimensions of maps it is how strides are evened out.
    return len([first for first, last in sides if last <= 0 and (isinstance(first, fx.Node) or first > 0)]) == 1


def _goes_on(node: fx.Node) -> bool:
    """Whether a value is what a stream had before, kept or handed in, with what is new behind it."""
    parts = operations.concatenated(node) if node.target in operations.CONCATENATIONS else None
    if not isinstance(parts, tuple | list) or not parts:
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    first = parts[0]
    if dim not in (-1, 2) or not isinstance(first, fx.Node):
        return False
    while first.op == "call_method" and first.target in _SAME_VALUES and isinstance(first.args[0], fx.Node):
        first = first.args[0]
    return first.op in ("placeholder", "get_attr") or operations.name_of(first) in ("zeros", "new_zeros", "zeros_like")


def _cut_behind(nodes: Sequence[fx.Node], module_of: ModuleOf) -> set[fx.Node]:
    """The nodes of whose values the last positions are cut off, past norms and what works on each element."""

    def passes(node: fx.Node) -> bool:
        module = module_of(node)
        norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.Identity)
        return norm or type(module).__module__ in _POINTWISE_MODULES or node.target in operations.POINTWISE

    cut: set[fx.Node] = set()
    for node in reversed(nodes):  # what reads a value comes behind it
        if any(_is_cut(user) or (user in cut and passes(user)) for user in node.users):
            cut.add(node)
    return cut


def _is_cut(node: fx.Node) -> bool:
    """Whether a value is taken without its last positions along one dimension: `x[:, :, :-2]`, `x[..., :n]`."""
    if node.target in ("narrow", torch.narrow):
        return (*node.args[2:3], *(node.kwargs[name] for name in ("start",) if name in node.kwargs)) == (0,)
    if node.target is F.pad:
        sizes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
        given = isinstance(sizes, tuple | list) and all(type(size) is int for size in sizes)
        return given and any(last < 0 <= first for first, last in zip(sizes[::2], sizes[1::2], strict=False))
    index = node.args[1] if node.target is operator.getitem else None
    parts = index if isinstance(index, tuple) else ()
    ends = (part.stop for part in parts if isinstance(part, slice) and part.start in (None, 0))
    # Along both dimensions of maps it is how sizes are made to fit.
    return len([end for end in ends if isinstance(end, fx.Node) or (type(end) is int and end < 0)]) == 1


def sees_no_later_positions(conv: nn.Module) -> bool:
    """Whether a convolution with a forward of its own is causal along a dimension: a copy is tried on two inputs."""
    layer: Any = conv
    if all(size == 1 for size in layer.kernel_size) or set(layer.stride) != {1} or layer.weight.is_meta:
        return False
    dims, half = len(layer.kernel_size), _POSITIONS // 2
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twin = copy.deepcopy(layer).eval()
            for axis in (2 + i for i, size in enumerate(layer.kernel_size) if size > 1):
                sizes = [_POSITIONS if 2 + i == axis else 8 for i in range(dims)]
                x = torch.randn(1, layer.in_channels, *sizes).to(layer.weight)
                later = x.clone()
                later.narrow(axis, half, half).add_(1)
                one, two = twin(x), twin(later)
                if one.shape[axis] == _POSITIONS:
                    past, moved = (y.narrow(axis, 0, half) for y in (one, two))
                    if torch.equal(past, moved) and not torch.equal(one, two):
                        return True
    except Exception:  # the forward is anybody's code
        return False
    return False


# ---- by names ----


def named_so(model: nn.Module, sites: Sequence[Site], ranks: Mapping[str, Collection[int]]) -> dict[str, str]:
    """Norms of (N, C, L) near a module that is called causal, or in one whose forward takes a mask or lengths.

    Maps have lengths too, where one dimension is time (spectrograms); what masks are of maps is not known.
    `ranks` has how many dimensions the input of a norm may have.
    """
    found: dict[str, str] = {}
    on_lines = [site for site in sites if site.kind == "norm" and _is_on_lines(site, ranks.get(site.path, {3}))]
    on_maps = [site for site in sites if site.kind == "norm" and site.form in APART and site.spatial_dims == 2]
    for path, module in model.named_modules() if on_lines or on_maps else ():
        if type(module).__module__.startswith("torch.nn."):
            continue
        around = path.rpartition(".")[0] if _NAMED_CAUSAL.search(type(module).__name__) else None
        arguments = inspect.signature(module.forward).parameters
        padded = any(map(_NAMED_PADDED.search, arguments))
        if around is None and not padded:
            continue
        for norm in [*on_lines, *on_maps] if any(map(_NAMED_LENGTHS.search, arguments)) else on_lines:
            if around is not None and norm in on_lines and _is_in(norm.path, around):
                found[norm.path] = CAUSAL
            elif padded and _is_in(norm.path, path):
                found.setdefault(norm.path, PADDED)
    return found


def _is_on_lines(norm: Site, ranks: Collection[int]) -> bool:
    """Whether a norm that keeps positions apart may read (N, C, L)."""
    if norm.form not in APART:
        return False
    return 3 in ranks if norm.spatial_dims == 1 else norm.spatial_dims is None and set(ranks) == {3}


def _is_in(path: str, owner: str) -> bool:
    return f"{path}.".startswith(f"{owner}.".lstrip("."))
