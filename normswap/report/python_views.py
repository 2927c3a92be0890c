"""How reports and inspections show themselves in Python: as text, and as a page in a notebook."""

import html
import importlib
import io
from typing import Any

from rich.console import Console

_TEXT_WIDTH = 100  # characters


def views(name: str) -> Any:
    """A module of this package that shows reports: all of them import what they show."""
    return importlib.import_module(f"normswap.report.{name}")


def as_text(view: Any) -> str:
    """What a terminal would show of a view, without colours."""
    console = Console(file=io.StringIO(), width=_TEXT_WIDTH)
    with console.capture() as shown:
        console.print(view)
    return shown.get()


def in_frame(found: Any) -> str:
    """The page of a report or an inspection in a frame of its own, so that its style stays there."""
    page = html.escape(views("formats").to_html(found, "model"))
    return f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'
