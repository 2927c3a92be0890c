"""Swap the normalization of a trained PyTorch model, and keep the trained function.

model, report = normswap.convert(model, "gn-ws")
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normswap.conversion.convert import convert, fold
    from normswap.conversion.pipeline import Conversion
    from normswap.errors import FileError, ModelError, NormswapError, OptionError, UnsafeFileError
    from normswap.files.convert_file import convert_file
    from normswap.files.diff import diff
    from normswap.files.load_save import load, save
    from normswap.inspection.examine import inspect
    from normswap.report.inspection import Inspection
    from normswap.report.report import Report
    from normswap.targets.target import TARGETS
    from normswap.training.opacus import register_opacus
    from normswap.training.optimizers import param_groups, remap_optimizer

_HOMES = {
    "conversion.pipeline": "Conversion",
    "conversion.convert": "convert fold",
    "files.diff": "diff",
    "errors": "FileError ModelError NormswapError OptionError UnsafeFileError",
    "files.convert_file": "convert_file",
    "files.load_save": "load save",
    "inspection.examine": "inspect",
    "report.inspection": "Inspection",
    "report.report": "Report",
    "targets.target": "TARGETS",
    "training.opacus": "register_opacus",
    "training.optimizers": "param_groups remap_optimizer",
}
"""The public names by the module that has them."""

__all__ = [
    "TARGETS",
    "Conversion",
    "FileError",
    "Inspection",
    "ModelError",
    "NormswapError",
    "OptionError",
    "Report",
    "UnsafeFileError",
    "__version__",
    "convert",
    "convert_file",
    "diff",
    "fold",
    "inspect",
    "load",
    "param_groups",
    "register_opacus",
    "remap_optimizer",
    "save",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are asked for: `normswap --help` does without torch, which takes seconds."""
    if name == "__version__":
        return importlib.metadata.version(__name__)
    home = next((home for home, names in _HOMES.items() if name in names.split()), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
