"""Differentially private training with Opacus: gradients for each sample through the layers of this package."""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from normswap.errors import NormswapError
from normswap.layers.norms import EstimatedBatchNorm, FrozenBatchNorm, PositionNorm
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import CONVOLUTIONS, LAYERS, NORMALIZED, STANDARDIZED, TRANSPOSED, retyped
from normswap.printable import printable
from normswap.report.path_patterns import summarize_paths

CONSTANT = (*(STANDARDIZED[plain] for plain in (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)), FrozenBatchNorm)
"""Layers whose buffers are constants: none of them ever depends on a sample."""
_COMPUTED = (*STANDARDIZED.values(), *NORMALIZED.values(), FrozenBatchNorm, PositionNorm)
_RECURRENT = (
    *(forms[plain] for forms in (STANDARDIZED, NORMALIZED) for plain in LAYERS["rnn"]), *LAYER_NORMALIZED.values(),
)  # fmt: skip
_NO_RECURRENT = (
    "Opacus has no gradients for each sample of these: leave recurrent layers plain (layers=, recurrent=), and "
    "opacus.validators.ModuleValidator.fix puts its own in their place"
)
_NO_EXPANSION = (
    "torch's expanded weights (grad_sample_mode='ew') have no gradients for each sample of these: take "
    "grad_sample_mode='hooks' or 'functorch'"
)


def register_opacus() -> None:
    """Have Opacus train the layers of this package. Idempotent.

    Opacus knows no gradients for each sample of standardized layers and of `pn`, and refuses layers with buffers,
    since batch norm's would leak; but the gains and shifts of standardized weights and the statistics of `frozen` are
    constants. `est` and `bcn` follow their samples, so Opacus goes on refusing them. Recurrent layers are refused
    before training starts, and so is all of this package under `grad_sample_mode="ew"`. `convert` calls this where
    Opacus is imported by then; otherwise it is to be called before `make_private`.

    Raises NormswapError where Opacus is not installed. Source: https://opacus.ai, `register_grad_sampler`.
    """
    try:
        from opacus import grad_sample
        from opacus.grad_sample import grad_sample_module, gsm_exp_weights, utils
    except ImportError as error:
        raise NormswapError("opacus is not installed: pip install opacus") from error
    utils.register_grad_sampler([*CONSTANT, PositionNorm])(sample_gradients)
    # Each class of Opacus that wraps a model checks it; which these are differs between versions.
    for owner in vars(grad_sample_module).values():
        check = vars(owner).get("validate") if isinstance(owner, type) else None
        if isinstance(check, classmethod) and not hasattr(check.__func__, "__wrapped__"):
            owner.validate = classmethod(_ignoring_constants(check.__func__, utils.register_grad_sampler))
    for module in [m for m in vars(grad_sample).values() if isinstance(m, ModuleType)]:
        prepare = vars(module).get("prepare_layer")
        if prepare is not None and not hasattr(prepare, "__wrapped__"):
            vars(module)["prepare_layer"] = _preparing_constants(prepare)
    by_torch: Any = gsm_exp_weights.GradSampleModuleExpandedWeights
    if not hasattr(by_torch.__init__, "__wrapped__"):
        by_torch.__init__ = _refusing_what_is_computed(by_torch.__init__)


def register_if_imported() -> None:
    """`register_opacus` where a program uses Opacus, which is not imported for this."""
    if "opacus" in sys.modules:
        register_opacus()


def sample_gradients(
    layer: nn.Module, activations: list[Tensor], backprops: Tensor, recurse: bool = False
) -> dict[nn.Parameter, Tensor]:
    """The gradient of each trainable parameter of `layer` for each sample, of shape (N, *parameter.shape).

    `activations` holds the layer's input and `backprops` is the gradient of its output, the batch first in both.
    `recurse` is whether the parameters of the modules in it are meant too.
    """
    held = {name: p for name, p in layer.named_parameters(recurse=recurse) if p.requires_grad}
    if not len(backprops):
        return {p: torch.zeros_like(p).unsqueeze(0) for p in held.values()}
    alone = _without_hooks(layer)

    def loss(parameters: dict[str, Tensor], x: Tensor, gradient: Tensor) -> Tensor:
        output: Tensor = functional_call(alone, parameters, (x.unsqueeze(0),))
        return (output * gradient.unsqueeze(0)).sum()

    values = {name: p.detach() for name, p in held.items()}
    x = activations[0]
    found = vmap(grad(loss), in_dims=(None, 0, 0))(values, x.to(backprops.dtype), backprops)
    return {p: found[name] for name, p in held.items()}


def _without_hooks(layer: nn.Module) -> nn.Module:
    """The same layer without hooks: Opacus's own wait for one forward and one backward."""
    alone = retyped(layer, type(layer), parameters=layer._parameters)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        vars(alone)[name] = OrderedDict()
    children = {name: child and _without_hooks(child) for name, child in layer._modules.items()}
    vars(alone)["_modules"] = children
    return alone


# ---- Opacus's own checks and preparations, with ours around them ----


def _ignoring_constants(check: Any, register_grad_sampler: Any) -> Any:
    """Opacus's check of a model, blind to buffers that are constants; it also warns of what would fail later.

    It registers what can only be known from the model: classes made of a library's own convolutions.
    """

    @wraps(check)
    def validate(cls: Any, module: nn.Module, **options: Any) -> Any:
        _refuse(module, _RECURRENT, _NO_RECURRENT)
        inplace = [path for path, layer in module.named_modules() if getattr(layer, "inplace", None) is True]
        if inplace:
            problem = "work in place, which Opacus's hooks do not allow behind a trained layer; set inplace=False"
            warnings.warn(printable(f"{summarize_paths(inplace)}: {problem}"), stacklevel=2)
        ours = {type(layer) for layer in module.modules() if isinstance(layer, CONSTANT)}
        register_grad_sampler([*ours])(sample_gradients)
        layers = [layer for layer in module.modules() if _has_constants_alone(layer)]
        for layer in layers:
            vars(layer)["buffers"] = lambda recurse=True: iter(())
        try:
            return check(cls, module, **options)
        finally:
            for layer in layers:
                del vars(layer)["buffers"]

    return validate


def _preparing_constants(prepare: Callable[..., None]) -> Callable[..., None]:
    """Opacus's preparation of a layer for functorch, which refuses buffers, also for layers whose own are constants."""

    @wraps(prepare)
    def prepare_layer(layer: nn.Module, *args: Any, **options: Any) -> None:
        if _has_constants_alone(layer):
            vars(layer)["ft_compute_sample_grad"] = partial(_all_gradients, layer)  # where Opacus looks for it
        else:
            prepare(layer, *args, **options)

    return prepare_layer


def _all_gradients(
    layer: nn.Module, parameters: Iterable[nn.Parameter], activations: Tensor, backprops: Tensor
) -> list[Tensor]:
    """What a layer adds to the gradients of its parameters for each sample, those of modules in it included.

    A layer that Opacus has a function for adds nothing to the latter, for these modules are then watched themselves.
    """
    found = sample_gradients(layer, [activations], backprops, recurse=not isinstance(layer, CONSTANT))
    return [found[p] if p in found else p.new_zeros(len(backprops), *p.shape) for p in parameters]


def _refusing_what_is_computed(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of Opacus's wrapper by torch's expanded weights, which stop at what these layers compute."""

    @wraps(init)
    def __init__(self: Any, m: nn.Module, *args: Any, **options: Any) -> None:
        _refuse(m, _RECURRENT, _NO_RECURRENT)
        _refuse(m, (EstimatedBatchNorm,), "follow the samples that they see, which private training does not allow")
        _refuse(m, _COMPUTED, _NO_EXPANSION)
        init(self, m, *args, **options)

    return __init__


def _refuse(model: nn.Module, classes: tuple[type[nn.Module], ...], why: str) -> None:
    """Raise `NormswapError` where a model has layers of `classes` that are trained."""
    found = {
        path: type(layer).__name__
        for path, layer in model.named_modules()
        if isinstance(layer, classes) and any(p.requires_grad for p in layer.parameters())
    }
    if found:
        names = ", ".join(sorted(set(found.values())))
        raise NormswapError(f"{summarize_paths(list(found))} ({names}): {why}")


def _has_constants_alone(layer: nn.Module) -> bool:
    """Whether there are buffers in a layer, and all of them are constants."""
    constant = {id(b) for m in layer.modules() if isinstance(m, CONSTANT) for b in m._buffers.values()}
    held = [id(b) for m in layer.modules() for b in m._buffers.values() if b is not None]
    return bool(held) and constant.issuperset(held)
