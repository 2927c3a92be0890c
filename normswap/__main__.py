"""`python -m normswap`."""

from normswap.cli.commands import main

main()
