"""The progress bar: which phase a run is in, on stderr where a person watches."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from normswap.printable import printable

_SECONDS_BEFORE_BAR = 1.0  # a run that is shorter needs no bar


@contextmanager
def show_progress(phases: int, silent: bool) -> Iterator[Callable[[str], None]]:
    """Give a function to call with the name of each phase as it starts; a bar shows it where the run is not short.

    Args:
        phases: how many names will come: the length of the bar. One that ends in a share (`: 40%`) goes on with the
            phase before.
        silent: show nothing, as where stderr is no terminal.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=silent or not console.is_terminal)
    task = bar.add_task("starting", total=phases)
    later = threading.Timer(_SECONDS_BEFORE_BAR, bar.start)  # on a thread: a first phase that is long has a bar too
    later.daemon = True

    def start_phase(name: str) -> None:
        new = re.search(r": \d+%$", name) is None
        # Refreshed at once: the shortest phase shows too.
        bar.update(task, description=printable(name), advance=int(new), refresh=new)

    if not bar.disable:
        later.start()
    try:
        yield start_phase
    finally:
        later.cancel()
        bar.stop()
