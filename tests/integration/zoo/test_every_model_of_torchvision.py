"""Every model of torchvision that has a batch norm."""

from pathlib import Path

import pytest
from helpers.torchvision_models import check_conversions, check_they_load_back_safely, has_batch_norm
from torchvision import models

SLOW = {"regnet_y_128gf"}  # 645M parameters: 8 GB of memory
NAMES = [name for name in models.list_models() if has_batch_norm(name)]


def test_there_are_over_80() -> None:
    assert len(NAMES) > 80


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES])
def test_conversions(name: str) -> None:
    check_conversions(name)


def test_they_load_back_safely(tmp_path: Path) -> None:
    check_they_load_back_safely(models.list_models(), tmp_path)
