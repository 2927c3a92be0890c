"""Words that readers stumbled over stay out of all that the package prints and explains."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = {
    path: path.read_text(encoding="utf-8")
    for folder in ("normswap", "tests/bench", ".github", ".")
    for pattern in ("*.py", "*.md", "*.html")
    for path in (ROOT.glob(pattern) if folder == "." else (ROOT / folder).rglob(pattern))
}


@pytest.mark.parametrize(
    "words",
    [
        "what feeds what",
        "the norm behind",
        "no weights of this kind",
        "give it one again",
        "the same by timm's",
        "nor are the sizes of maps",
        "what follows what",
    ],
)
def test_no_words_that_readers_did_not_understand(words: str) -> None:
    spaced = re.compile(r"\s+".join(map(re.escape, words.split())), re.IGNORECASE)  # over the end of a line too
    assert len(TEXTS) > 100
    assert not [str(path) for path, text in TEXTS.items() if spaced.search(text)]
