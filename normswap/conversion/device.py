"""A conversion on another device than the model's own: where runs and the fit may be faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ModelError, OptionError, first_line


def parse_device(device: Any) -> torch.device | None:
    """The device of that name or number; None for None.

    Raises `OptionError` where there is no such device, or none that holds values.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except Exception as error:  # each back end raises its own
        reason = "it holds no values" if str(device).startswith("meta") else first_line(error)
        raise OptionError(
            f"device: {device!r} cannot be used here ({reason}); give cpu, or cuda where there is one"
        ) from None
    return found


def home_of(model: nn.Module) -> torch.device:
    """The device of all of a model's tensors; raises `ModelError` where there are several, or one without values."""
    devices = dict.fromkeys(tensor.device for tensor in (*model.parameters(), *model.buffers()))
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        names = ", ".join(map(str, devices))
        raise ModelError(f"the model is on {names}: to be run on another device, it has to be on one that holds values")
    return next(iter(devices), torch.device("cpu"))


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` itself with its parameters and buffers on `device`; those that are one tensor stay one.

    Raises `ModelError` where they cannot be there.
    """
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # with what was moved, so that no other tensor gets its number

    def to_device(tensor: Tensor) -> Tensor:
        return moved.setdefault(id(tensor), (tensor, tensor.to(device)))[1]

    try:
        model._apply(to_device)  # type: ignore[no-untyped-call]
    except Exception as error:  # each back end raises its own, for want of memory or of a dtype
        raise ModelError(f"the model cannot be moved to {device}: {first_line(error)}") from error
    return model
