"""The options of a conversion, checked on their own: what a user may ask of a target."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from normswap.analysis.selection import Pattern
from normswap.errors import OptionError
from normswap.layers.reparametrized import LAYERS
from normswap.target_table import RECURRENT_FORMS

Transfer = Literal["match", "copy", "reset"]
WeightStart = Literal["preserve", "strict"]
WeightScope = Literal["normed", "all"]
GroupRule = Literal["auto", "groups", "channels"]
Purpose = Literal["training", "use"]


@dataclass(frozen=True)
class Options:
    """The options of `normswap.convert`, which describes each. Raises `OptionError` for an impossible value."""

    groups: str | int = "auto"
    purpose: Purpose = "training"
    transfer: Transfer = "match"
    ws: WeightStart = "preserve"
    ws_scope: WeightScope = "normed"
    layers: Sequence[str] = ("conv",)
    recurrent: str | None = None
    include: Pattern = None
    exclude: Pattern = None
    calibrate: Any = None
    """Batches as the model takes them, or None."""
    calibrate_seconds: float = 60.0

    def __post_init__(self) -> None:
        parse_groups(self.groups)
        rules = {"purpose": Purpose, "transfer": Transfer, "ws": WeightStart, "ws_scope": WeightScope}
        for name, choices in rules.items():
            if getattr(self, name) not in get_args(choices):
                raise OptionError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(get_args(choices))}")
        if self.recurrent is not None and self.recurrent not in RECURRENT_FORMS:
            raise OptionError(f"recurrent: {self.recurrent!r} is not one of {', '.join(RECURRENT_FORMS)}")
        if isinstance(self.layers, str) or not self.layers or not set(self.layers) <= set(LAYERS):
            raise OptionError(f"layers: {self.layers!r} is not possible; give some of {', '.join(LAYERS)}")
        seconds = self.calibrate_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
            raise OptionError(f"calibrate_seconds: {seconds!r} is not a time; give seconds, or 0 for no fit")

    @property
    def shrinks(self) -> bool:
        """Whether group norms go half by a sample's variance and half by the data's: for use, and on data, where the
        function is what counts.
        """
        kept = self.purpose == "use" or self.calibrate is not None
        return kept and self.transfer == "match" and str(self.groups).strip() == "auto"


def parse_groups(groups: str | int) -> tuple[GroupRule, int]:
    """("auto", 0), ("groups", 32) or ("channels", 16) for `auto`, `32`, `16c`."""
    text = str(groups).strip()
    if text == "auto":
        return "auto", 0
    match = re.fullmatch(r"([0-9]{1,9})(c?)", text)
    if match is None or int(match[1]) < 1 or isinstance(groups, bool):
        raise OptionError(
            f"groups: {groups!r} is not possible; give auto, a number of groups from 1 (32), or channels a group (16c)"
        )
    return ("channels" if match[2] else "groups"), int(match[1])
