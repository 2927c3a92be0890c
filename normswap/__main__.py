"""`python -m normswap`."""

from normswap.cli import main

main()
