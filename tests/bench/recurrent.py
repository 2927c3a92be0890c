"""LSTM and GRU with layer normalization inside: their speed, and accuracy right after conversion, before any training.

Run: python tests/bench/recurrent.py [--json] [--threads 1] [--rounds 7]; under two minutes. Speed: milliseconds of
forward and backward over 50 steps, and how many times as long that takes as a loop over torch's own cell, as such a
loop with layer norms pasted in, and as torch's fused layer, which has none; the rounds of all four alternate, and their
median counts. Accuracy: nets trained on scikit-learn's digits, read as eight rows of eight, the mean over two seeds:
before, with gain 1, started without data and started from 256 training images. "mean 1": the same images, moved so that
their mean is far from the assumed 0.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Row, main
from digits import accuracy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.recurrent_matching import layer_normalized, measured_moments

STEPS, HELD_OUT, EPOCHS, UNITS = 50, 397, 20, 64
CELLS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}

# ---- speed ----


class PastedLSTM(nn.LSTMCell):
    """What one would write: layer norms pasted into torch's cell."""

    def __init__(self, size: int):
        super().__init__(size, size)
        self.norm_ih, self.norm_hh, self.norm_c = nn.LayerNorm(4 * size), nn.LayerNorm(4 * size), nn.LayerNorm(size)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        gates = self.norm_ih(F.linear(x, self.weight_ih)) + self.norm_hh(F.linear(h, self.weight_hh))
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.norm_c(c).tanh(), c


class PastedGRU(nn.GRUCell):
    """What one would write: layer norms pasted into torch's cell."""

    def __init__(self, size: int):
        super().__init__(size, size)
        self.gates_ih, self.gates_hh = nn.LayerNorm(2 * size), nn.LayerNorm(2 * size)
        self.new_ih, self.new_hh = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        size = self.hidden_size
        from_x, from_h = F.linear(x, self.weight_ih), F.linear(h, self.weight_hh)
        gates = self.gates_ih(from_x[:, : 2 * size]) + self.gates_hh(from_h[:, : 2 * size])
        r, z = gates.sigmoid().chunk(2, 1)
        n = (self.new_ih(from_x[:, 2 * size :]) + r * self.new_hh(from_h[:, 2 * size :])).tanh()
        return (1 - z) * n + z * h


def loop(cell: nn.Module, x: Tensor) -> Tensor:
    zeros = x.new_zeros(x.shape[1], x.shape[2])
    state: Any = (zeros, zeros) if isinstance(cell, nn.LSTMCell) else zeros
    outputs = []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs)


def milliseconds(run: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    run().sum().backward()
    return (time.perf_counter() - begin) * 1e3


def speed(rounds: int) -> Iterator[Row]:
    for plain, pasted in ((nn.LSTM, PastedLSTM), (nn.GRU, PastedGRU)):
        for size in (128, 512):
            for batch in (1, 16):
                x = torch.randn(STEPS, batch, size)
                fused, cell, loose = plain(size, size), CELLS[plain](size, size), pasted(size)
                ours = LAYER_NORMALIZED[plain](size, size)
                runs: list[Callable[[], Tensor]] = [
                    lambda ours=ours, x=x: ours(x)[0],
                    lambda cell=cell, x=x: loop(cell, x),
                    lambda loose=loose, x=x: loop(loose, x),
                    lambda fused=fused, x=x: fused(x)[0],
                ]
                times = list(zip(*([milliseconds(run) for run in runs] for _ in range(rounds + 1)), strict=True))
                mine, own, norms, whole = (statistics.median(t[1:]) for t in times)  # the first round warms up
                yield {
                    "what": f"{plain.__name__}, {size} units, batch {batch}", "ms": mine,
                    "× cell loop": mine / own, "× with norms": mine / norms, f"× nn.{plain.__name__}": mine / whole,
                }  # fmt: skip


# ---- accuracy ----


class Reader(nn.Module):
    """Reads a digit row by row."""

    def __init__(self, plain: type[nn.Module], **options: Any):
        super().__init__()
        self.rnn = plain(8, UNITS, batch_first=True, **options)
        self.head = nn.Linear(UNITS * (1 + self.rnn.bidirectional), 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def trained(net: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    steps = EPOCHS * (len(labels) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(labels))[: len(labels) // 50 * 50].split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def converted(net: Any, **how: Any) -> nn.Module:
    other = copy.deepcopy(net)
    other.rnn, writes = layer_normalized(other.rnn, **how)
    with torch.no_grad():
        for tensor, value in writes:
            tensor.copy_(value)
    return other


def kept() -> Iterator[Row]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(data.images, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    images = (images - images.mean()) / images.std()
    nets: list[tuple[str, type[nn.Module], dict[str, Any], float]] = [
        ("LSTM", nn.LSTM, {}, 0.0), ("LSTM, 2 layers", nn.LSTM, {"num_layers": 2}, 0.0),
        ("LSTM, 2 layers, both ways", nn.LSTM, {"num_layers": 2, "bidirectional": True}, 0.0),
        ("LSTM, no bias", nn.LSTM, {"bias": False}, 0.0), ("LSTM, mean 1", nn.LSTM, {}, 1.0),
        ("GRU", nn.GRU, {}, 0.0), ("GRU, 2 layers", nn.GRU, {"num_layers": 2}, 0.0),
        ("GRU, no bias", nn.GRU, {"bias": False}, 0.0), ("GRU, mean 1", nn.GRU, {}, 1.0),
    ]  # fmt: skip
    for name, plain, options, mean in nets:
        x, scores = images + mean, []
        for seed in (0, 1):
            torch.manual_seed(seed)
            net: Any = trained(Reader(plain, **options), x[HELD_OUT:], labels[HELD_OUT:])
            moments = measured_moments(net.rnn, x[HELD_OUT:][:256])
            models = (net, converted(net, transfer="reset"), converted(net), converted(net, moments=moments))
            scores.append([accuracy(model, x[:HELD_OUT], labels[:HELD_OUT]) for model in models])
        columns = ("before", "gain 1", "no data", "measured")
        means = zip(columns, zip(*scores, strict=True), strict=True)
        yield {"what": name, **{column: f"{statistics.mean(values):.1%}" for column, values in means}}


def measure_all(arguments: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(arguments.threads)
    columns = (
        "what",
        "ms",
        "× cell loop",
        "× with norms",
        "× nn.LSTM",
        "× nn.GRU",
        "before",
        "gain 1",
        "no data",
        "measured",
    )
    for row in (*speed(arguments.rounds), *kept()):
        yield {column: row.get(column, "") for column in columns}


if __name__ == "__main__":
    main(__doc__, measure_all, threads=1, rounds=7)
