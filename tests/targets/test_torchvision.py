"""Small models of torchvision, one of each way to build a network; tests/integration/zoo has all of them."""

import pytest
from helpers.torchvision_models import SMALL_MODELS, check_conversions


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_conversions(name: str) -> None:
    check_conversions(name)
