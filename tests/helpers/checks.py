"""What tests compare: outputs, whole models, folders, and a report with its model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import normswap


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / a.double().norm()).item()


def fingerprint(model: nn.Module) -> list[object]:
    modules = [(path, type(m), m.training) for path, m in model.named_modules(remove_duplicate=False)]
    tensors = [(k, v.clone(), v.dtype, v.stride()) for k, v in model.state_dict().items()]
    return [modules, tensors, [(n, p.requires_grad) for n, p in model.named_parameters()]]


def same(a: list[object], b: list[object]) -> bool:
    tensors = zip(a[1], b[1], strict=True)
    equal = all(x[0] == y[0] and torch.equal(x[1], y[1]) and x[2:] == y[2:] for x, y in tensors)
    return equal and a[0] == b[0] and a[2] == b[2]


def check_named(model: nn.Module, report: normswap.Report) -> None:
    """Each path of a norm is in the report, once, and of a convolution, where the target is for such."""
    named = [path for change in report.changes for path in change.paths] + [left.path for left in report.left]
    target = normswap.TARGETS[report.target]
    layers = (nn.modules.batchnorm._NormBase, nn.GroupNorm) if target.norm else ()
    layers += (nn.modules.conv._ConvNd,) if target.weight else ()
    paths = [path for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, layers)]
    assert set(paths) <= set(named)
    assert len(named) == len(set(named))
    assert all(left.reason for left in report.left)


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
