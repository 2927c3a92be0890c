"""What is wrong with a model's norms, or suspicious. A new finding is one function and one row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from normswap.analysis.flow import Flow
from normswap.analysis.sites import Site, hidden_modules
from normswap.analysis.time_axis import CAUSAL, PADDED
from normswap.report.inspection import Finding

_FAR_MORE = 3  # times as many norms before the non-linearity as after it make the latter look like slips


@dataclass(frozen=True)
class Observations:
    """What the rules go by."""

    sites: Sequence[Site]  # every norm and weight layer
    flow: Flow  # how layers are connected
    statistics: Mapping[str, str]  # the state of running statistics, by path of the norm


Rule = Callable[[Observations], Iterator[Site]]


def _statistics(*states: str) -> Rule:
    """The rule that finds norms whose running statistics are in one of these states; part of its words will do."""

    def find(seen: Observations) -> Iterator[Site]:
        found = {path for path, words in seen.statistics.items() if any(state in words for state in states)}
        return (site for site in seen.sites if site.path in found)

    return find


def _never_following(seen: Observations) -> Iterator[Site]:
    for site in seen.sites:
        if site.is_batch_norm and seen.statistics[site.path] and getattr(site.module, "momentum", 0.1) == 0:
            yield site


def _useless_bias(seen: Observations) -> Iterator[Site]:
    sites, flow = seen.sites, seen.flow
    norms = {site.path: site for site in sites if site.kind == "norm"}
    for site in sites:
        known = site.kind == "weight" and site.layer_kind != "rnn" and site.path in flow.parts
        if not known or not isinstance(getattr(site.module, "bias", None), Tensor):
            continue
        readers = flow.readers.get(site.path, [])
        if readers and all(reader in norms and _removes_the_mean(norms[reader]) for reader in readers):
            yield site


def _removes_the_mean(norm: Site) -> bool:
    """Whether a norm, as it trains, takes away each channel's own mean."""
    if norm.is_batch_norm:
        return isinstance(norm.module, nn.modules.batchnorm._BatchNorm)
    return norm.form == "group" and norm.groups == norm.channels


def _after_activation(seen: Observations) -> Iterator[Site]:
    sites, flow = seen.sites, seen.flow
    norms: dict[str, list[Site]] = {"before": [], "after": []}
    weights = {site.path for site in sites if site.kind == "weight"}
    for site in sites:
        routes = flow.between.get(site.path, set()) if site.kind == "norm" else set()
        if routes and all(source in weights for source, _ in routes):
            activated = [any("ropout" not in name for name in names) for _, names in routes]
            if all(activated) or not any(activated):
                norms["after" if activated[0] else "before"].append(site)
    if len(norms["before"]) >= _FAR_MORE * len(norms["after"]):
        yield from norms["after"]


def _dropout(seen: Observations) -> Iterator[Site]:
    sites, flow = seen.sites, seen.flow
    kinds = {site.path: site.kind for site in sites}
    for site in sites:
        for source, names in flow.between.get(site.path, set()):
            dropped = any("ropout" in name for name in names)
            pair = dropped and {site.kind, kinds.get(source or "", "")} == {"norm", "weight"}
            if pair and site.layer_kind != "linear":
                yield site
                break


def _along_time(what: str) -> Rule:
    """The rule that finds norms of a net where positions have to stay apart."""

    def find(seen: Observations) -> Iterator[Site]:
        return (site for site in seen.sites if seen.flow.along_time.get(site.path) == what)

    return find


PROBLEM_RULES: dict[str, tuple[Rule, str]] = {
    "running statistics that are not finite or negative": (_statistics("not finite", "negative variance"),
        "no target converts these layers; compute them again on data in train mode, or find where training diverged"),
    "running statistics that were never trained": (_statistics("never trained"),
        "there is no function to keep: load the trained weights first, or check that they were loaded"),
    "dead channels: no variance": (_statistics("dead channel"),
        "the filters before them always give the same value; group norms leave them out of a group's scale"),
    "momentum 0": (_never_following,
        "the running statistics never change, although training normalizes each batch by its own: "
        "the target frozen makes that explicit"),
    "a bias without effect, since the norm after it subtracts it": (_useless_bias,
        "it only takes memory: build these layers with bias=False; gn and ln would give the bias an effect"),
    "a norm after the non-linearity, where the others stand before it": (_after_activation,
        "often a mistake; the conversion works all the same"),
    "dropout between norm and convolution": (_dropout,
        "it changes the variance between training and evaluation, so that running statistics do not fit "
        "(Li et al. 2019)"),
    "norms of a causal network": (_along_time(CAUSAL),
        "gn, ln, in and bcn take statistics along time, so that the past would depend on the future; pn, frozen and "
        "est do not"),
    "norms of sequences that may be padded or masked": (_along_time(PADDED),
        "gn, ln, in and bcn take statistics along time, so that outputs would depend on the padding; pn, frozen and "
        "est do not"),
}  # fmt: skip
"""By what is wrong: where to find it, and what follows."""


def find_problems(model: nn.Module, seen: Observations) -> list[Finding]:
    """All that is wrong, in the order of `PROBLEM_RULES`, then norms and layers that no module of the model holds."""
    found = []
    for problem, (rule, note) in PROBLEM_RULES.items():
        paths = [site.path for site in rule(seen)]
        found += [Finding(problem, tuple(paths), note)] if paths else []
    for where, name in seen.flow.functional.items():
        note = "no module holds it, so no target can change it: make it a module, such as nn.BatchNorm2d"
        found.append(Finding(f"a functional {name}", (where,), note))
    hidden = tuple(where for where, module in hidden_modules(model) if any(True for _ in module.parameters()))
    if hidden:
        note = "parameters in a plain list, dict or attribute are neither saved nor trained"
        found.append(Finding("modules that are not registered", hidden, f"{note}: use nn.ModuleList or nn.ModuleDict"))
    return found
