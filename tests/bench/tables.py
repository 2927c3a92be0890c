"""The tables of the READMEs, made from the files in `results`, which the benchmarks write.

Run: python tests/bench/tables.py, to put them in their places: from `<!-- results: NAME -->` to `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / folder / "README.md" for folder in (".", "tests/bench", "tests/integration", "normswap/training")]
PLACE = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


STARTS = ("reset", "copied", "matched", "calibrated")


def kept(rows: list[Row]) -> list[list[str]]:
    """A line a target: the mean over all nets, before and after it from each start, groups automatic."""
    chosen = [row for row in rows if row["groups"] in ("auto", "") and row["copied"]]
    table = [["target", "before", *STARTS]]
    for target in dict.fromkeys(row["target"] for row in chosen):
        mine = [row for row in chosen if row["target"] == target]
        table.append([_target(target), *(_mean(mine, column) for column in ("before", *STARTS))])
    return table


def _target(name: str) -> str:
    return f"`{name.replace(' preserve', '').replace('strict', '--ws strict')}`"


def retention(rows: list[Row]) -> list[list[str]]:
    """A line a net: accuracy before, and after each target with automatic groups."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    columns = [(target, start) for target in targets for start in (STARTS if target == "gn" else STARTS[2:])]
    columns = [(target, start) for target, start in columns if (target, start) != ("gn-ws preserve", "calibrated")]
    found = {(row["task"], row["net"], row["target"]): row for row in rows if row["groups"] in ("auto", "")}
    table = [["net", "before", *(_column(target, start) for target, start in columns)]]
    for task, net in dict.fromkeys((row["task"], row["net"]) for row in rows):
        before = found[task, net, "gn"]["before"]
        cells = [found[task, net, target][start] for target, start in columns]
        table.append([f"{net}, {task}", _percent(before["mean"]), *(_with_spread(cell) for cell in cells)])
    means = [
        statistics.fmean(row[start]["mean"] for key, row in found.items() if key[2] == target)
        for target, start in columns
    ]
    before = statistics.fmean(row["before"]["mean"] for key, row in found.items() if key[2] == "gn")
    return [*table, ["**mean**", _percent(before), *map(_percent, means)]]


def _column(target: str, start: str) -> str:
    name = _target(target)
    if start != "matched" or target == "gn":
        name += f" {start}"
    return f"**{name}**" if (target, start) == ("gn", "matched") else name


def calibrated(rows: list[Row]) -> list[list[str]]:
    """A line a target and net: accuracy before, matched and calibrated, and what share of that before is kept."""
    table = [["target", "net", "before", "matched", "**calibrated**", "share kept"]]
    for row in rows:
        net = f"{row['net']}, {row['task']}" if row["task"] else f"**{row['net']}**"
        scores = [_with_spread(row[start]) for start in ("before", "matched", "calibrated")]
        table.append([_target(row["target"]), net, *scores, _percent(row["kept"])])
    return table


def groups(rows: list[Row]) -> list[list[str]]:
    """A line for each number of groups that every net can have: accuracy and drift, the mean over all nets."""
    chosen = [row for row in rows if row["net"] == "all nets"]
    table = [["groups", *(str(row["groups"]) for row in chosen)]]
    table.append(["accuracy", *(_percent(row["accuracy"]["mean"]) for row in chosen)])
    return [*table, ["drift", *(f"{row['drift']:.2f}" for row in chosen)]]


def fine_tune(rows: list[Row]) -> list[list[str]]:
    """A line a start: the mean over the nets, before training and after so many steps at each batch size."""
    looks = list(dict.fromkeys((row["batch"], row["steps"]) for row in rows))
    table = [["start", "before", *(f"batch {batch}, {steps} steps" for batch, steps in looks if batch)]]
    for start in dict.fromkeys(row["start"] for row in rows):
        found = {
            look: [row for row in rows if (row["start"], row["batch"], row["steps"]) == (start, *look)]
            for look in looks
        }
        table.append([f"`{start}`", *(_mean(chosen, "accuracy") for chosen in found.values())])
    return table


def fine_tune_calibrated(rows: list[Row]) -> list[list[str]]:
    """The table of `fine_tune` for each task."""
    table: list[list[str]] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        head, *lines = fine_tune([row for row in rows if row["task"] == task])
        table += [] if table else [["task", *head]]
        table += [[task, *line] for line in lines]
    return table


def real(rows: list[Row]) -> list[list[str]]:
    """A line a way, of networks with norms: the score of each with its standard error."""
    return _by_network(rows, "score")


IN_SHORT = {
    "reset": "reset",
    "copied": "copied",
    "gn auto": "normswap, for training",
    "gn for use": "for use",
    "gn calibrated 180 s": "calibrated",
}


def real_kept(rows: list[Row]) -> list[list[str]]:
    """A line a network with norms: what it had before, and after some ways to take group norm."""
    found = {(row["network"], row["way"]): row for row in rows if row["measure"] != "cosine"}
    table = [["group norm instead of BatchNorm", "before", *IN_SHORT.values()]]
    for network in dict.fromkeys(network for network, _ in found):
        before = found[network, "original"]
        cells = [found.get((network, way)) for way in IN_SHORT]
        name = f"{network}, {before['measure']}"
        table.append([name, _percent(before["score"]["mean"]), *(_with_error(c["score"]) if c else "" for c in cells)])
    return table


def real_agreement(rows: list[Row]) -> list[list[str]]:
    """The same of the agreement with the original."""
    return _by_network(rows, "agreement")


def _by_network(rows: list[Row], column: str) -> list[list[str]]:
    found = {(row["way"], row["network"]): row for row in rows if row["measure"] != "cosine"}
    networks = {network: found["original", network] for _, network in found}
    table = [["", *(f"{network}, {row['measure']}, {row['samples']} samples" for network, row in networks.items())]]
    for way in dict.fromkeys(way for way, _ in found):
        cells = [_with_error(found[way, network][column]) if (way, network) in found else "" for network in networks]
        table.append([_way(way), *cells])
    return table


def real_seconds(rows: list[Row]) -> list[list[str]]:
    """A line a way that takes data: the seconds that the conversion of each network took."""
    ways = [way for way in dict.fromkeys(row["way"] for row in rows) if "data" in way or "calibrated" in way]
    networks = list(dict.fromkeys(row["network"] for row in rows if row["way"] in ways))
    found = {(row["way"], row["network"]): f"{row['seconds']:.0f}" for row in rows}
    return [["seconds", *networks], *([_way(way), *(found.get((way, net), "") for net in networks)] for way in ways)]


def real_recurrent(rows: list[Row]) -> list[list[str]]:
    """A line a way, of the recurrent network: the cosine to the original's embeddings, and how often it is nearest."""
    table = [["", "cosine", "its own voice is the nearest", "samples"]]
    for row in rows:
        if row["measure"] == "cosine":
            score = f"{row['score']['mean']:.3f} ±{row['score']['error']:.3f}"
            table.append([_way(row["way"]), score, _with_error(row["agreement"]), str(row["samples"])])
    return table


def _way(name: str) -> str:
    """As one would type it, and what was done with data after that."""
    target, *rest = re.split(r" (?=on data|calibrated)", name)
    target = target.replace("recurrent ln", "--recurrent ln").replace("strict", "--ws strict")
    target = re.sub(r"^gn (?=\d)", "gn --groups ", target).replace("for use", "--for use").removesuffix(" auto")
    if target in ("reset", "copied"):
        target = f"gn --transfer {target.replace('copied', 'copy')}"
    return " ".join([target if name == "original" else f"`{target}`", *rest])


def real_fine_tune(rows: list[Row]) -> list[list[str]]:
    """A line a start: after the last step at each batch size, of every network and task."""
    last = {(row["network"], row["task"], row["batch"]): row["steps"] for row in rows if row["batch"]}
    table = [["start", *(f"{net}, {task}, batch {batch}, {last[net, task, batch]} steps" for net, task, batch in last)]]
    ends = {
        (row["start"], *place): _with_spread(row["accuracy"])
        for row in rows
        if (place := (row["network"], row["task"], row["batch"])) in last and row["steps"] == last[place]
    }
    for start in dict.fromkeys(row["start"] for row in rows):
        table.append([f"`{start}`", *(ends.get((start, *place), "") for place in last)])
    return table


def fits(rows: list[Row]) -> list[list[str]]:
    """A line a kind of pictures: accuracy before, matched, and how a fit changed it."""
    columns = ["pictures", "before", "matched", "change by the fit", "least", "kept", "refused"]
    return [columns, *([str(row[column]) for column in columns] for row in rows)]


def small_batch(rows: list[Row]) -> list[list[str]]:
    """A line a norm: the error at each batch size."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    table = [["norm", *(f"batch {batch}" for batch in batches)]]
    for norm in dict.fromkeys(row["norm"] for row in rows):
        table.append([norm, *(_with_spread(row["error"]) for row in rows if row["norm"] == norm)])
    return table


def recurrent(rows: list[Row]) -> list[list[str]]:
    """A line a net: accuracy before, and with layer normalization inside from each start."""
    columns = ["before", "gain 1", "no data", "measured"]
    return [["net", *columns], *([row["what"], *(row[column] for column in columns)] for row in rows if row["before"])]


def recurrent_speed(rows: list[Row]) -> list[list[str]]:
    """A line a layer: the time of forward and backward as a multiple of three others'."""
    table = [["layer", "× torch's cell in a loop", "× that with layer norms pasted in", "× torch's fused layer"]]
    for row in rows:
        if row["ms"]:
            fused = row["× nn.LSTM"] or row["× nn.GRU"]
            table.append([row["what"], *(f"{value:.2f}" for value in (row["× cell loop"], row["× with norms"], fused))])
    return table


def report_time(rows: list[Row]) -> list[list[str]]:
    """A line a model and view."""
    table = [["model", "view", "ms", "× `repr(model)`", "lines"]]
    return table + [
        [row["model"], row["view"], f"{1000 * row['seconds']:.0f}", f"{row['times repr']:.1f}", str(row["lines"] or "")]
        for row in rows
    ]


def norm_time(rows: list[Row]) -> list[list[str]]:
    """A line a norm: the time as a multiple of batch norm's in each layout, mode and batch size."""
    places = list(dict.fromkeys((row["layout"], row["mode"], row["batch"]) for row in rows))
    found = {(row["norm"], row["layout"], row["mode"], row["batch"]): row["times"] for row in rows}
    table = [["norm", *(f"{layout}, {mode}, batch {batch}" for layout, mode, batch in places)]]
    for norm in dict.fromkeys(row["norm"] for row in rows):
        table.append([f"`{norm}`", *(f"{found[(norm, *place)]:.2f}" for place in places)])
    return table


def step_time(rows: list[Row]) -> list[list[str]]:
    """A line a variant: its time at each batch size, a multiple of the plain net's or a copy's, and peak memory."""
    places = list(dict.fromkeys(row["what"] for row in rows))
    held = [place for place in places if place.startswith("step")]
    found = {(row["variant"], row["what"]): row for row in rows}
    table = [["variant", *places, *(place.replace("step", "MiB") for place in held)]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = {what: row for (name, what), row in found.items() if name == variant}
        times = [f"{mine[what]['times']:.2f}" if what in mine else "" for what in places]
        memory = [f"{mine[what]['MiB']:.0f}" if what in mine else "" for what in held]
        table.append([variant, *times, *memory])
    return table


def speed(rows: list[Row]) -> list[list[str]]:
    """In short: a training step of a ResNet-50, other norms beside BatchNorm and other weights beside plain ones."""
    norms = json.loads((RESULTS / "norm_time.json").read_text())["rows"]
    times = {
        (f"`{row['norm']}`, beside BatchNorm", row["batch"]): row["times"]
        for row in norms
        if (row["layout"], row["mode"]) == ("contiguous", "training") and row["norm"] not in ("bn", "gn-ws")
    }
    names = {
        "ws, ours": "`ws`, beside plain weights", "ws, timm": "timm's `StdConv2d`, beside plain weights",
        "ws, spelled out": "the paper's own code, beside plain weights", "wn, ours": "`wn`, beside plain weights",
    }  # fmt: skip
    for row in rows:
        if row["what"].startswith("step") and row["variant"] in names:
            times[names[row["variant"]], int(row["what"].rpartition(" ")[2])] = row["times"]
    table = [["training step of a ResNet-50, two CPU cores", "batch 1", "batch 8"]]
    for name in dict.fromkeys(name for name, _ in times):
        table.append([name, *(f"{times[name, batch]:.2f}" for batch in (1, 8))])
    return table


def convert_time(rows: list[Row]) -> list[list[str]]:
    """A line a model and converter; the command against its bare script."""
    table = [["model", "converter", "ms", "× ours, copying", "memory, × the model"]]
    for row in rows:
        peer = {"the command": " × a bare script", "graph analysis": " × torch.fx.symbolic_trace"}
        times = (
            f"{row['times']:.2f}{peer.get(row['converter'], '')}" if row["times"] else "torch.fx alone cannot trace it"
        )
        memory = f"{row['memory']:.2f}" if row["memory"] is not None else ""
        table.append([row["model"], row["converter"], f"{1000 * row['seconds']:.0f}", times, memory])
    return table


def neighbours(rows: list[Row]) -> list[list[str]]:
    """A line a library or engine: the versions that its tests ran with, what they prove, and where they are."""
    table = [["with", "version", "proven", "tests passed"]]
    for row in rows:
        versions = ", ".join(v if len(row["versions"]) == 1 else f"{name} {v}" for name, v in row["versions"].items())
        link = f"[{row['passed']}]({row['tests']})"
        table.append([row["neighbour"], versions, row["proven"], link])
    return table


KINDS = {"norm": "norms", "weight": "convolutions"}
_MOST_REASONS = 8  # that a table has of each target and kind; the rest is added up


def left(rows: list[Row]) -> list[list[str]]:
    """A line a library and target: the share of norms and of convolutions that each version leaves."""
    versions = list(dict.fromkeys(row["version"] for row in rows))
    whole = [row for row in rows if row["reason"] == "(all)"]
    table = [["library", "models", "target", "layers", *(f"left {version}" for version in versions)]]
    places = dict.fromkeys((row["library"], row["target"], row["kind"]) for row in whole)
    for library, target, kind in places:
        mine = [row for row in whole if (row["library"], row["target"], row["kind"]) == (library, target, kind)]
        table.append([library, str(mine[-1]["models"]), *_left_of(mine, target, kind, versions)])
    for target, kind in dict.fromkeys((target, kind) for _, target, kind in places):
        mine = [row for row in whole if (row["target"], row["kind"]) == (target, kind)]
        models = sum(row["models"] for row in mine if row["version"] == versions[-1])
        table.append(["**all**", str(models), *_left_of(mine, target, kind, versions)])
    return table


def _left_of(rows: list[Row], target: str, kind: str, versions: list[str]) -> list[str]:
    sums = {
        name: [sum(row[of] for row in rows if row["version"] == name) for of in ("left", "layers")] for name in versions
    }
    cells = [f"{some} ({_percent(some / layers)})" if layers else "" for some, layers in sums.values()]
    return [f"`{target}`", f"{sums[versions[-1]][1]} {KINDS[kind]}", *cells]


def left_reasons(rows: list[Row]) -> list[list[str]]:
    """A line a reason for which layers are left: how many in each version, over all libraries."""
    versions = list(dict.fromkeys(row["version"] for row in rows))
    table = [["target", "layers", "left because", *versions]]
    some = [row for row in rows if row["reason"] != "(all)" and row["kind"] in KINDS]
    for target, kind in dict.fromkeys((row["target"], row["kind"]) for row in some):
        mine = [row for row in some if (row["target"], row["kind"]) == (target, kind)]
        counts = {
            reason: [_sum_left(mine, name, reason) for name in versions] for reason in (r["reason"] for r in mine)
        }
        by_size = sorted(counts.items(), key=lambda entry: -max(entry[1]))
        rest = [sum(column) for column in zip(*(numbers for _, numbers in by_size[_MOST_REASONS:]), strict=True)]
        lines = [*by_size[:_MOST_REASONS], *([("other reasons", rest)] if rest else [])]
        table += [[f"`{target}`", KINDS[kind], reason, *map(str, numbers)] for reason, numbers in lines]
    return table


def _sum_left(rows: list[Row], version: str, reason: str) -> int:
    return sum(row["left"] for row in rows if (row["version"], row["reason"]) == (version, reason))


TABLES: dict[str, Callable[[list[Row]], list[list[str]]]] = {
    "kept": kept,
    "retention": retention,
    "calibrated": calibrated,
    "groups": groups,
    "recurrent": recurrent,
    "recurrent_speed": recurrent_speed,
    "fine_tune": fine_tune,
    "fine_tune_calibrated": fine_tune_calibrated,
    "real": real,
    "real_kept": real_kept,
    "real_agreement": real_agreement,
    "real_seconds": real_seconds,
    "real_recurrent": real_recurrent,
    "real_fine_tune": real_fine_tune,
    "fits": fits,
    "small_batch": small_batch,
    "norm_time": norm_time,
    "step_time": step_time,
    "convert_time": convert_time,
    "report_time": report_time,
    "neighbours": neighbours,
    "speed": speed,
    "left": left,
    "left_reasons": left_reasons,
}


SOURCES = {
    "kept": "retention", "recurrent_speed": "recurrent", "speed": "step_time", "left_reasons": "left",
    "real_kept": "real", "real_agreement": "real", "real_seconds": "real", "real_recurrent": "real",
}  # fmt: skip
"""By the table's name, the results that it is made of, where they have another."""
EXTERNAL = ("real", "real_fine_tune", "fits")
"""Scripts that want data and networks from outside, so that their results may be absent."""


def render(name: str) -> str:
    """The table of that name as Markdown, and under it with what and when it was measured."""
    source = SOURCES.get(name, name)
    script = source.removesuffix("_calibrated")
    results = RESULTS / f"{source}.json"
    if source in EXTERNAL and not results.exists():
        return f"To be measured: `tests/bench/{script}.py --data FOLDER --results tests/bench/results/{source}.json`.\n"
    data = json.loads(results.read_text())
    head, *lines = TABLES[name](data["rows"])
    text = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
    made = data["environment"]
    number = made["arguments"].get("seeds")
    seeds = f", {number} seed{'s' * (number != 1)}" if number else ""
    text += [
        "",
        f"`tests/bench/{script}.py`{seeds}, torch {made['packages']['torch']}, {made['machine']}, {made['date']}.",
    ]
    return "\n".join(text) + "\n"


def fill(text: str) -> str:
    """A document's text with every table as the results have it."""
    return PLACE.sub(lambda found: found[1] + render(found[2]) + found[4], text)


def _mean(rows: list[Row], column: str) -> str:
    return _percent(statistics.fmean(row[column]["mean"] for row in rows))


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _with_spread(cell: Row) -> str:
    return _percent(cell["mean"]) + (f" ±{100 * cell['spread']:.1f}" if cell["spread"] is not None else "")


def _with_error(cell: Row) -> str:
    return f"{_percent(cell['mean'])} ±{100 * cell['error']:.1f}"


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(fill(document.read_text()))
