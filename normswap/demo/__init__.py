"""A small trained network with its pictures, which needs no download: `normswap convert demo:digits --to gn-ws`."""

from normswap.demo.digits import held_out, make_network, training_pictures
from normswap.demo.network import DigitsNet

__all__ = ["DigitsNet", "held_out", "make_network", "training_pictures"]
