"""Where files that version 0.1 saved look for layer classes; nothing else belongs here. See `normswap.layers`."""

from normswap.layers import *  # noqa: F403
