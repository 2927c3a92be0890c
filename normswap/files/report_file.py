"""The files of a report: `--report FILE`, checked before any work, written beside the model and named with it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import methodcaller
from pathlib import Path

from normswap.checkpoints import atomic_write
from normswap.errors import OptionError
from normswap.report.formats import REPORT_FORMATS
from normswap.report.inspection import Inspection
from normswap.report.report import Report


def check_report_files(files: Sequence[Path], overwrite: bool) -> None:
    """Raise `OptionError` or `FileError` where a report cannot be written to one of `files`."""
    for path in files:
        if path.suffix.lower() not in REPORT_FORMATS:
            raise OptionError(f"--report {path}: give a name that ends in one of {', '.join(REPORT_FORMATS)}")
        atomic_write.check_writable(path, overwrite, folder=False)


@contextmanager
def stage_report_files(
    report: Report | Inspection, source: str, files: Sequence[Path], overwrite: bool
) -> Iterator[list[atomic_write.Staged]]:
    """Write the report on a conversion of `source` to temporary files, in the formats that the endings of `files` name.

    Raises `FileError`; nothing is written then.
    """
    texts = [REPORT_FORMATS[path.suffix.lower()](report, source).encode("utf-8") for path in files]
    with ExitStack() as stack:
        yield [
            stack.enter_context(atomic_write.stage_file(path, methodcaller("write", text), overwrite=overwrite))
            for path, text in zip(files, texts, strict=True)
        ]


def write_report_files(report: Report | Inspection, source: str, files: Sequence[Path], overwrite: bool) -> None:
    """Write the report to `files`: to all of them, or to none."""
    with stage_report_files(report, source, files, overwrite) as staged:
        atomic_write.give_names(staged)
