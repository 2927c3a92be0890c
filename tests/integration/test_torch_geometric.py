"""Graph networks of torch_geometric, whose norms are wrappers that hold torch's."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import distance
from helpers.nets import randomize
from torch import Tensor, nn

import normswap

graphs = pytest.importorskip("torch_geometric.nn")

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EDGES = torch.tensor([[*range(12)], [*range(1, 12), 0]])


class Points(nn.Module):
    """Linear layers, each with torch_geometric's BatchNorm behind it, between two convolutions on a graph."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.first, self.last = graphs.GCNConv(6, 16), graphs.SAGEConv(8, 3)
        self.norm = graphs.BatchNorm(16)
        self.line, self.after = nn.Linear(16, 8), graphs.BatchNorm(8, **options)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.norm(self.first(x, edges)).relu()
        return self.last(self.after(self.line(x)).relu(), edges)


def points(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Points(**options)).double().eval()


@pytest.mark.parametrize("target", ["gn", "ln", "est", "frozen"])
def test_norms_in_wrappers(target: str) -> None:
    model = points()
    converted, report = normswap.convert(model, target, example_inputs=(X, EDGES))
    changed = {change.paths[0] for change in report.changes if change.kind == "norm"}
    assert changed == {"norm.module", "after.module"}
    assert target in ("gn", "ln") or distance(model(X, EDGES), converted(X, EDGES)) < 1e-12
    converted.train()(X, EDGES).sum().backward()


def test_a_block_without_a_graph_folds_through_the_wrapper() -> None:
    model = points()
    model.line = nn.Sequential(nn.Linear(16, 8), graphs.BatchNorm(8), nn.ReLU(), nn.Linear(8, 8))
    model = randomize(model).double().eval()
    converted, report = normswap.convert(model, "fold", example_inputs=(X, EDGES))
    assert {change.paths[0] for change in report.changes if change.kind == "norm"} == {"line.1.module"}
    assert distance(model(X, EDGES), converted(X, EDGES)) < 1e-12


def test_a_wrapper_that_reads_the_statistics_keeps_its_norm() -> None:
    converted, report = normswap.convert(points(allow_single_element=True), "gn")
    assert isinstance(converted.after.module, nn.BatchNorm1d) and isinstance(converted.norm.module, nn.GroupNorm)
    (left,) = [entry for entry in report.left if entry.kind == "norm" and entry.path == "after.module"]
    assert "reads directly" in left.reason
    converted.eval()(X[:1], torch.tensor([[0], [0]]))


@pytest.mark.parametrize("name", ["GCN", "GraphSAGE", "GIN", "GAT"])
def test_whole_networks(name: str) -> None:
    torch.manual_seed(0)
    model = randomize(getattr(graphs, name)(6, 16, 3, out_channels=4, norm="batch_norm")).double().eval()
    frozen, report = normswap.convert(model, "frozen")
    assert report.exact and not [m for m in frozen.modules() if isinstance(m, nn.BatchNorm1d)]
    assert distance(model(X, EDGES), frozen(X, EDGES)) < 1e-12
    grouped = normswap.convert(model, "gn").model.train()
    grouped(X[:1], torch.tensor([[0], [0]])).sum().backward()  # one node, which batch norm refuses


@pytest.mark.parametrize("name", ["InstanceNorm", "LayerNorm", "GraphNorm"])
def test_norms_over_a_graph_are_named(name: str) -> None:
    """Their statistics are those of each graph of a batch, which no norm of torch takes."""
    model = nn.Sequential(nn.Linear(6, 8), getattr(graphs, name)(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    left = {entry.path: entry.reason for entry in normswap.convert(model, "gn").report.left}
    assert name in left["1"]
