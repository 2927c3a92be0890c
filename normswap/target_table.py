"""What a norm and a weight can become: a row a form, which the help, `normswap targets`, files and the targets read.

A new form is one row here and one function in `normswap/targets/`; `.github/CONTRIBUTING.md` has the steps.
Nothing here needs torch, so that the tables are shown at once.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from itertools import permutations, product


@dataclass(frozen=True)
class Slowdown:
    """How long a training step takes on a CPU, as a multiple of one without the form; measured by `tests/bench`."""

    least: float
    """Over the batch sizes and memory layouts of a ResNet-50."""
    most: float
    """Likewise."""
    remedy: str
    """What helps."""


@dataclass(frozen=True)
class Form:
    """A row: what a norm or a weight becomes, and all that the rest of the package asks of it."""

    name: str
    """What the user writes: `gn`."""
    becomes: str
    """The layer, in words."""
    exactness: str
    """Whether the function in eval mode stays the same."""
    paper: str
    """The source."""
    choose_when: str
    """How a user knows whether to want it."""
    spellings: tuple[str, ...] = ()
    """Other names that users give it, in small letters without hyphens; a wrong target is compared with these too."""
    slowdown: Slowdown | None = None
    """What it costs in training; None where that is no more than BatchNorm does."""
    options: tuple[str, ...] = ()
    """The options of a conversion that are of use for such forms alone."""
    compares_groups: bool = False
    """Whether numbers of groups are compared on calibration data."""
    within_sample: bool = False
    """Whether it takes statistics of each sample by itself."""
    over_positions: bool = False
    """Whether it takes statistics over the positions of a sample, so that they reach along time and into padding."""
    on_tensors_alone: bool = False
    """Whether the tensors of a norm suffice: a state dict is converted without its model."""
    class_by_dimension: bool = False
    """Whether its class depends on the dimensions of the input (BatchNorm2d), which a recipe then has to tell again."""
    into_neighbours: bool = False
    """Whether it goes into the layers around it, so that these tell what becomes of it, and not the norm alone."""


_NEAR = 0.7  # how alike a name has to be to a target's, from 0 to 1, for this to be suggested
_NEARER = 0.1  # by how much more alike a pair has to be than a single form
_MATCHED = "approximate (matched)"
_DATA = "approximate, needs data; exact from frozen, est, SyncBatchNorm"
_LAYOUT = "less with contiguous tensors than with channels_last"
_FOLD = "normswap fold removes that for deployment"


def _by_name(*forms: Form) -> dict[str, Form]:
    return {form.name: form for form in forms}


# fmt: off
NORM_FORMS = _by_name(
    Form("gn", "GroupNorm", _MATCHED, "Wu & He 2018", "small batches, private or federated training",
         spellings=("groupnorm",),
         within_sample=True, over_positions=True, options=("groups", "purpose"), compares_groups=True,
         on_tensors_alone=True),
    Form("ln", "GroupNorm with one group", _MATCHED, "Ba et al. 2016", "keeping most without training",
         spellings=("layernorm",),
         within_sample=True, over_positions=True, on_tensors_alone=True),
    Form("in", "InstanceNorm", _MATCHED, "Ulyanov et al. 2016", "style transfer, contrast that should not matter",
         spellings=("instancenorm",),
         slowdown=Slowdown(1.1, 1.7, _LAYOUT), within_sample=True, over_positions=True, on_tensors_alone=True,
         compares_groups=True),  # where a channel has one element, it becomes a group norm
    Form("pn", "PositionNorm", _MATCHED, "Li et al. 2019", "causal nets, streams, padded sequences",
         spellings=("positionnorm", "channelnorm"),
         within_sample=True, on_tensors_alone=True),
    Form("est", "EstimatedBatchNorm", "exact", "Qiao et al. 2019", "batch 1 without another norm",
         spellings=("estimatedbatchnorm", "movingestimates"),
         slowdown=Slowdown(1.1, 1.3, _FOLD), on_tensors_alone=True),
    Form("bcn", "BatchChannelNorm", _MATCHED, "Qiao et al. 2019", "batch 1 and 2, best with ws",
         spellings=("batchchannelnorm",),
         slowdown=Slowdown(1.2, 1.5, _LAYOUT), within_sample=True, over_positions=True, options=("groups", "purpose"),
         compares_groups=True, on_tensors_alone=True),
    Form("bn", "BatchNorm", _DATA, "Ioffe & Szegedy 2015", "large batches, speed; the way back",
         spellings=("batchnorm", "syncbatchnorm", "syncbn"),
         class_by_dimension=True),
    Form("frozen", "FrozenBatchNorm", "exact", "He et al. 2017", "short fine-tuning near the original data",
         spellings=("frozenbatchnorm", "frozenbn", "freeze"),
         on_tensors_alone=True),
    Form("fold", "nothing: into the layer before it", "exact", "Ioffe & Szegedy 2015",
         "deployment, or training without norms",
         spellings=("fuse", "merge", "identity", "none"), into_neighbours=True, class_by_dimension=True),
)
WEIGHT_FORMS = _by_name(
    Form("ws", "Standardized Conv, Linear, RNN", "exact; approximate with --ws strict", "Qiao et al. 2019",
         "GroupNorm at batch 1 and 2",
         spellings=("weightstandardization", "stdconv", "std"), slowdown=Slowdown(1.1, 1.2, _FOLD),
         options=("ws", "ws_scope")),
    Form("wn", "Normalized Conv, Linear, RNN", "exact", "Salimans & Kingma 2016",
         "recurrent nets, training without norms (fold-wn)",
         spellings=("weightnorm",), slowdown=Slowdown(1.0, 1.2, _FOLD)),
)
RECURRENT_FORMS = _by_name(
    Form("ln", "LSTM, GRU with layer norm inside", "approximate", "Ba et al. 2016", "long sequences, small batches"),
)
"""What a recurrent layer can become, beside whatever the target is."""
# fmt: on

PLAIN_FORM = Form("plain", "torch's own layer", "exact", "", "deployment")
"""What `normswap.fold` makes of norms and of weights; no user names it."""

TARGET_FORMS: dict[str, tuple[Form | None, Form | None]] = {
    name: (norm, weight)
    for norm in (None, *NORM_FORMS.values())
    for weight in (None, *WEIGHT_FORMS.values())
    if (name := "-".join(form.name for form in (norm, weight) if form is not None))
}
"""Every target by name: each norm form, each weight form, and each pair of them."""


def described_targets() -> dict[str, list[dict[str, str]] | list[str]]:
    """The tables as JSON-able data: what a norm, a weight and a recurrent layer can become, and the names to type."""
    shown = ("name", "becomes", "exactness", "paper", "choose_when")
    tables = {"norms": NORM_FORMS, "weights": WEIGHT_FORMS, "recurrent": RECURRENT_FORMS}
    rows = {
        name: [{key: getattr(form, key) for key in shown} for form in table.values()] for name, table in tables.items()
    }
    return {**rows, "targets": list(TARGET_FORMS)}


def describe_slowdown(target: str) -> str:
    """What a target costs in training, a sentence; "" where that is no more than BatchNorm, and for an unknown name."""
    parts = [
        f"{form.slowdown.least} to {form.slowdown.most} times as long with {form.name} ({form.slowdown.remedy})"
        for form in TARGET_FORMS.get(target, ())
        if form is not None and form.slowdown is not None
    ]
    return f"on a CPU a training step takes {', '.join(parts)}" if parts else ""


def nearest_target(text: str) -> str | None:
    """The target that `text` may have meant: `gn` for `GroupNorm`, `gn-ws` for `ws_gn`; None where none is near."""
    names: dict[str, str] = {}
    for target, forms in TARGET_FORMS.items():
        for order in permutations([form.name, *form.spellings] for form in forms if form is not None):
            names |= {"".join(words): target for words in product(*order)}
    asked = re.sub(r"[123]d$|[^a-z]", "", re.sub("normali[sz]ation", "norm", text.lower().rpartition(".")[2]))
    near = difflib.get_close_matches(asked, names, len(names), _NEAR)
    single = [name for name in near if "-" not in names[name]]  # a pair is a guess at more, and has to be nearer
    if single and _likeness(asked, single[0]) + _NEARER > _likeness(asked, near[0]):
        return names[single[0]]
    return names[near[0]] if near else None


def _likeness(text: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, text).ratio()
