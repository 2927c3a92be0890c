"""The command line. No torch is imported before a command needs it: the help comes at once."""

from normswap.cli.commands import app, main

__all__ = ["app", "main"]
