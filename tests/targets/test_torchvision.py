"""Small models of torchvision, one of each way to build a network; tests/integration/zoo has all of them."""

import pytest
from helpers.torchvision_models import check_conversions

NAMES = [
    "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "quantized_resnet18", "mc3_18", "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_conversions(name: str) -> None:
    check_conversions(name)
