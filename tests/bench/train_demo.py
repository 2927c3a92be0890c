"""Train the network of `demo:digits` and write it, with its pictures, into the package.

Run: python tests/bench/train_demo.py [--epochs 10] [--folder normswap/demo]; two minutes on one core. The same versions
of torch on the same machine give the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from normswap import demo

HELD_OUT, WITHOUT_LABELS = 397, 512
RATE, BATCH, SEED = 5e-3, 50, 0


def split_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures (N, 1, 8, 8) of values from 0 to 16 with their digits, to train on and held out."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(SEED))
    pictures, labels = torch.tensor(data.images, dtype=torch.uint8)[order, None], torch.tensor(data.target)[order]
    return pictures[HELD_OUT:], labels[HELD_OUT:], pictures[:HELD_OUT], labels[:HELD_OUT]


def train(network: demo.DigitsNet, pictures: Tensor, labels: Tensor, epochs: int) -> None:
    """With AdamW and a one-cycle rate, on pictures that are moved by up to a pixel."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)
    steps = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps)
    network.train()
    for _ in range(epochs):
        for part in torch.randperm(len(labels), generator=generator)[: steps * BATCH].split(BATCH):
            moved = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = F.cross_entropy(network(pictures[part].roll(moved, (2, 3))), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def main(epochs: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    pictures, labels, held_out, held_out_labels = split_digits()
    network = demo.DigitsNet()
    train(network, pictures / 16, labels, epochs)
    save_file(network.state_dict(), folder / "weights.safetensors", {"format": "pt"})
    stored = {"held_out": held_out, "labels": held_out_labels.byte(), "training": pictures[:WITHOUT_LABELS]}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "pictures.safetensors")
    with torch.no_grad():
        right = network.eval()(held_out / 16).argmax(1) == held_out_labels
    print(f"{right.double().mean().item():.1%} of {HELD_OUT} held-out digits")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path(demo.__file__).parent)
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.folder)
