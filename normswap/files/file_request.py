"""What is asked of each model in a file, and what comes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from normswap.conversion.request import Progress
from normswap.files.model_specs import ModelSource
from normswap.report.report import Report
from normswap.targets.options import Options
from normswap.targets.target import Target
from normswap.training.parameter_numbers import Parameters


@dataclass(frozen=True)
class FileRequest:
    """What to do with each model in a file."""

    target: Target
    options: Options
    model: ModelSource | None
    """What makes the model of a state dict; None: the file holds a module, or its tensors go alone."""
    model_args: Mapping[str, Any]
    """Keyword arguments of a model that is made."""
    eps: float | None = None
    """Of norms whose tensors are alone; None: torch's default."""
    input_shape: Sequence[int] | None = None
    """Of a batch of noise to run the model on."""
    example_inputs: Any = None
    """In place of noise."""
    examples: tuple[Any, str] | None = None
    """Or a batch that may hold labels, and its name."""
    device: torch.device | None = None
    """Where the model is converted, run and fitted; None: where it is."""
    fold: bool = False
    """Leave plain torch layers."""
    progress: Progress = lambda phase: None
    notes: tuple[str, ...] = ()
    """What is good to know of how its data were read."""
    recognized: str = ""
    """What keys and shapes tell of the network, where no model was given: which it is, or what to give."""


@dataclass(frozen=True)
class ConvertedEntry:
    """A model in a file after its conversion."""

    value: Any
    """The module or the state dict that takes the entry's place."""
    report: Report
    parameter_pairs: tuple[tuple[Parameters, Parameters], ...]
    """Parameters before and after, as far as each pair may be what an optimizer was made for, likeliest first."""
