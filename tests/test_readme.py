"""Every command and every code block of the README, and of the pages beside the code, runs, in its order."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import run
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import normswap
from normswap.files import model_specs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("normswap/*/README.md"))]
NET = """
from torch import nn
from torchvision.models import resnet18


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


def make_model():
    return resnet18(num_classes=10)
"""


def prepare(folder: Path) -> dict[str, Any]:
    """The files that the README speaks of, and the names that its Python has."""
    (folder / "net.py").write_text(NET)
    (folder / "pictures").mkdir()
    for index in range(4):
        Image.effect_noise((50, 40), 90).convert("RGB").save(folder / "pictures" / f"{index}.png")
    model = model_specs.build("torchvision:resnet18", arguments={"num_classes": 10})
    torch.save(model, folder / "model.pt")
    sys.modules.pop("net", None)
    sys.path.insert(0, str(folder))
    torch.save(importlib.import_module("net").Net().eval(), folder / "own.pt")
    sys.path.remove(str(folder))
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "last.ckpt")
    save_file(
        model_specs.build("torchvision:resnet50", arguments={"num_classes": 10}).state_dict(),
        folder / "weights.safetensors",
    )
    torch.save(nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.LSTM(8, 16)), folder / "reader.pt")
    net = model_specs.build("torchvision:resnet18")
    names: dict[str, Any] = {"model": model, "net": net, "torch": torch, "normswap": normswap}
    exec(NET, names)
    return names


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each block of code."""
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(block[1], block[2]) for block in found]


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = prepare(tmp_path)
    # The first of all is the two commands that install: `.ci/run` runs them.
    for language, block in blocks(page)[page == ROOT / "README.md" :]:
        if language == "python":
            exec(compile(block, str(page), "exec"), names)
            continue
        assert language == "sh"
        for words in commands(block):
            assert words[0] == "normswap", words
            done = run(*words[1:])
            if "--weights" in words and done.exit_code == 1:  # as far as the download, where there is no network
                assert "cannot be fetched" in done.stderr
                continue
            assert done.exit_code == 0 and done.stderr == "", (words, done.stderr)


def test_the_tables_name_every_target() -> None:
    text = (ROOT / "normswap" / "targets" / "README.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert named == {part for target in normswap.TARGETS for part in target.split("-")}


def headings(page: Path) -> set[str]:
    """The names that a page's headings have in links."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_links_lead_to_files_and_headings() -> None:
    others = [ROOT / "tests" / name / "README.md" for name in ("bench", "integration")]
    for page in (*PAGES, *others, *ROOT.glob(".github/*.md")):
        for link, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
            if link.startswith(("https://", "../../security")):
                continue
            target = page.parent / link if link else page
            assert target.exists() and (not heading or heading in headings(target)), (page, link, heading)


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
