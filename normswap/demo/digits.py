"""The demo's files: a residual network, which `tests/bench/train_demo.py` has trained on digits, and its pictures.

The digits are those of scikit-learn: the test set of the UCI Optical Recognition of Handwritten Digits (Alpaydin &
Kaynak 1998), 8×8 pixels of 17 shades.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from normswap.demo.network import DigitsNet

WEIGHTS, PICTURES = (Path(__file__).with_name(f"{name}.safetensors") for name in ("weights", "pictures"))
_WHITE = 16  # the brightest shade


def make_network() -> DigitsNet:
    """The trained network, in eval mode."""
    network = DigitsNet()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def held_out() -> tuple[Tensor, Tensor]:
    """Pictures (N, 1, 8, 8) as the network takes them and their digits (N,), none of which it was trained on."""
    held = load_file(PICTURES)
    return held["held_out"] / _WHITE, held["labels"].long()


def training_pictures() -> Tensor:
    """Some of the pictures (N, 1, 8, 8) that it was trained on, without their digits: to calibrate with."""
    pictures: Tensor = load_file(PICTURES)["training"] / _WHITE
    return pictures
