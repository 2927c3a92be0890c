"""Swap the normalization of a trained PyTorch model, and keep the trained function.

model, report = normswap.convert(model, "gn-ws")
"""

from normswap.convert import Conversion, convert, fold
from normswap.diff import diff
from normswap.errors import FileError, ModelError, NormswapError, OptionError, UnsafeFileError
from normswap.files import convert_file, load, save
from normswap.inspect import inspect
from normswap.inspection import Inspection
from normswap.report import Report
from normswap.targets import TARGETS

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
    "save",
]
