"""Read-only: what feeds what in a model, as far as its parts can be traced."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from torch import nn

from normswap.analysis.bytecode import reaches_into
from normswap.analysis.copies import skeleton
from normswap.analysis.flow import Flow
from normswap.analysis.graph_reader import GraphReader, TracedPart
from normswap.analysis.sites import Site
from normswap.analysis.tracing import trace


def find_flow(model: nn.Module, sites: Sequence[Site]) -> Flow:
    """Trace `model`, or its largest parts that can be traced, and read off what feeds what."""
    by_path = {path: site for site in sites for path in site.paths}
    try:
        bones = skeleton(model)
    except Exception as error:  # an attribute of the model that cannot be copied: no dataflow, and the report says so
        return Flow(problems={"": f"cannot be copied for tracing: {error}"})
    copies = dict(bones.named_modules(remove_duplicate=False))
    hooked = frozenset(
        id(copies[path])
        for path, module in model.named_modules(remove_duplicate=False)
        if path and (module._forward_hooks or module._forward_pre_hooks)
    )
    leaves = hooked | {id(copies[path]) for path in by_path}  # what hooks do to a value is not in any forward
    below = _sites_below(by_path)
    flow = Flow()
    doubted: set[str] = set()  # sites that a forward which could not be traced may use by itself
    pending = [("", bones)]
    while pending:
        path, module = pending.pop()
        if path in by_path or (path and below[path] <= flow.complete):
            continue
        if type(module) is nn.MultiheadAttention:  # known, and has more branches than can be followed
            flow.touched |= below[path]
            continue
        # A trace of a part knows less than one of the whole: none is made where that told anything of the part.
        if not below[path] & flow.complete and type(module).forward is not nn.Module.forward:
            traced = trace(module, lambda m: id(m) in leaves)
            if traced.problem:
                flow.problems[path] = traced.problem
                doubted.update(_reached_into(module, path, below[path]))
            part = TracedPart(dict(module.named_modules(remove_duplicate=False)), path, by_path, hooked)
            for run in traced.graphs:
                flow.add(GraphReader(run, part).flow(traced.complete))
        children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        pending += reversed(children)  # so that they are taken in order, each with its own children first
    flow.complete -= doubted
    _doubt_unreached(flow, sites)
    _guess_unseen(flow, sites)
    return flow


def _sites_below(by_path: Mapping[str, Site]) -> defaultdict[str, set[str]]:
    """The first paths of the sites below each module that holds some."""
    below: defaultdict[str, set[str]] = defaultdict(set)
    for path, site in by_path.items():
        parts = path.split(".")
        for end in range(len(parts)):
            below[".".join(parts[:end])].add(site.path)
    return below


def _reached_into(module: nn.Module, path: str, sites: Iterable[str]) -> Iterator[str]:
    """Those of the sites below a module that its code may use past their parent's forward: `self.block.conv(x)`, or
    `self.block.features(x)`, a method that runs any of them.
    """
    pairs = reaches_into(type(module))  # type: ignore[arg-type]
    opened = {
        name
        for name, child in module.named_children()
        for owner, attribute in pairs
        if owner == name and attribute != "forward" and callable(getattr(type(child), attribute, None))
    }
    for site in sites:
        parts = site.removeprefix(path).strip(".").split(".")
        if parts[0] in opened or pairs & set(pairwise(parts)):
            yield site


def _doubt_unreached(flow: Flow, sites: Sequence[Site]) -> None:
    """Where a forward passes one norm by, it may have chosen its neighbour: nothing is complete beside it."""
    unreached = {site.path.rpartition(".")[0] for site in sites if site.form and not flow.seen(site.path)}
    flow.complete -= {path for path in flow.complete if path.rpartition(".")[0] in unreached}


def _guess_unseen(flow: Flow, sites: Sequence[Site]) -> None:
    """A convolution that no trace reached counts as normed when its next sibling is a norm of its width."""
    for site, following in pairwise(sites):
        siblings = site.path.rpartition(".")[0] == following.path.rpartition(".")[0]
        pair = site.kind == "weight" and following.form and siblings
        if pair and not flow.seen(site.path) and site.channels == following.channels:
            flow.normed.add(site.path)
