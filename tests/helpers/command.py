"""The command `normswap`, called in this process."""

from typer.testing import CliRunner, Result

from normswap.cli import commands


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands.app, [str(a) for a in arguments])
