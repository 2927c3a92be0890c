"""What changed and what was found, as plain data, and how that reads: terminal, page, Markdown, picture, JSON."""
