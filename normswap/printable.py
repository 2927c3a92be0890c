"""Names out of files, models and arguments are data: how they are shown."""

import re

_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Characters that Python calls printable and no font shows: fillers, joiners, variation selectors (Unicode's
Default_Ignorable_Code_Point), and the empty pattern of Braille."""


def printable(text: str) -> str:
    r"""`text` as one line in which every character can be seen and none acts on what shows it.

    All others are written as Python writes them, `\x1b`, `\u202e`, `\ud800`: control characters of both ranges, those
    that change the direction of text, joiners and spaces without width, line breaks, lone surrogates, private and
    unassigned ones. Every view shows names by way of this function; what its format has in marks of its own (tags,
    backquotes, rich's markup) is the one thing that it escapes itself.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() and not _UNSEEN.match(c) else ascii(c)[1:-1] for c in text)
