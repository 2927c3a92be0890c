"""What a norm and a weight can become, as tables: read by the help, `normswap targets` and the targets.

A new form is one function, in `norm_forms` or `weight_forms`, and one row here. No torch: the tables are shown without it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slower:
    """How long a training step takes on a CPU, as a multiple of one without the form: least and most over batch sizes and
    layouts, as `tests/bench` measured a ResNet-50; and what helps.
    """

    least: float
    most: float
    remedy: str


@dataclass(frozen=True)
class Form:
    """A row: what a norm or a weight becomes, how a user knows whether to want it, the function that plans it, and what it costs."""

    name: str
    becomes: str
    exactness: str
    paper: str
    choose_when: str
    function: str
    slower: Slower | None = None


_LAYOUT = "less in the contiguous layout than in channels-last"
_FOLD = "for use, normswap fold takes it away"

NORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            "gn",
            "GroupNorm",
            "approximate, moment-matched",
            "Wu & He 2018",
            "small batches, private or federated training",
            "to_group_norm",
        ),
        Form(
            "ln",
            "GroupNorm with one group",
            "approximate, moment-matched",
            "Ba et al. 2016",
            "the most of the function before training",
            "to_layer_norm",
        ),
        Form(
            "in",
            "InstanceNorm",
            "approximate, moment-matched",
            "Ulyanov et al. 2016",
            "style transfer, contrast that should not matter",
            "to_instance_norm",
            Slower(1.1, 1.7, _LAYOUT),
        ),
        Form(
            "est",
            "EstimatedBatchNorm",
            "exact",
            "Qiao et al. 2019",
            "batch 1 without another norm",
            "to_estimated",
            Slower(1.1, 1.3, _FOLD),
        ),
        Form(
            "bcn",
            "BatchChannelNorm",
            "approximate, moment-matched",
            "Qiao et al. 2019",
            "batch 1 and 2, best with ws",
            "to_batch_channel",
            Slower(1.2, 1.5, _LAYOUT),
        ),
        Form(
            "bn",
            "BatchNorm",
            "approximate, needs data; exact from frozen, est",
            "Ioffe & Szegedy 2015",
            "large batches, speed; the way back",
            "to_batch_norm",
        ),
        Form(
            "frozen",
            "FrozenBatchNorm",
            "exact",
            "He et al. 2017",
            "short fine-tuning near the original data",
            "to_frozen",
        ),
        Form(
            "fold",
            "nothing: into the layer before it",
            "exact",
            "Ioffe & Szegedy 2015",
            "deployment, or training without norms",
            "to_folded",
        ),
    )
}
WEIGHTS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            "ws",
            "Standardized Conv, Linear, RNN",
            "exact; approximate with ws=strict",
            "Qiao et al. 2019",
            "GroupNorm at batch 1 and 2",
            "to_standardized",
            Slower(1.1, 1.2, _FOLD),
        ),
        Form(
            "wn",
            "Normalized Conv, Linear, RNN",
            "exact",
            "Salimans & Kingma 2016",
            "recurrent nets, training without norms (fold-wn)",
            "to_normalized",
            Slower(1.0, 1.2, _FOLD),
        ),
    )
}
RECURRENT: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            "ln",
            "LSTM, GRU with layer norm inside",
            "approximate",
            "Ba et al. 2016",
            "long sequences, small batches",
            "to_layer_normalized",
        ),
    )
}
"""What a recurrent layer can become, beside whatever the target is."""


PLAIN_NORM = Form("plain", "torch's own layer", "exact", "", "deployment", "to_plain_norm")
PLAIN_WEIGHT = Form("plain", "torch's own layer", "exact", "", "deployment", "to_plain_weight")
"""What `normswap.fold` makes of layers; nobody names them."""


TARGET_FORMS: dict[str, tuple[Form | None, Form | None]] = {
    name: (norm, weight)
    for norm in (None, *NORMS.values())
    for weight in (None, *WEIGHTS.values())
    if (name := "-".join(form.name for form in (norm, weight) if form is not None))
}
"""Every target by name: each norm form, each weight form, and each pair of them."""


def slowdown(target: str) -> str:
    """What a target costs in training, a sentence; "" where that is no more than BatchNorm does, and for what is no target."""
    parts = [
        f"{form.slower.least} to {form.slower.most} times as long with {form.name} ({form.slower.remedy})"
        for form in TARGET_FORMS.get(target, ())
        if form is not None and form.slower is not None
    ]
    return f"on a CPU a training step takes {', '.join(parts)}" if parts else ""
