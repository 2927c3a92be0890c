"""The tensors of a state dict into a model, in place, so that whatever else holds the model's tensors sees them too."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from normswap.analysis.reachable import reachable_tensors
from normswap.checkpoints import state_keys
from normswap.checkpoints.mapped_memory import release
from normswap.errors import FileError, ModelError

State = Mapping[str, Any]
_SHOWN = 3  # names in a message


def fill(model: nn.Module, state: State, binding: state_keys.Binding, where: object) -> None:
    """Give `model` the tensors of `state`, which `binding` names, by the model's own loading with all its hooks.

    Each tensor keeps its place and identity, and gets the values, the dtype and the layout of the file's.

    Raises:
        FileError: a tensor does not fit, or is not in the model afterwards as it is in the file.
        ModelError: a tensor of the model is on meta still.
    """
    part = OrderedDict((name, state[outer]) for name, outer in (binding.given or binding.names).items())
    taken, missing, unexpected = _load(model, part, _metadata(model, state, binding), where)
    if odd := [*missing, *unexpected]:
        raise FileError(f"{where}: does not fit the model: {', '.join(odd[:_SHOWN])}")
    _recompute(model)
    _check(model, part | taken, where)


def bind_by_loading(model: nn.Module, state: State, where: object) -> state_keys.Binding | None:
    """Where `model` stands in `state`, as its own load hooks know the keys; None where they leave some missing.

    Raises `FileError` where a tensor has another shape than the model's.
    """
    for prefix, part in state_keys.possible_parts(state, model.state_dict()):
        binding = state_keys.Binding(part, prefix)
        inner = OrderedDict((name, state[outer]) for name, outer in part.items())
        taken, missing, unexpected = _load(model, inner, _metadata(model, state, binding), where)
        if not missing and not state_keys.of_another_model(unexpected, model.state_dict()):
            saved = {id(value): part[name] for name, value in inner.items()}
            names = {name: saved[id(value)] for name, value in taken.items() if id(value) in saved}
            return state_keys.Binding(names, prefix, {n: outer for n, outer in part.items() if n not in unexpected})
    return None


def with_what_loading_makes(
    model: nn.Module, state: State, binding: state_keys.Binding, beside: Sequence[str], where: object
) -> state_keys.Binding:
    """`binding` with those of the saved keys `beside` that the model makes tensors of only as it is loaded.

    So the normalizers of diffusion policies learn in loading what they hold.
    """
    keys = {state_keys.without_wrappers(key).removeprefix(binding.prefix): key for key in beside}
    extra = {name: key for name, key in keys.items() if isinstance(state[key], Tensor)}
    if not extra:
        return binding
    part = OrderedDict((name, state[outer]) for name, outer in {**extra, **binding.names}.items())
    _load(model, part, _metadata(model, state, binding), where)
    made = {name: extra[name] for name in model.state_dict() if name in extra}
    return replace(binding, names={**binding.names, **made})


def _metadata(model: nn.Module, state: State, binding: state_keys.Binding) -> dict[str, Any]:
    """Of which version the tensors of each module are, which loading asks for: `_metadata` by the model's own paths."""
    known = getattr(state, "_metadata", None)
    known = known if isinstance(known, Mapping) else {}
    outer = {name: binding.saved_module(name) for name, _ in model.named_modules()}
    return {name: known[path] for name, path in outer.items() if path in known}


def _load(
    model: nn.Module, part: Mapping[str, Any], metadata: Mapping[str, Any], where: object
) -> tuple[dict[str, Any], list[str], list[str]]:
    """What each of the model's keys took after all hooks, the keys that nothing fills, and those of no use to it."""
    taken: dict[str, Any] = {}
    copied: list[Tensor] = []  # by the time that the next module is prepared

    def prepare(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        while copied:
            release(copied.pop())
        for name, slot in saved_slots(module):
            value = state.get(prefix + name)
            if isinstance(value, Tensor):
                taken[prefix + name] = value
                copied.append(value)
                _prepare_slot(module, name, slot, value, f"{where}: {prefix}{name}")

    # Registered last, so that it comes after the model's own hooks.
    handles = [m.register_load_state_dict_pre_hook(prepare) for m in model.modules()]  # type: ignore[no-untyped-call]
    incoming = OrderedDict(part)
    incoming._metadata = metadata  # type: ignore[attr-defined]
    try:
        told = model.load_state_dict(incoming, strict=False)
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:  # hooks of the model's own, or odd tensors
        last = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise FileError(f"{where}: does not fit the model: {last}") from None
    finally:
        for handle in handles:
            handle.remove()
    slots = {prefix + name: id(slot) for prefix, module in _prefixes(model) for name, slot in saved_slots(module)}
    filled = {slots[name] for name in taken if name in slots}
    missing, unexpected = told or (list(slots), [])  # a method of the model's own may tell nothing
    missing = [n for n in missing if slots.get(n) not in filled and not n.endswith("num_batches_tracked")]
    return taken, missing, list(unexpected)


def _prefixes(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    named = model.named_modules(remove_duplicate=False)
    return ((f"{path}." if path else "", module) for path, module in named)


def saved_slots(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a module that its state dict holds, by name."""
    buffers = {n: t for n, t in module._buffers.items() if n not in module._non_persistent_buffers_set}
    return [(name, slot) for name, slot in {**module._parameters, **buffers}.items() if slot is not None]


def _prepare_slot(module: nn.Module, name: str, slot: Tensor, value: Tensor, what: str) -> None:
    """Let the tensor `slot` take the dtype and the layout of `value`, whose values torch then copies into it."""
    strided = slot.layout is value.layout is torch.strided
    if is_lazy(slot) or slot.shape != value.shape or not strided:
        return
    if slot.is_meta:
        empty = torch.empty_like(value)
        setattr(module, name, nn.Parameter(empty, slot.requires_grad) if name in module._parameters else empty)
    elif slot.dtype != value.dtype:
        if _is_shared(slot):
            raise FileError(
                f"{what} is {value.dtype}, and the model holds views of its own, which is {slot.dtype}; "
                f"give a factory that makes the model in {value.dtype}"
            )
        slot.data = torch.empty_like(value)
    elif slot.stride() != value.stride() and not _is_shared(slot):
        slot.data = torch.empty_like(value)


def _is_shared(tensor: Tensor) -> bool:
    """Whether another tensor, a view for one, is on the same memory."""
    alone = torch.empty(1)
    return _uses(tensor) > _uses(alone)


def _uses(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _recompute(model: nn.Module) -> None:
    """Anew the weights that torch's hooks compute before a forward, for what reads them earlier."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            with torch.no_grad():
                if isinstance(hook, WeightNorm):
                    setattr(module, hook.name, hook.compute_weight(module))
                elif isinstance(hook, SpectralNorm):
                    setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
                elif isinstance(hook, BasePruningMethod):
                    setattr(module, hook._tensor_name, hook.apply_mask(module))  # type: ignore[no-untyped-call]


def _check(model: nn.Module, wanted: Mapping[str, Any], where: object) -> None:
    """Raise where a tensor of the state dict is not the wanted one bit by bit, or one in reach is on meta."""
    for name, value in model.state_dict().items():
        given = wanted.get(name)
        if isinstance(value, Tensor) and isinstance(given, Tensor):
            if not same_bits(value, given):
                raise FileError(
                    f"{where}: {name} is not in the model as it is in the file: the model computes it, or keeps it as "
                    "one with another tensor whose values the file has differently"
                )
            release(given)
    on_meta = [name for name, tensor in reachable_tensors(model) if tensor.is_meta]
    if on_meta:
        raise ModelError(
            f"{where}: the model that was given has tensors on meta that the file does not hold: "
            f"{', '.join(on_meta[:_SHOWN])}; give a factory that makes it on the CPU"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same in shape, dtype and each bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel() or a.layout is not torch.strided or a.is_quantized:
        return torch.equal(a, b)
    plain = (t.detach().resolve_conj().resolve_neg().contiguous() for t in (a, b))
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in plain))
