"""Runs of a model on inputs, in eval mode and without a trace left in it: its output, and what its layers see."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from normswap.analysis.budget import MEMORY, SECONDS, Budget, OverBudget
from normswap.analysis.copies import MODULE_STATE, opened
from normswap.analysis.sites import Site
from normswap.errors import ModelError

SEED = 0
"""Of the random numbers that a run draws: a forward that draws some draws the same before a conversion and after."""
GIVE_INPUTS = "give --input-shape (example_inputs), for which there is no limit"
"""What to do about a model that was not run because that takes too much."""
_SKETCH = 1 << 14  # elements of a layer's output that are kept to compare

Sketches = dict[str, Tensor]
"""By path, some elements of the first output of a layer."""


class Seen(NamedTuple):
    """What a layer saw of its input, of shape (N, C, *spatial)."""

    dims: int
    """The number of its dimensions."""
    elements: int
    """The least number of elements that a channel of a sample had in any call."""
    spatial: tuple[int, ...] = ()
    """The spatial size of the last call."""
    mixes: bool = False
    """Whether in some call it had fewer samples than the layer before, and as many times more channels."""


class Observed(NamedTuple):
    """What one run of a model gave."""

    output: Any
    """The model's output, as its forward gives it."""
    seen: dict[str, Seen]
    """By path, what each watched site saw that the run reached."""
    sketches: Sketches
    """By path, in the order in which they run, some elements of what each tapped layer put out."""


class TooCostly(ModelError):
    """A run that nobody has asked for takes more memory or time than it may."""


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: the items of a tuple or list, those of a dict by name, else the one argument."""
    if isinstance(inputs, dict):
        return (), inputs
    several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)  # which is a tuple too
    return (tuple(inputs) if several else (inputs,)), {}


def call_model(model: nn.Module, inputs: Any) -> Any:
    """`model` on `inputs`, taken as `as_arguments` does."""
    args, kwargs = as_arguments(inputs)
    return model(*args, **kwargs)


def inputs_like(model: nn.Module, inputs: Any) -> Any:
    """`inputs` on the device of the model's first parameter, floats in its dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def fit(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)

    def is_packed(value: Any) -> bool:
        return isinstance(value, PackedSequence)

    leaves, spec = pytree.tree_flatten(inputs, is_leaf=is_packed)
    fitting = [leaf.to(like) if is_packed(leaf) else fit(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(fitting, spec)


def batch_size(batch: Any) -> int:
    """The common first dimension of the tensors of a batch; 1 where there is none."""
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else [batch]
    sizes = {v.shape[0] if isinstance(v, Tensor) and v.dim() else None for v in values}
    return (sizes.pop() or 1) if len(sizes) == 1 else 1


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
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


@contextmanager
def temporary_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks, which have just been registered, at the end, however it comes."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calls_outside(model: nn.Module, parts: Mapping[str, Collection[str]]) -> Iterator[set[str]]:
    """Meanwhile, a set that takes in each of the modules at the paths `parts` that a run calls outside of its parts.

    The parts of a module are modules around it, or it itself, by their paths.
    """
    running: Counter[str] = Counter()
    outside: set[str] = set()

    def counted(path: str, by: int) -> Any:
        return lambda *_: running.update({path: by})

    def checked(path: str) -> Any:
        return lambda *_: None if any(running[part] or part == path for part in parts[path]) else outside.add(path)

    handles = [model.get_submodule(path).register_forward_pre_hook(checked(path)) for path in parts]
    for path in {part for around in parts.values() for part in around}:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(counted(path, 1)))
        handles.append(module.register_forward_hook(counted(path, -1), always_call=True))
    with temporary_hooks(handles):
        yield outside


def run_model(
    model: nn.Module,
    inputs: Any,
    sites: Iterable[Site] = (),
    unasked: bool = False,
    name: str = "example inputs",
    taps: Iterable[str] = (),
) -> Observed:
    """Run `model` in eval mode on `inputs`; note what each of `sites` sees, and what layers at the paths `taps` give.

    Raises `ModelError` where the forward fails; `name` is what the message calls the inputs. A run that is `unasked`
    has a budget of memory and time, and raises `TooCostly` where that does not do.
    """
    seen: dict[str, Seen] = {}
    sketches: Sketches = {}
    before = {"samples": 0, "channels": 0}  # what the last watched layer read, and gave

    def watch(site: Site) -> RemovableHandle:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].dim() >= 2:
                spatial = tuple(args[0].shape[2:])
                size = math.prod(spatial)
                least = min(size, seen[site.path].elements if site.path in seen else size)
                samples, channels = args[0].shape[:2]
                mixes = site.path in seen and seen[site.path].mixes
                if site.kind == "norm" and samples and before["samples"] > samples:
                    mixes = mixes or before["samples"] * before["channels"] == samples * channels
                seen[site.path] = Seen(args[0].dim(), least, spatial, mixes)
                before.update(samples=samples, channels=site.channels if site.has_channels else 0)

        return site.module.register_forward_pre_hook(note)

    def tap(path: str) -> RemovableHandle:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if path not in sketches and isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                flat = output.detach().flatten()
                sketches[path] = flat[:: -(-len(flat) // _SKETCH)].float().cpu()

        return model.get_submodule(path).register_forward_hook(note)

    handles = [*map(watch, sites), *map(tap, taps)]  # a damaged module fails here, and not as its forward
    try:
        with (
            temporary_hooks(handles),
            eval_mode(model),
            torch.random.fork_rng(devices=[]),
            Budget() if unasked else nullcontext(),
        ):
            torch.manual_seed(SEED)
            output = call_model(model, pytree.tree_map_only(Tensor, Tensor.clone, inputs))
    except OverBudget:
        cost = f"more than {MEMORY >> 20} MiB or {SECONDS:g} s"
        raise TooCostly(f"not run: on {name} the model takes {cost}; {GIVE_INPUTS}") from None
    except Exception as error:  # the forward is anybody's code
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        said = f"the model does not run on the {name}: {type(error).__name__}: {reason}"
        raise ModelError(f"{said}; give inputs as it takes them, the batch first, such as 1,3,224,224") from error
    return Observed(output, seen, sketches)
