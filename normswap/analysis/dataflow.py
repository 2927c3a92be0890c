"""Read-only: how the layers of a model are connected, as far as its parts can be traced."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

from torch import nn

from normswap.analysis.bytecode import parts_used
from normswap.analysis.copies import skeleton
from normswap.analysis.flow import Flow, paths_around
from normswap.analysis.graph_reader import GraphReader
from normswap.analysis.sites import Site
from normswap.analysis.time_axis import named_so
from normswap.analysis.traced_part import TracedPart
from normswap.analysis.tracing import in_words, trace
from normswap.analysis.type_tests import find_type_tests
from normswap.layers.torch_normalization import is_torchs_hook

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_flow(model: nn.Module, sites: Sequence[Site]) -> Flow:
    """Trace `model`, or its largest parts that can be traced, and read off how layers are connected."""
    by_path = {path: site for site in sites for path in site.paths}
    try:
        bones = skeleton(model)
    except Exception as error:  # an attribute of the model that cannot be copied: no dataflow, and the report says so
        return Flow(problems={"": f"cannot be copied for tracing: {error}"}, type_tests=find_type_tests(model))
    copies = dict(bones.named_modules(remove_duplicate=False))
    hooked = frozenset(id(copies[path]) for path in hooked_paths(model))
    leaves = hooked | {id(copies[path]) for path in by_path}  # what hooks do to a value is not in any forward
    below = _paths_below(by_path)
    holders = {path: norms for path, site in by_path.items() if (norms := _norms_inside(path, site, below, by_path))}
    flow = Flow()
    covered: dict[str, str] = {}  # by the path of a site all whose uses are in one trace: the part that was traced
    whole = set[str]()  # parts that were traced along all of their branches
    used = set[str]()  # parts that a forward which could not be traced may use by itself
    pending = [("", bones)]
    while pending:
        path, module = pending.pop()
        if (path in by_path and path not in holders) or (path and below[path] <= covered.keys()):
            continue
        if type(module) is nn.MultiheadAttention:  # known, and has more branches than can be followed
            flow.touched |= {by_path[inner].path for inner in below[path]}
            continue
        # A trace of a part knows less than one of the whole: none is made where that told anything of the part.
        if not below[path] & covered.keys() and type(module).forward is not nn.Module.forward:
            traced = trace(module, lambda m: id(m) in leaves)
            if traced.problem:
                flow.problems[path] = traced.problem
                used |= {_join(path, inner) for inner in parts_used(module)}
            elif path not in holders and _may_ask(module, leaves):
                flow.words[path] = in_words(traced)
            inside = dict(module.named_modules(remove_duplicate=False)) if path else copies
            part = TracedPart(inside, path, by_path, hooked, holders)
            around = _part_around(path, whole) if path in holders else path
            for run in traced.graphs:
                found = GraphReader(run, part).flow(traced.complete)
                flow.add(found)
                if traced.complete:
                    told = {p for site in (*found.readers, *found.writers) for p in by_path[site].paths}
                    covered |= {p: around for p in told & {path, *below[path]} if not _is_used(p, path, used)}
            whole |= {path} if traced.complete else set()
        pending += reversed(
            [(_join(path, name), child) for name, child in module._modules.items() if child is not None]
        )
    flow.parts = {
        site.path: frozenset(covered[p] for p in site.paths) for site in sites if covered.keys() >= {*site.paths}
    }
    _doubt_unreached(flow, sites)
    _guess_unseen(flow, sites)
    flow.type_tests = find_type_tests(model)
    flow.along_time = {**named_so(model, sites, flow.ranks), **flow.along_time}
    return flow


def _may_ask(module: nn.Module, leaves: Collection[int]) -> bool:
    """Whether a forward in `module` may ask its layers for anything: those of torch's own containers do not."""
    pending = [module]
    while pending:
        inner = pending.pop()
        if id(inner) not in leaves:
            if not type(inner).__module__.startswith("torch.nn.") or (
                inner._modules and type(inner) not in _CONTAINERS
            ):
                return True
            pending += filter(None, inner._modules.values())
    return False


def hooked_paths(model: nn.Module) -> set[str]:
    """The paths of the modules below `model` with hooks around their forward that are not of torch's normalizations."""
    return {
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if path and (module._forward_hooks or not all(map(is_torchs_hook, module._forward_pre_hooks.values())))
    }


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")


def _paths_below(paths: Iterable[str]) -> defaultdict[str, set[str]]:
    """The paths of sites below each module that holds some."""
    below: defaultdict[str, set[str]] = defaultdict(set)
    for path in paths:
        parts = path.split(".")
        for end in range(len(parts)):
            below[".".join(parts[:end])].add(path)
    return below


def _norms_inside(path: str, site: Site, below: Mapping[str, set[str]], by_path: Mapping[str, Site]) -> frozenset[str]:
    """The norms that a layer at `path` holds and only calls, so that it is traced like a model of its own."""
    inside = [by_path[inner] for inner in below.get(path, ()) if inner != path and site.kind == "weight"]
    return frozenset(norm.path for norm in inside if norm.kind == "norm" and not norm.obstacle)


def _part_around(path: str, whole: Collection[str]) -> str:
    """The largest part around `path` whose trace tells all uses of the layer there; `path` itself where none does."""
    return next((part for part in paths_around(path) if part in whole), path)


def _is_used(path: str, part: str, used: set[str]) -> bool:
    """Whether a module at `path`, or one around it within `part`, may be used by code outside of `part`."""
    while path != part and path:
        if path in used:
            return True
        path = path.rpartition(".")[0]
    return False


def _doubt_unreached(flow: Flow, sites: Sequence[Site]) -> None:
    """Where a forward passes one norm by, it may have chosen its neighbour: nothing is complete beside it."""
    unreached = {site.path.rpartition(".")[0] for site in sites if site.form and not flow.seen(site.path)}
    flow.parts = {path: parts for path, parts in flow.parts.items() if path.rpartition(".")[0] not in unreached}


def _guess_unseen(flow: Flow, sites: Sequence[Site]) -> None:
    """A convolution that no trace reached counts as normed when its next sibling is a norm of its width."""
    for site, following in pairwise(sites):
        siblings = site.path.rpartition(".")[0] == following.path.rpartition(".")[0]
        pair = site.kind == "weight" and following.form and siblings
        if pair and not flow.seen(site.path) and site.channels == following.channels:
            flow.normed.add(site.path)
