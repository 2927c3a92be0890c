"""Layers whose weights are re-parametrized: standardized or normalized at each forward.

Each is a subclass of torch's own layer. A standardized one keeps its keys and adds the buffers `weight_gain` and
`weight_shift`; a normalized one has `weight_g` and `weight_v` instead of `weight`, and loads
`torch.nn.utils.parametrizations`' spelling too. Recurrent layers have these for each of their weights
(`weight_ih_l0_gain`).
"""

import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

STANDARDIZE_EPS = 1e-10
"""Added to the variance of a filter, as in the paper's code; filters of std 1e-3 are common."""

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT: tuple[type[nn.Module], ...] = (nn.RNN, nn.LSTM, nn.GRU)
CELLS: tuple[type[nn.Module], ...] = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def weight_names(layer: nn.Module) -> list[str]:
    """The weights of a layer, biases left out, by the names that its plain class gives them."""
    if isinstance(layer, nn.RNNBase):
        return [name for name in layer._flat_weights_names if name.startswith("weight")]
    return ["weight_ih", "weight_hh"] if isinstance(layer, nn.RNNCellBase) else ["weight"]


def filter_groups(layer: nn.Module) -> int | None:
    """The groups of a transposed convolution, None for all others: its filters are not along the first dimension."""
    return int(layer.groups) if isinstance(layer, TRANSPOSED) else None  # type: ignore[arg-type]


def as_filters(weight: Tensor, groups: int | None = None) -> Tensor:
    """`weight` as (out, fan-in).

    It has the shape (out, in, *kernel), or a transposed convolution's (in, out / groups, *kernel).
    """
    if groups is None:
        return weight.reshape(weight.shape[0], -1)
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    return blocks.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def as_weight(filters: Tensor, like: Tensor, groups: int | None = None) -> Tensor:
    """The inverse of `as_filters`, in the shape of `like`."""
    if groups is None:
        return filters.view(like.shape)
    blocks = filters.view(groups, like.shape[1], -1, *like.shape[2:])
    return blocks.transpose(1, 2).reshape(like.shape)


def filter_dims(weight: Tensor, groups: int | None) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """`weight` with each filter along dimensions of its own; these dimensions; and the shape of one number a filter.

    The first is `weight` itself or a view of it: what is written to it is written to `weight`.
    """
    if groups is None:
        return weight, tuple(range(1, weight.dim())), (-1, *[1] * (weight.dim() - 1))
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    rest = [1] * (weight.dim() - 2)
    return blocks, (1, *range(3, blocks.dim())), (groups, 1, weight.shape[1], *rest)


def retyped(
    old: nn.Module,
    cls: type[nn.Module],
    buffers: Mapping[str, Tensor] | None = None,
    parameters: Mapping[str, nn.Parameter | None] | None = None,
) -> nn.Module:
    """`old` as an instance of `cls`, with more buffers, or other parameters; all else is the same objects."""
    new = cls.__new__(cls)
    new.__dict__ = {**vars(old), "_buffers": {**old._buffers, **(buffers or {})}}
    if parameters is not None:
        new.__dict__["_parameters"] = dict(parameters)
    return new


# ---- weight standardization ----


@fx.wrap
def standardize_weight(
    weight: Tensor, gain: Tensor, shift: Tensor, eps: float = STANDARDIZE_EPS, groups: int | None = None
) -> Tensor:
    """Weight standardization of `weight` over each filter's fan-in; see `as_filters` for the shapes, and for `groups`.

    `ŵ = gain · (w − mean) / √(var + eps) + shift`, with the biased variance, and `gain` and `shift` of shape
    (out,). Source: Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and
    Weight Standardization". One fused call: a filter is a group of a group norm.
    """
    if torch.compiler.is_compiling():
        return _standardize_for_compiler(weight, gain, shift, eps, groups)
    lying = weight.movedim(1, -1)  # is_contiguous(memory_format=...) is not known under vmap
    last = weight.dim() in _CHANNELS_LAST and lying.is_contiguous() and not weight.is_contiguous()
    if groups is None and last:
        # The order within a filter does not matter to its statistics: read it as it lies in memory.
        return _standardize(lying.reshape(len(lying), -1), gain, shift, eps).view(lying.shape).movedim(-1, 1)
    made = as_weight(_standardize(as_filters(weight, groups), gain, shift, eps), weight, groups)
    return made.contiguous(memory_format=_CHANNELS_LAST[weight.dim()]) if last else made


def _standardize(filters: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    return F.group_norm(filters.unsqueeze(0), len(filters), gain, shift, eps).squeeze(0)


def _standardize_for_compiler(weight: Tensor, gain: Tensor, shift: Tensor, eps: float, groups: int | None) -> Tensor:
    """The same for a compiler, which fuses it; of a group norm and of changes of shape it makes slower code."""
    laid, over, one = filter_dims(weight, groups)
    wide = laid.to(torch.promote_types(weight.dtype, torch.float32))  # as a group norm computes
    centred = wide - wide.mean(over, keepdim=True)
    scale = gain.view(one) * (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    return (centred * scale + shift.view(one)).to(weight.dtype).reshape(weight.shape)


class _Standardized(nn.Module):
    """Mixed into a layer's class: its weights are standardized."""

    def computed(self, name: str = "weight") -> Tensor:
        """The weight that the layer runs with, of the shape of the parameter `name`."""
        gain, shift = getattr(self, f"{name}_gain"), getattr(self, f"{name}_shift")
        return standardize_weight(getattr(self, name), gain, shift, groups=filter_groups(self))


# ---- weight normalization ----


@fx.wrap
def normalize_weight(v: Tensor, g: Tensor, groups: int | None = None) -> Tensor:
    """Weight normalization `ŵ = g · v / ‖v‖`, the norm over each filter's fan-in; a filter of zeros stays one.

    `g` has the shape of `v` with 1 for what the norm is over: (out, 1, *1), or for a transposed convolution
    (groups, out / groups, *1). Source: Salimans & Kingma 2016, "Weight Normalization".
    """
    if groups is None and _is_observable(v) and v.is_contiguous():
        return _FusedNormalization.apply(v, g)  # type: ignore[no-any-return]
    laid, over, one = filter_dims(v, groups)
    return (laid * (g.reshape(one) / _lengths(laid, over))).reshape(v.shape)


def _lengths(laid: Tensor, over: tuple[int, ...]) -> Tensor:
    """The length of each filter, and 1 for one of zeros, so that it stays zeros."""
    length = torch.linalg.vector_norm(laid, dim=over, keepdim=True)
    return torch.where(length == 0, torch.ones_like(length), length)


class _FusedNormalization(torch.autograd.Function):
    """`normalize_weight` by torch's fused kernels, in half the time.

    By themselves these make NaN of a filter of zeros, and their second derivative is wrong: it takes the lengths for
    constants.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor) -> Tensor:
        made, lengths = torch._weight_norm_interface(v, g)
        if not lengths.all():
            lengths = _lengths(v, tuple(range(1, v.dim())))
            made = v * (g / lengths)
        ctx.save_for_backward(v, g, lengths)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        v, g, lengths = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return torch.ops.aten._weight_norm_interface_backward(gradient.contiguous(), v, g, lengths, 0)  # type: ignore[no-any-return]
        over = tuple(range(1, v.dim()))
        lengths = _lengths(v, over)
        along = (gradient * v).sum(over, keepdim=True) / lengths
        return g / lengths * (gradient - v * along / lengths), along


def _is_observable(tensor: Tensor) -> bool:
    """Whether `tensor` holds numbers that can be looked at without waiting, and is part of no transform of torch's."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # the kernel has no derivative forwards
    )


def gain_shape(weight: Tensor, groups: int | None = None) -> tuple[int, ...]:
    """The shape of `g` for a weight; without groups, or with one, that of torch's own `weight_norm`."""
    rest = [1] * (weight.dim() - 2)
    return (len(weight), 1, *rest) if groups is None else (groups, weight.shape[1], *rest)


class _Normalized(nn.Module):
    """Mixed into a layer's class: its weights are normalized."""

    def computed(self, name: str = "weight") -> Tensor:
        """The weight that the layer runs with, of the shape of the parameter `name` of the plain layer."""
        return normalize_weight(getattr(self, f"{name}_v"), getattr(self, f"{name}_g"), filter_groups(self))

    def __getattr__(self, name: str) -> Any:
        """A weight by its plain name, computed, for code that reads it."""
        if name.startswith("weight") and name in weight_names(self):
            return self.computed(name)
        return super().__getattr__(name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in weight_names(self):  # the spelling of torch.nn.utils.parametrizations.weight_norm
            for other, ours in (("original0", "g"), ("original1", "v")):
                key = f"{prefix}parametrizations.{name}.{other}"
                if key in state_dict:
                    state_dict[f"{prefix}{name}_{ours}"] = state_dict.pop(key)
            g, v = f"{prefix}{name}_g", f"{prefix}{name}_v"
            own = getattr(self, f"{name}_g", None)
            if own is not None and g in state_dict and v in state_dict and state_dict[g].shape != own.shape:
                made = _normalized_over_other_dims(state_dict[v], state_dict[g])
                if made is not None:
                    state_dict[v], state_dict[g] = made, _lengths_of_filters(made, filter_groups(self))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self: Any) -> None:
        """Draw the weights themselves anew, as the plain layer does: lengths and directions are those of what comes."""
        names = [name for name in weight_names(self) if f"{name}_v" in self._parameters]
        drawn = {name: self.computed(name).detach() for name in names}
        self.__dict__.update(drawn)  # found there before they are computed
        try:
            super().reset_parameters()  # type: ignore[misc]
        finally:
            for name in names:
                del self.__dict__[name]
        for name in names:  # recurrent layers draw all of their parameters instead
            setattr(self, name, getattr(self, f"{name}_v") if isinstance(self, RECURRENT + CELLS) else drawn[name])

    def __setattr__(self, name: str, value: Any) -> None:
        """A weight that is given by its plain name becomes a length and a direction for each filter."""
        parameters = self.__dict__.get("_parameters", {})
        if f"{name}_v" not in parameters or not isinstance(value, Tensor):
            super().__setattr__(name, value)
            return
        with torch.no_grad():
            parameters[f"{name}_v"].copy_(value)
            parameters[f"{name}_g"].copy_(_lengths_of_filters(value, filter_groups(self)))


def _lengths_of_filters(weight: Tensor, groups: int | None) -> Tensor:
    """The length of each filter of `weight`, in the shape of `g`."""
    laid, over, _ = filter_dims(weight.detach(), groups)
    lengths: Tensor = torch.linalg.vector_norm(laid, dim=over, dtype=_wide(weight))
    return lengths.to(weight.dtype).reshape(gain_shape(weight, groups))


def _normalized_over_other_dims(v: Tensor, g: Tensor) -> Tensor | None:
    """The weight that `g` and `v` of torch's weight norm stand for, normalized over the dimensions where `g` has 1.

    torch has a length for each index along one dimension, by default the first, which in a transposed convolution is
    that of the input; with `dim=None` one for all. None where the shapes are no such pair.
    """
    sizes = g.shape or (1,) * v.dim()
    if len(sizes) != v.dim() or any(size not in (1, wanted) for size, wanted in zip(sizes, v.shape, strict=True)):
        return None
    wide = v.to(_wide(v))
    over = tuple(dim for dim, size in enumerate(sizes) if size == 1)
    return (wide * (g.to(wide.dtype) / _lengths(wide, over))).to(v.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# ---- the layers ----


class _Conv:
    def forward(self: Any, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.computed(), self.bias)  # type: ignore[no-any-return]


class _Transposed:
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        run = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
        return run(input, self.computed(), self.bias, self.stride, self.padding, padding, self.groups, self.dilation)


class _Linear:
    def forward(self: Any, input: Tensor) -> Tensor:
        return F.linear(input, self.computed(), self.bias)


class _Recurrent:
    """Runs the plain forward on weights that are computed anew, so that none is ever stale."""

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        names = set(weight_names(self))
        weights = [self.computed(n) if n in names else getattr(self, n) for n in self._flat_weights_names]
        # Without references torch does not look whether the parameters are others by now, to run on those.
        instead = _Instead(self, _flat_weights=weights, _flat_weight_refs=[None] * len(weights))
        return PLAIN[type(self)].forward(instead, input, hx)

    def flatten_parameters(self) -> None:
        """Nothing: the weights that run are made at each forward."""

    def _init_flat_weights(self: Any) -> None:
        """torch's own list holds what are parameters; nothing runs on it."""
        self._flat_weights = [self._parameters.get(name) for name in self._flat_weights_names]
        self._flat_weight_refs = [None] * len(self._flat_weights)


class _Cell:
    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        weights = {name: self.computed(name) for name in weight_names(self)}
        return PLAIN[type(self)].forward(_Instead(self, **weights), input, hx)


class _Instead:
    """A module with some of its attributes exchanged, for the methods of its class to run on."""

    def __init__(self, module: nn.Module, **values: Any):
        self._module = module
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        method = getattr(type(self._module), name, None)
        return types.MethodType(method, self) if isinstance(method, types.FunctionType) else getattr(self._module, name)


def _classes(prefix: str, form: type, form_doc: str) -> dict[type[nn.Module], type[nn.Module]]:
    """A class for each plain layer, known by its name in this file, so that it can be pickled."""
    made: dict[type[nn.Module], type[nn.Module]] = {}
    for forward, plain_classes in _FORWARDS:
        for plain in plain_classes:
            name = f"{prefix}{plain.__name__}"
            members = {"__module__": __name__, "__doc__": f"`torch.nn.{plain.__name__}` on {form_doc}."}
            made[plain] = globals()[name] = type(name, (forward, form, plain), members)
    return made


_FORWARDS: Iterable[tuple[type, tuple[type[nn.Module], ...]]] = (
    (_Conv, CONVOLUTIONS), (_Transposed, TRANSPOSED), (_Linear, (nn.Linear,)), (_Recurrent, RECURRENT), (_Cell, CELLS),
)  # fmt: skip
STANDARDIZED = _classes("Standardized", _Standardized, "standardized weights")
NORMALIZED = _classes("Normalized", _Normalized, "normalized weights")
PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    ours: plain for table in (STANDARDIZED, NORMALIZED) for plain, ours in table.items()
}
"""The plain class of each re-parametrized one."""
LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (*CONVOLUTIONS, *TRANSPOSED), "linear": (nn.Linear,), "rnn": (*RECURRENT, *CELLS),
}  # fmt: skip
"""The kinds of layers that a user chooses among."""
