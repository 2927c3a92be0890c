"""How far outputs moved: of a whole model, of each layer, of one tensor."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.analysis.running import Sketches
from normswap.report.report import Drift, LayerDrift


def relative_distance(old: Tensor, new: Tensor) -> float:
    """‖new − old‖ / ‖old‖ over all elements of two tensors of one shape; inf where `old` is zero."""
    size = torch.linalg.vector_norm(old)
    return (torch.linalg.vector_norm(new - old) / size).item() if size != 0 else float("inf")


def floating_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output of any structure."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def output_drift(before: Any, after: Any, probe: str) -> Drift:
    """How far `after` is from `before`, two outputs of the same structure; see `Drift`."""
    old, new = ([t.detach().cpu() for t in floating_tensors(output)] for output in (before, after))
    if [t.shape for t in old] != [t.shape for t in new]:
        return Drift(probe, note="the outputs differ in shape, so they cannot be compared")
    if not old:
        return Drift(probe, note="the output holds no floating-point tensor")
    a, b = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (old, new))
    if not (a.isfinite().all() and b.isfinite().all()):
        return Drift(probe, note="the output is not finite")
    of_classes = old[0].dim() in (2, 4) and old[0].shape[1] > 1  # (N, C) or (N, C, H, W)
    top1 = (old[0].argmax(1) == new[0].argmax(1)).double().mean().item() if of_classes else None
    if not a.norm() > 0:
        return Drift(probe, top1_agreement=top1, note="the old output was zero")
    cosine = nn.functional.cosine_similarity(a, b, dim=0).item() if b.norm() > 0 else None
    return Drift(probe, relative_distance(a, b), cosine, top1)


def layer_drifts(before: Sketches, after: Sketches) -> Iterator[LayerDrift]:
    """How far each layer moved, in the order of `before`; those that cannot be compared are left out."""
    for path, old in before.items():
        new = after.get(path)
        if new is not None and new.shape == old.shape and old.isfinite().all() and new.isfinite().all() and old.any():
            yield LayerDrift(path, relative_distance(old, new))
