"""The command line. No torch is imported before a command needs it: the help comes at once."""

from normswap.signals import end_on_signals

__all__ = ["main"]


def main() -> None:
    """The command `normswap`."""
    end_on_signals()  # before anything that takes time
    from normswap.cli import commands

    commands.main()
