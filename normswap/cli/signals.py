"""Ctrl-C, SIGTERM and SIGHUP end the command at once, with what was being written removed, and without a traceback."""

import os
import signal
import sys
from types import FrameType

_WRITER = "normswap.checkpoints.atomic_write"


def end_on_signals() -> None:
    """From now on these signals end the process, with 128 and their number as exit code, as shells have it.

    One that is ignored, as SIGHUP under nohup or SIGINT in a script's background, stays so.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # not all are on Windows
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # No exception: one that passes through torch's C++ or a library's `except` comes out as another, or not at all.
    try:
        if writer := sys.modules.get(_WRITER):  # what is not imported has written nothing
            getattr(writer, "remove_temporaries", lambda: None)()
        clear = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # where the progress bar was
        os.write(2, f"{clear}stopped by {signal.Signals(number).name}\n".encode())
    finally:  # even where nobody reads what is said
        os._exit(128 + number)
