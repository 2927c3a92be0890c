"""Swap the normalization of a trained PyTorch model, and keep the trained function.

model, report = normswap.convert(model, "gn-ws")
"""

import importlib
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
    "Conversion": "conversion.pipeline",
    "convert": "conversion.convert",
    "fold": "conversion.convert",
    "diff": "files.diff",
    "FileError": "errors",
    "ModelError": "errors",
    "NormswapError": "errors",
    "OptionError": "errors",
    "UnsafeFileError": "errors",
    "convert_file": "files.convert_file",
    "load": "files.load_save",
    "save": "files.load_save",
    "inspect": "inspection.examine",
    "Inspection": "report.inspection",
    "Report": "report.report",
    "TARGETS": "targets.target",
    "register_opacus": "training.opacus",
    "param_groups": "training.optimizers",
    "remap_optimizer": "training.optimizers",
}

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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
