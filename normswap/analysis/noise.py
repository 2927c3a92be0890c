"""Made-up inputs: noise of a shape that a model may take, where no data is at hand."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from normswap.analysis.budget import MEMORY
from normswap.analysis.running import SEED, inputs_like
from normswap.errors import OptionError, first_line

_MOST_ELEMENTS = MEMORY // 8  # of an input that nobody has asked for
_SIZES = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}  # spatial, by dimensions: sounds, pictures, videos
_MOST_CHANNELS = 16  # of these; more are features of another net, whose maps are small
_LENGTH = 16  # of sequences
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_SIZED = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.RNNCellBase, *_EMBEDDINGS)
"""Layers that tell the size of what they read."""
_SMALL_SIZES = {1: (1024,), 2: (64, 64), 3: (8, 32, 32)}


def _noise(shape: tuple[int, ...], reader: nn.Module | None) -> Tensor:
    """Noise that `reader` may take: words out of the vocabulary of an embedding, else normal noise."""
    generator = torch.Generator().manual_seed(SEED)
    if isinstance(reader, _EMBEDDINGS):
        return torch.randint(reader.num_embeddings, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def guess_inputs(model: nn.Module, shape: tuple[int, ...] | None = None) -> tuple[Any, str] | None:
    """Noise that the model may take, and its name.

    None where no layer tells a size, or only one that no input of bounded memory has.

    `shape` is that of one input batch; without it, it is made up from the first layer. What an embedding reads is whole
    numbers.
    torchvision's detection models take a list of pictures, its optical flow models two.
    """
    first = next((m for m in model.modules() if isinstance(m, _SIZED)), None)
    family = type(model).__module__
    detects, flows = (family.startswith(f"torchvision.models.{task}") for task in ("detection", "optical_flow"))
    if shape is None:
        if first is None:
            return None
        if detects or flows:
            shape = (1, 3, 320, 320) if detects else (1, 3, 128, 128)
        elif isinstance(first, nn.Linear):
            shape = (2, first.in_features)
        elif isinstance(first, _EMBEDDINGS):
            shape = (2, _LENGTH)
        elif isinstance(first, nn.RNNBase | nn.RNNCellBase):
            shape = (2, first.input_size) if isinstance(first, nn.RNNCellBase) else (2, _LENGTH, first.input_size)
        else:
            many = isinstance(first.in_channels, int) and first.in_channels > _MOST_CHANNELS  # or text, in a file
            sizes = _SMALL_SIZES if many else _SIZES
            shape = (2, first.in_channels, *sizes[len(first.kernel_size)])
        if not all(isinstance(n, int) and n > 0 for n in shape) or math.prod(shape) > _MOST_ELEMENTS:
            return None
    name = f"noise {'×'.join(map(str, shape))}, seed {SEED}"
    try:
        value = inputs_like(model, _noise(shape, first))
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise OptionError(f"input_shape: {shape} cannot be made: {first_line(error)}") from None
    if detects:
        return (list(value),), name
    return ((value, value.flip(-1)) if flows else (value,)), name
