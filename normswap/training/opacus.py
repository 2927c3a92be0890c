"""Differentially private training with Opacus: gradients for each sample through the layers of this package."""

import sys
import warnings
from collections import OrderedDict
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from normswap.errors import NormswapError
from normswap.layers.norms import FrozenBatchNorm, PositionNorm
from normswap.layers.reparametrized import CONVOLUTIONS, STANDARDIZED, TRANSPOSED, retyped
from normswap.report.path_patterns import summarize_paths

CONSTANT = (*(STANDARDIZED[plain] for plain in (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)), FrozenBatchNorm)
"""Layers whose buffers are constants: none of them ever depends on a sample."""


def register_opacus() -> None:
    """Have Opacus train the layers of this package. Idempotent.

    Opacus knows no gradients for each sample of standardized layers and of `pn`, and refuses layers with buffers,
    since batch norm's would leak; but the gains and shifts of standardized weights and the statistics of `frozen` are
    constants. `est` and `bcn` follow their samples, so Opacus goes on refusing them. `convert` calls this where
    Opacus is imported by then; otherwise it is to be called before `make_private`.

    Raises NormswapError where Opacus is not installed. Source: https://opacus.ai, `register_grad_sampler`.
    """
    try:
        from opacus.grad_sample import grad_sample_module, utils
    except ImportError as error:
        raise NormswapError("opacus is not installed: pip install opacus") from error
    utils.register_grad_sampler([*CONSTANT, PositionNorm])(sample_gradients)
    # Each class of Opacus that wraps a model checks it; which these are differs between versions.
    for owner in vars(grad_sample_module).values():
        check = vars(owner).get("validate") if isinstance(owner, type) else None
        if isinstance(check, classmethod) and not hasattr(check.__func__, "__wrapped__"):
            owner.validate = classmethod(_ignoring_constants(check.__func__, utils.register_grad_sampler))


def register_if_imported() -> None:
    """`register_opacus` where a program uses Opacus, which is not imported for this."""
    if "opacus" in sys.modules:
        register_opacus()


def sample_gradients(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradient of each trainable parameter of `layer` for each sample, of shape (N, *parameter.shape).

    `activations` holds the layer's input and `backprops` is the gradient of its output, the batch first in both.
    """
    held = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    if not len(backprops):
        return {p: torch.zeros_like(p).unsqueeze(0) for p in held.values()}
    alone = retyped(layer, type(layer), parameters=layer._parameters)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        vars(alone)[name] = OrderedDict()  # Opacus's own, which wait for one forward and one backward

    def loss(parameters: dict[str, Tensor], x: Tensor, gradient: Tensor) -> Tensor:
        output: Tensor = functional_call(alone, parameters, (x.unsqueeze(0),))
        return (output * gradient.unsqueeze(0)).sum()

    values = {name: p.detach() for name, p in held.items()}
    x = activations[0]
    found = vmap(grad(loss), in_dims=(None, 0, 0))(values, x.to(backprops.dtype), backprops)
    return {p: found[name] for name, p in held.items()}


def _ignoring_constants(check: Any, register_grad_sampler: Any) -> Any:
    """Opacus's check of a model, blind to buffers that are constants; it also warns of what would fail later.

    It registers what can only be known from the model: classes made of a library's own convolutions.
    """

    @wraps(check)
    def validate(cls: Any, module: nn.Module, **options: Any) -> Any:
        inplace = [path for path, layer in module.named_modules() if getattr(layer, "inplace", None) is True]
        if inplace:
            warnings.warn(
                f"{summarize_paths(inplace)}: work in place, which Opacus's hooks do not allow behind a trained layer; "
                "set inplace=False",
                stacklevel=2,
            )
        layers = [layer for layer in module.modules() if isinstance(layer, CONSTANT)]
        register_grad_sampler([type(layer) for layer in layers])(sample_gradients)
        for layer in layers:
            vars(layer)["buffers"] = lambda recurse=True: iter(())
        try:
            return check(cls, module, **options)
        finally:
            for layer in layers:
                del vars(layer)["buffers"]

    return validate
