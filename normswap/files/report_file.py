"""The file of a report: `--report FILE`, checked before any work and written after it."""

from pathlib import Path

from normswap.checkpoints import atomic_write
from normswap.errors import OptionError
from normswap.report.formats import REPORT_FORMATS
from normswap.report.report import Report


def check_report_file(path: Path | None, overwrite: bool) -> None:
    """Raise `OptionError` or `FileError` where no report can be written to `path`; None: none is asked for."""
    if path is None:
        return
    if path.suffix.lower() not in REPORT_FORMATS:
        raise OptionError(f"--report {path}: give a name that ends in one of {', '.join(REPORT_FORMATS)}")
    atomic_write.check_writable(path, overwrite)


def write_report_file(report: Report, source: str, path: Path | None, overwrite: bool) -> None:
    """Write the report on a conversion of `source`, in the format that the ending of `path` names; with None, nothing.

    Raises `FileError`; nothing is written then.
    """
    if path is None:
        return
    text = REPORT_FORMATS[path.suffix.lower()](report, source)
    atomic_write.write_file(path, lambda file: file.write(text.encode("utf-8")), overwrite=overwrite)
