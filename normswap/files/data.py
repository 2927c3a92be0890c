"""The data that go with a conversion of a file: to calibrate with, and to measure on."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from normswap.calibration.batches import (
    MOST_EXAMPLES,
    AsPictures,
    as_one_batch,
    few_examples,
    input_batches,
    read_samples,
)  # fmt: skip
from normswap.calibration.pictures import PICTURES
from normswap.errors import OptionError
from normswap.files import demonstration, model_specs
from normswap.files.file_request import FileRequest


@dataclass(frozen=True)
class Given:
    """The data as they are given; see `convert_file`.

    Raises `OptionError` for options of pictures where there are none.
    """

    calibrate: Any
    examples: Any
    sources: Sequence[object]
    """What is converted and its model: a library's model says how its pictures are prepared, and the demo has some."""
    weights: str | None
    input_size: Any
    mean: Any
    std: Any
    model: Any = None
    """The module or the state dict, once it is read: its first convolution tells the channels of pictures."""

    def __post_init__(self) -> None:
        if self.calibrate is None and self.examples is None and any((self.input_size, self.mean, self.std)):
            raise OptionError("--input-size, --mean and --std are for the pictures of --calibrate and --examples")

    @property
    def spec(self) -> str | None:
        """What names the model, where a spec does."""
        specs = (source for source in self.sources if isinstance(source, str) and model_specs.is_spec(source))
        return next(specs, None)

    def preparation(self) -> AsPictures:
        """How pictures become inputs, for `read_samples`."""
        return AsPictures(
            spec=self.spec, weights=self.weights, input_size=self.input_size, mean=self.mean, std=self.std,
            channels=_picture_channels(self.model),
        )  # fmt: skip


def with_data(request: FileRequest, given: Given) -> FileRequest:
    """`request` with the data read."""
    options = replace(request.options, calibrate=_read_calibration(given, request))
    return replace(request, options=options, examples=_read_examples(given, request), notes=_about_pictures(given))


def _about_pictures(given: Given) -> tuple[str, ...]:
    """How pictures were normalized, where nobody has said how that is to be done."""
    paths = [Path(data) for data in (given.calibrate, given.examples) if isinstance(data, str | os.PathLike)]
    pictures = [path for path in paths if path.is_dir() or path.suffix.lower() in PICTURES]
    of_library = (given.spec or "").startswith(("torchvision:", "timm:"))
    if not pictures or given.mean is not None or of_library:
        return ()
    return ("pictures are normalized by ImageNet's mean and std: give --mean and --std, or 0 and 1 for none",)


def _read_calibration(given: Given, request: FileRequest) -> list[Any] | None:
    data = given.calibrate
    if demonstration.is_demo(data):
        return input_batches(demonstration.training_pictures(data))
    if isinstance(data, str | os.PathLike):
        request.progress(f"reading {data}")
        return read_samples(data, **given.preparation())
    return None if data is None else input_batches(data)


def _read_examples(given: Given, request: FileRequest) -> tuple[Any, str] | None:
    """A few inputs as one batch, and what they are. The demo is its own example."""
    data = given.examples
    if data is None and request.example_inputs is None and demonstration.is_demo(given.sources[0]):
        data = given.sources[0]
    elif data is not None and request.example_inputs is not None:
        raise OptionError("examples stand in place of example_inputs; give one of them")
    if demonstration.is_demo(data):
        return demonstration.held_out_pictures(data)
    if isinstance(data, str | os.PathLike):
        request.progress(f"reading {data}")
        return as_one_batch(read_samples(data, **given.preparation(), limit=MOST_EXAMPLES, batch=MOST_EXAMPLES))
    return None if data is None else few_examples(data)


def _picture_channels(model: nn.Module | Mapping[str, Any]) -> Literal[1, 3]:
    """How many channels the pictures have that a module or a state dict takes: 1 where its first convolution says so.

    One of three outputs and one input a filter may be depthwise, on the channels of RGB.
    """
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    kernels = (value for _, value in named if isinstance(value, Tensor) and value.dim() == 4)
    first = next(kernels, None)
    return 1 if first is not None and first.shape[1] == 1 and len(first) != 3 else 3
