"""A part of a model that was traced, and what the nodes of its graphs stand for."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import fx, nn

from normswap.analysis import operations
from normswap.analysis.sites import Site


class TracedPart(NamedTuple):
    """A module of the model that was traced, and what is known of it."""

    modules: Mapping[str, nn.Module]
    """It and all modules in it, by each of their paths in it."""
    path: str
    """Where it stands in the model."""
    sites: Mapping[str, Site]
    """All sites of the model, by each of their paths."""
    hooked: frozenset[int]
    """The ids of modules with hooks, which may do anything to a value."""
    holders: Mapping[str, frozenset[str]]
    """By each of the paths of a layer that runs norms behind itself: these, by their first path."""

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def site(self, path: str) -> Site | None:
        """The site at a path below the module."""
        return self.sites.get(self._in_model(path))

    def site_of(self, node: fx.Node) -> Site | None:
        """The site whose own work a node is: a module that runs nothing behind that, or the call in one that does."""
        if node.op == "call_module":
            path = self._in_model(str(node.target))
            return None if path in self.holders else self.sites.get(path)
        return self.site("") if self.is_own_call(node) else None

    def norms_in(self, node: fx.Node) -> frozenset[str]:
        """The norms that run in a call of the layer that holds them."""
        if node.op != "call_module" or not self.holders:
            return frozenset()
        return self.holders.get(self._in_model(str(node.target)), frozenset())

    def is_own_call(self, node: fx.Node) -> bool:
        """Whether a node is the convolution or linear map of a layer that is traced since it holds norms."""
        return self.path in self.holders and node.target is operations.function_of(self.modules[""])

    def _in_model(self, path: str) -> str:
        """The path in the model of what stands at a path below the module."""
        return f"{self.path}.{path}".strip(".") if self.path else path
