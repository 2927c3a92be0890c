"""What a norm and a weight can become: a row a form, which the help, `normswap targets`, files and the targets read.

A new form is one row here and one function in `normswap/targets/`; `.github/CONTRIBUTING.md` has the steps.
Nothing here needs torch, so that the tables are shown at once.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    slowdown: Slowdown | None = None
    """What it costs in training; None where that is no more than BatchNorm does."""
    takes_groups: bool = False
    """Whether the option `groups` decides how many groups it has."""
    compares_groups: bool = False
    """Whether numbers of groups are compared on calibration data."""
    on_tensors_alone: bool = False
    """Whether the tensors of a norm suffice: a state dict is converted without its model."""
    class_by_dimension: bool = False
    """Whether its class depends on the dimensions of the input (BatchNorm2d), which a recipe then has to tell again."""


_LAYOUT = "less in the contiguous layout than in channels-last"
_FOLD = "for use, normswap fold takes it away"
_MATCHED = "approximate, moment-matched"

NORM_FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            name="gn",
            becomes="GroupNorm",
            exactness=_MATCHED,
            paper="Wu & He 2018",
            choose_when="small batches, private or federated training",
            takes_groups=True,
            compares_groups=True,
            on_tensors_alone=True,
        ),
        Form(
            name="ln",
            becomes="GroupNorm with one group",
            exactness=_MATCHED,
            paper="Ba et al. 2016",
            choose_when="the most of the function before training",
            on_tensors_alone=True,
        ),
        Form(
            name="in",
            becomes="InstanceNorm",
            exactness=_MATCHED,
            paper="Ulyanov et al. 2016",
            choose_when="style transfer, contrast that should not matter",
            slowdown=Slowdown(1.1, 1.7, _LAYOUT),
            compares_groups=True,  # where a channel has one element, there are fewer groups than channels
            on_tensors_alone=True,
        ),
        Form(
            name="est",
            becomes="EstimatedBatchNorm",
            exactness="exact",
            paper="Qiao et al. 2019",
            choose_when="batch 1 without another norm",
            slowdown=Slowdown(1.1, 1.3, _FOLD),
            on_tensors_alone=True,
        ),
        Form(
            name="bcn",
            becomes="BatchChannelNorm",
            exactness=_MATCHED,
            paper="Qiao et al. 2019",
            choose_when="batch 1 and 2, best with ws",
            slowdown=Slowdown(1.2, 1.5, _LAYOUT),
            takes_groups=True,
            compares_groups=True,
            on_tensors_alone=True,
        ),
        Form(
            name="bn",
            becomes="BatchNorm",
            exactness="approximate, needs data; exact from frozen, est",
            paper="Ioffe & Szegedy 2015",
            choose_when="large batches, speed; the way back",
            class_by_dimension=True,
        ),
        Form(
            name="frozen",
            becomes="FrozenBatchNorm",
            exactness="exact",
            paper="He et al. 2017",
            choose_when="short fine-tuning near the original data",
            on_tensors_alone=True,
        ),
        Form(
            name="fold",
            becomes="nothing: into the layer before it",
            exactness="exact",
            paper="Ioffe & Szegedy 2015",
            choose_when="deployment, or training without norms",
        ),
    )
}
WEIGHT_FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            name="ws",
            becomes="Standardized Conv, Linear, RNN",
            exactness="exact; approximate with ws=strict",
            paper="Qiao et al. 2019",
            choose_when="GroupNorm at batch 1 and 2",
            slowdown=Slowdown(1.1, 1.2, _FOLD),
        ),
        Form(
            name="wn",
            becomes="Normalized Conv, Linear, RNN",
            exactness="exact",
            paper="Salimans & Kingma 2016",
            choose_when="recurrent nets, training without norms (fold-wn)",
            slowdown=Slowdown(1.0, 1.2, _FOLD),
        ),
    )
}
RECURRENT_FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            name="ln",
            becomes="LSTM, GRU with layer norm inside",
            exactness="approximate",
            paper="Ba et al. 2016",
            choose_when="long sequences, small batches",
        ),
    )
}
"""What a recurrent layer can become, beside whatever the target is."""

PLAIN_FORM = Form("plain", "torch's own layer", "exact", "", "deployment")
"""What `normswap.fold` makes of norms and of weights; no user names it."""

TARGET_FORMS: dict[str, tuple[Form | None, Form | None]] = {
    name: (norm, weight)
    for norm in (None, *NORM_FORMS.values())
    for weight in (None, *WEIGHT_FORMS.values())
    if (name := "-".join(form.name for form in (norm, weight) if form is not None))
}
"""Every target by name: each norm form, each weight form, and each pair of them."""


def describe_slowdown(target: str) -> str:
    """What a target costs in training, a sentence; "" where that is no more than BatchNorm, and for an unknown name."""
    parts = [
        f"{form.slowdown.least} to {form.slowdown.most} times as long with {form.name} ({form.slowdown.remedy})"
        for form in TARGET_FORMS.get(target, ())
        if form is not None and form.slowdown is not None
    ]
    return f"on a CPU a training step takes {', '.join(parts)}" if parts else ""
