"""Running a model on example inputs: the sizes that its norms see, and how far its output drifts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from normswap.analysis.copies import MODULE_STATE, opened
from normswap.analysis.sites import Site
from normswap.errors import ModelError, OptionError, first_line
from normswap.report.report import Drift, LayerDrift

PATIENCE = 10.0
"""Seconds that a run on noise may take which nobody asked for."""
_SEED = 0
_SKETCH = 1 << 14  # elements of a layer's output that are kept to compare


class Seen(NamedTuple):
    """Of the input of a layer: its dimensions, the least elements that a channel of a sample had, and its last size behind
    (N, C).
    """

    dims: int
    elements: int
    spatial: tuple[int, ...] = ()


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: a tuple or list as positional arguments, a dict as keywords, else the one argument."""
    if isinstance(inputs, dict):
        return (), inputs
    several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)  # which is a tuple too
    return (tuple(inputs) if several else (inputs,)), {}


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on `inputs`, taken as `arguments` does."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def fitted(model: nn.Module, inputs: Any) -> Any:
    """`inputs` on the device of the model's first parameter, floats in its dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def fit(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)

    def is_packed(value: Any) -> bool:
        return isinstance(value, PackedSequence)

    leaves, spec = pytree.tree_flatten(inputs, is_leaf=is_packed)
    fitting = [leaf.to(like) if is_packed(leaf) else fit(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(fitting, spec)


def count(batch: Any) -> int:
    """The common first dimension of the tensors of a batch; 1 where there is none."""
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else [batch]
    sizes = {v.shape[0] if isinstance(v, Tensor) and v.dim() else None for v in values}
    return (sizes.pop() or 1) if len(sizes) == 1 else 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back afterwards, and so do its attributes.

    Some forwards fill caches in eval mode that only `train()` empties, which is not called here.
    """
    before = [(module, module.training, _own_attributes(module)) for module in model.modules()]
    try:
        for module, _, _ in before:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode, own in before:
            module.training = mode
            for name in vars(module).keys() - own.keys() - MODULE_STATE:
                del vars(module)[name]
            vars(module).update(own)


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has beyond what torch gives each; containers as they now are."""
    return {name: opened(value) for name, value in vars(module).items() if name not in MODULE_STATE}


Sketches = dict[str, Tensor]
"""By path, some elements of the first output of a layer."""


def run(
    model: nn.Module,
    inputs: Any,
    sites: Iterable[Site] = (),
    limit: float | None = None,
    name: str = "example inputs",
    sketches: Sketches | None = None,
    taps: Iterable[str] = (),
) -> tuple[Any, dict[str, Seen]]:
    """The output of `model` in eval mode, and what each of `sites` saw that it reached.

    `sketches` gets some elements of what the layers at the paths `taps` put out, in the order in which they run. Raises `ModelError` where the forward fails, or reaches a site after more than `limit` seconds.
    """
    seen: dict[str, Seen] = {}
    started = time.monotonic()

    def watch(site: Site) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if limit is not None and time.monotonic() - started > limit:
                raise TimeoutError
            if args and isinstance(args[0], Tensor) and args[0].dim() >= 2:
                spatial = tuple(args[0].shape[2:])
                size = math.prod(spatial)
                least = min(size, seen[site.path].elements if site.path in seen else size)
                seen[site.path] = Seen(args[0].dim(), least, spatial)

        return site.module.register_forward_pre_hook(note)

    def tap(path: str, into: Sketches) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if path not in into and isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                flat = output.detach().flatten()
                into[path] = flat[:: -(-len(flat) // _SKETCH)].float().cpu()

        return model.get_submodule(path).register_forward_hook(note)

    handles = [watch(site) for site in sites]
    handles += [] if sketches is None else [tap(path, sketches) for path in taps]
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)  # a forward that draws numbers draws the same before and after
            return call(model, pytree.tree_map_only(Tensor, Tensor.clone, inputs)), seen
    except TimeoutError:
        raise ModelError(f"not measured: the model takes more than {limit:g} s; give --input-shape") from None
    except Exception as error:  # the forward is anybody's code
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ModelError(f"the model does not run on the {name}: {type(error).__name__}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()


def drift(before: Any, after: Any, probe: str) -> Drift:
    """How far `after` is from `before`, two outputs of the same structure; see `Drift`."""
    old, new = _tensors(before), _tensors(after)
    if [t.shape for t in old] != [t.shape for t in new]:
        return Drift(probe, note="the outputs differ in shape, so they cannot be compared")
    if not old:
        return Drift(probe, note="the output holds no floating-point tensor")
    a, b = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (old, new))
    if not (a.isfinite().all() and b.isfinite().all()):
        return Drift(probe, note="the output is not finite")
    top1 = None
    if old[0].dim() in (2, 4) and old[0].shape[1] > 1:
        top1 = (old[0].argmax(1) == new[0].argmax(1)).double().mean().item()
    if not a.norm() > 0:
        return Drift(probe, top1_agreement=top1, note="the output before was zero")
    relative = ((b - a).norm() / a.norm()).item()
    cosine = nn.functional.cosine_similarity(a, b, dim=0).item() if b.norm() > 0 else None
    return Drift(probe, relative, cosine, top1)


def layer_drifts(before: Sketches, after: Sketches) -> Iterator[LayerDrift]:
    """How far each layer moved, in the order of `before`; those that cannot be compared are left out."""
    for path, old in before.items():
        new = after.get(path)
        if new is not None and new.shape == old.shape and old.isfinite().all() and new.isfinite().all() and old.any():
            yield LayerDrift(path, ((new - old).norm() / old.norm()).item())


def _tensors(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def noise(shape: tuple[int, ...]) -> Tensor:
    """Seeded standard normal noise of a shape: the probe where no data is at hand."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED))


def guess_inputs(model: nn.Module, shape: tuple[int, ...] | None = None) -> tuple[Any, str] | None:
    """Noise that the model may take, and its name; None where no convolution or linear layer tells a size.

    `shape` is that of one input batch; without it, it is made up from the first layer.
    torchvision's detection models take a list of pictures, its optical flow models two.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)), None)
    family = type(model).__module__
    if shape is None:
        if first is None:
            return None
        if isinstance(first, nn.Linear):
            shape = (2, first.in_features)
        else:
            dims = len(first.kernel_size)
            shape = (2, first.in_channels, *{1: (1024,), 2: (224, 224), 3: (16, 112, 112)}[dims])
        if family.startswith("torchvision.models.detection"):
            shape = (1, 3, 320, 320)
        elif family.startswith("torchvision.models.optical_flow"):
            shape = (1, 3, 128, 128)
    name = f"noise {'×'.join(map(str, shape))}, seed {_SEED}"
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        value = noise(shape).to(like.device, like.dtype)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise OptionError(f"input_shape: {shape} cannot be made: {first_line(error)}") from None
    if family.startswith("torchvision.models.detection"):
        return (list(value),), name
    if family.startswith("torchvision.models.optical_flow"):
        return (value, value.flip(-1)), name
    return (value,), name
