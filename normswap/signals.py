"""Ctrl-C, SIGTERM and SIGHUP: they end the command at once, with what was being written removed and no traceback.

Nothing of this touches a program that calls normswap: there, Ctrl-C is Python's KeyboardInterrupt as ever.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # as on Windows
_before_end: list[Callable[[], object]] = []  # of the whole process, as signals are


def before_end(call: Callable[[], object]) -> None:
    """Have `call` called before a signal ends the process."""
    _before_end.append(call)


def end_on_signals() -> None:
    """From now on these signals end the process, with 128 and their number as exit code, as shells have it.

    One that is ignored, as SIGHUP under nohup or SIGINT in a script's background, stays so.
    """
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # No exception: one that passes through torch's C++ or a library's `except` comes out as another, or not at all.
    try:
        for call in _before_end:
            call()
        clear = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # where the progress bar was
        os.write(2, f"{clear}stopped by {signal.Signals(number).name}\n".encode())
    finally:  # even where nobody reads what is said
        os._exit(128 + number)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that a handler in Python answers, as Ctrl-C, wait until the end."""
    came: list[int] = []
    held: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():  # no other thread is interrupted
            for number in _ENDING:
                if callable(signal.getsignal(number)):
                    held[number] = signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
