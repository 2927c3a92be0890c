"""Ctrl-C while something runs that can end early with what it has."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Stop = Callable[[], bool]
"""Whether the user has asked for an early end."""


@contextmanager
def ended_by_ctrl_c() -> Iterator[Stop]:
    """Meanwhile the first Ctrl-C raises nothing: the function that is given says true from then on.

    A second one does what Ctrl-C did before, and so does the first where it cannot be caught: outside of the main
    thread, or where nothing of Python's hears it.
    """
    asked = False
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    try:
        caught = callable(before)
        if caught:
            signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread
        caught = False
    try:
        yield lambda: asked
    finally:
        if caught:
            signal.signal(signal.SIGINT, before)
