"""What is asked of a conversion, in one value, and the phases that it goes through."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor

from normswap.analysis.running import Seen
from normswap.calibration.measuring import Measured
from normswap.targets.options import Options
from normswap.targets.target import Target

Noise = Literal["", "asked", "guessed"]
"""Of inputs that are noise: whether their shape was `asked` for, or is a guess, which a model need not take."""
Progress = Callable[[str], None]
"""Is told the name of each phase as it begins, and the share that is done of a long one."""


class Phase(Enum):
    """The phases of a conversion in their order, by the words that the progress bar shows."""

    COPY = "copying the model"
    FIND = "finding norms and convolutions"
    TRACE = "finding how layers are connected"
    RUN_BEFORE = "running the model before"
    MEASURE = "measuring on the calibration data"
    PLAN = "working out the new layers"
    REPLACE = "swapping"
    CALIBRATE = "calibrating"
    RUN_AFTER = "running the model after"


def phases(on_data: bool) -> list[Phase]:
    """The phases of a conversion, with or without calibration data."""
    return [phase for phase in Phase if on_data or phase not in (Phase.MEASURE, Phase.CALIBRATE)]


@dataclass(frozen=True)
class Recorded:
    """What the recipe of a converted file tells of its norms, by path, where a conversion is repeated without data."""

    groups: Mapping[str, int] = field(default_factory=dict)
    eps: Mapping[str, float] = field(default_factory=dict)
    """Of those that have another than the norms before them."""
    changes: Mapping[str, str] = field(default_factory=dict)
    """All layers that were changed, and what they became."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    seen: Mapping[str, Seen] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A conversion as it is asked for: the target, the options, and how to go about it."""

    target: Target
    options: Options = field(default_factory=Options)
    example_inputs: Any = None
    """What the model is run on before and after; None: the first calibration batch, or nothing."""
    inputs_name: str = "example inputs"
    """How the report calls these inputs."""
    noise: Noise = ""
    """Of the example inputs. Noise checks what is exact; drift on it would say nothing of real inputs."""
    examples: Any = None
    """A batch in place of the example inputs, which may hold labels too."""
    may_be_idle: bool = False
    """Nothing to convert is no error."""
    folds_in_parts: bool = True
    """Norms may go into layers of which only the traces of parts of the model tell."""
    heeds_type_tests: bool = False
    """Layers stay whose class a forward asks for, even where a run could show that nothing comes of it."""
    inplace: bool = False
    """The model itself is changed, not a copy."""
    device: torch.device | None = None
    """Where the model is converted, run and fitted; None: where it is. The result is where the model was."""
    on_all_processes: bool = False
    """Every process of torch.distributed runs this on the same data, and the first one's fit is everybody's."""
    recorded: Recorded = field(default_factory=Recorded)
    progress: Progress = lambda phase: None
    release: Callable[[Tensor], None] = lambda tensor: None
    """Told of each large weight that has been read or rewritten: its memory may be given back."""

    def begin(self, phase: Phase) -> None:
        """Tell `progress` that a phase begins."""
        self.progress(phase.value)
