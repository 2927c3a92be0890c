"""Names that would act on what shows them: terminals, browsers, rich, Markdown renderers, readers of XML and JSON."""

NAMES = [
    # terminals: escapes, both ranges of control characters, the direction of text, no width, line breaks
    "\x1b[2J\x1b]0;pwn\x07", "\x9b31m", "\x00", "\x7f", "a\rb", "\x08", "a\nb", "a\r\n# b", "\t", "\u2028", "\x85",
    "\u202eevil", "\u2066x\u2069", "a\u200bb", "\ufeff", "\u200d", "\u3164", "\u034f", "\ufe0f", "\U000e0001", "\xad",
    # no valid Unicode; two halves that are no character together
    "\ud800", "a\udfffb", "\ud83d\ude00", "\udcff",
    # rich
    "[red]x[/red]", "[/]", "[link=http://e]x[/link]", ":key:", "a:smiley:b", "{task.description}", "{0}", "%s", "50%",
    # Markdown
    "`", "``x`", "`` ` ``", "a|b", "a\\|b", "a\\\\|b", "\\", "a\\", "a`![x](http://e/x)`", "![x](http://e)", "|", "---",
    "[x](javascript:alert(1))", "[x]: http://e", "http://e.org/x", "www.e.org", "@team", "#1", "**b**", "_x_", "~~s~~",
    "1. x", "12) x", "- x", "+ x", "* x", "> x", "# x", "    x", " x ", "===", "```", "~~~", "$a$", "x\\", "<http://e>",
    # HTML, XML and the page's template
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a`<img src=x>`", "&lt;", "&#0;", "]]>", "<!--", "-->",
    "</details>", "'\"", '" onclick="x', "${title}", "$summary", "@font-face { } }", "\ufffe", "</td></tr>",
    # folding names into patterns: numbers that Python's int() takes otherwise than it writes them, or not at all
    "#", "a#", "a1", "a2", "²", "٣", "007", "0", "9" * 5000, "a" + "1" * 400, "a." * 3000, ".", "..", " ", "x" * 3000,
    # harmless, and to be seen as they are
    "é", "日本語", "layer1", "C:\\x", "a b",
]  # fmt: skip
