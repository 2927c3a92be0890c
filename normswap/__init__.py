"""Swap the normalization of a trained PyTorch model, and keep the trained function.

model, report = normswap.convert(model, "gn-ws")
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normswap.conversion.convert import Conversion, convert, fold
    from normswap.diff import diff
    from normswap.errors import FileError, ModelError, NormswapError, OptionError, UnsafeFileError
    from normswap.files import convert_file, load, save
    from normswap.inspect import inspect
    from normswap.report.inspection import Inspection
    from normswap.report.report import Report
    from normswap.targets.target import TARGETS
    from normswap.training.opacus import register_opacus
    from normswap.training.optimizers import param_groups, remap_optimizer

_HOMES = {
    "Conversion": "conversion.convert",
    "convert": "conversion.convert",
    "fold": "conversion.convert",
    "diff": "diff",
    "FileError": "errors",
    "ModelError": "errors",
    "NormswapError": "errors",
    "OptionError": "errors",
    "UnsafeFileError": "errors",
    "convert_file": "files",
    "load": "files",
    "save": "files",
    "inspect": "inspect",
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


class _Package(types.ModuleType):
    """Public names are imported when they are asked for: `normswap --help` does without torch, which takes seconds."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (
            name in _HOMES and isinstance(value, types.ModuleType)
        ):  # the file `convert` is not to hide the function
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
