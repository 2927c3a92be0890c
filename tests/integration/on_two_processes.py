"""What each of two processes does, started by torchrun from test_distributed with FOLDER; writes FOLDER/RANK.pt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import normswap

TARGETS = ("gn", "gn-ws", "gn-wn", "ln-ws", "frozen")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(self.stem(x)).mean((2, 3)))
        return y


def trained() -> Net:
    torch.manual_seed(0)
    net = Net()
    for _ in range(20):
        net(torch.randn(16, 3, 12, 12) * 2 + 1)
    return net


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 12, 12, generator=generator), torch.randn(8, 5, generator=generator)


def pictures() -> Tensor:
    """Calibration data whose halves differ."""
    drawn = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    return drawn * 2 + 1 + torch.linspace(-1, 1, 64).view(-1, 1, 1, 1)


def one_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def full(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, wherever its parts are."""
    gathered = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in get_model_state_dict(model).items()}
    return {name: value.detach().clone() for name, value in gathered.items()}


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model.stem)
    fully_shard(model.block)
    return fully_shard(model)


def on_meta(target: str, folder: Path) -> dict[str, Tensor]:
    """Converted without memory, sharded, and filled from a converted distributed checkpoint."""
    with torch.device("meta"):
        fresh = Net()
    model = sharded(normswap.convert(fresh, target).model)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder / f"converted.{target}")
    set_model_state_dict(model, state)
    return full(model)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), dict[str, Any]()
    x, y = (part.chunk(2)[rank] for part in data())
    for target in TARGETS:
        model = DistributedDataParallel(normswap.convert(trained(), target).model)
        one_step(model, x, y)
        found[f"ddp {target}"] = full(model.module)
        model = sharded(normswap.convert(trained(), target).model)
        one_step(model, x, y)
        found[f"fsdp {target}"] = full(model)
        found[f"meta {target}"] = on_meta(target, folder)
    samples = TensorDataset(pictures())
    loader = DataLoader(samples, batch_size=8, sampler=DistributedSampler(samples, shuffle=False))
    for target in ("gn", "bn"):
        source = normswap.convert(trained(), "gn", groups=2).model if target == "bn" else trained()
        found[f"measured {target}"] = normswap.convert(
            source, target, calibrate=loader, calibrate_seconds=0
        ).model.state_dict()
    model, report = normswap.convert(trained(), "gn-ws", ws="strict", calibrate=loader, calibrate_seconds=2)
    found["fitted"], found["report"] = model.state_dict(), report.to_dict()["calibration"]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
