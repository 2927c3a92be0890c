"""Writes `layers.pt` and `outputs.pt`: modules of every layer class, and what they give, by the installed version.

The files beside this script are those of the last commit before the code moved into packages. Files that users have
saved name classes by their old places (`normswap.weights`, `normswap.recurrent`), and have to load for good: do not
make them anew; make others, with another name, when the places change again.

    python tests/layers/saved/make.py FOLDER
"""

import sys
from pathlib import Path

import torch
from timm.layers import BatchNormAct2d
from torch import nn

import normswap

CHANNELS = 8


def made() -> nn.ModuleDict:
    """A small converted net for each target, recurrent layers, and a norm of timm's, in eval mode."""
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {}
    for target in normswap.TARGETS:
        if target.startswith("bn"):
            continue
        net = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(),
            nn.ConvTranspose2d(CHANNELS, CHANNELS, 2),
            nn.BatchNorm2d(CHANNELS),
        )
        for norm in (net[1], net[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.num_batches_tracked.fill_(7)
        models[target] = normswap.convert(net.eval(), target).model
    for target in ("frozen", "est", "bcn", "gn"):
        act = BatchNormAct2d(3)
        act.running_mean.normal_()
        act.num_batches_tracked.fill_(7)
        models[f"act-{target}"] = normswap.convert(nn.Sequential(act).eval(), target).model
    for plain in (nn.LSTM, nn.GRU, nn.RNN):
        for target in ("ws", "wn"):
            models[f"{plain.__name__}-{target}"] = normswap.convert(
                plain(3, CHANNELS).eval(), target, layers=("rnn",)
            ).model
    for plain in (nn.LSTM, nn.GRU):
        models[f"{plain.__name__}-ln"] = normswap.convert(
            plain(3, CHANNELS).eval(), "ws", layers=("conv",), recurrent="ln"
        ).model
    for target in ("ws", "wn"):
        net = nn.Sequential(nn.Linear(3, CHANNELS), nn.BatchNorm1d(CHANNELS)).eval()
        models[f"linear-{target}"] = normswap.convert(net, target, layers=("linear",)).model
    return nn.ModuleDict(models)


def inputs(name: str) -> torch.Tensor:
    """What the model called `name` takes: pictures, steps of a sequence, or rows."""
    shape = (
        (4, 2, 3) if name.startswith(("LSTM", "GRU", "RNN")) else (4, 3) if name.startswith("linear") else (2, 3, 6, 6)
    )
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


def outputs(models: nn.ModuleDict) -> dict[str, torch.Tensor]:
    """The first output of each model."""
    with torch.no_grad():
        found = {name: model(inputs(name)) for name, model in models.items()}
    return {name: value[0] if isinstance(value, tuple) else value for name, value in found.items()}


if __name__ == "__main__":
    folder, models = Path(sys.argv[1]), made()
    torch.save(models, folder / "layers.pt")
    torch.save(outputs(models), folder / "outputs.pt")
