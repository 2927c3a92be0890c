"""Where files that were saved by version 0.1 look for layer classes. Nothing else belongs here; see `normswap.layers`."""

from normswap.layers import *  # noqa: F403
