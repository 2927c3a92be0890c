"""What to pick, and why. A new piece of advice is one function in `ADVICE_RULES`, or a row in `FOR_BATCH_NORM`.

What it says follows the tables of `tests/bench/README.md` (`fine_tune`, `retention`, `calibrated`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from normswap.report.inspection import Advice, Layer, Outcome
from normswap.report.path_patterns import span
from normswap.report.wording import plural

_MANY_POINTS = 0.25  # the share of norms from which 1×1 maps shape a choice


@dataclass(frozen=True)
class Facts:
    """What the advice goes by."""

    layers: Sequence[Layer]  # every norm and weight layer
    outcomes: Mapping[str, Outcome]  # by target
    batch_norms: Sequence[Layer]
    recurrent: Sequence[Layer]  # those that can have layer norm inside
    recurrent_weights: Sequence[Layer]  # those whose weights can be normalized
    along_time: Sequence[str]  # paths of norms where positions have to stay apart
    repeated: Sequence[str]  # paths of norms that one forward calls more than once


def small_batches(facts: Facts) -> Advice | None:
    if not facts.outcomes["gn"].norms:
        return None
    choose, why = "gn", "its statistics come from one sample, so the size of the batch does not matter"
    if facts.outcomes["ws"].weights:
        choose, why = "gn-ws", "best when fine-tuned at batch 1 to 4, as measured; briefly, with --for use"
    return Advice("small batches (1 to 8)", choose, why)


def deployment(facts: Facts) -> Advice | None:
    outcome = facts.outcomes["fold"]
    if not outcome.norms and not outcome.weights:
        return None
    if not outcome.norms:
        why = f"exact and faster: {plural(outcome.weights, 'weight')} computed once, for torch's own layers"
        return Advice("deployment", "fold", why)
    norms = sum(layer.kind == "norm" for layer in facts.layers)
    some = "all norms go" if outcome.norms == norms else f"{outcome.norms} of {norms} norms go"
    return Advice("deployment", "fold", f"exact and faster: {some} into the layers before them")


def recurrence(facts: Facts) -> Advice | None:
    if facts.repeated and facts.batch_norms:
        first = facts.repeated[0]
        why = f"{first} is called several times in a forward, and batch norm has one statistic for all of them"
        return Advice("norms used again and again", "gn", why)
    if facts.recurrent:
        what = ", ".join(sorted({layer.module for layer in facts.recurrent}))
        why = f"layer norm inside {what} makes long sequences stable; approximate, so give data with --calibrate"
        return Advice("recurrent layers", "--recurrent ln", why)
    return None


def recurrent_weights(facts: Facts) -> Advice | None:
    if not facts.recurrent_weights:
        return None
    what = ", ".join(sorted({layer.module for layer in facts.recurrent_weights}))
    why = (
        f"exact: the length of each row of the weights of {what} becomes a parameter; ws --layers rnn standardizes them"
    )
    return Advice("weights of recurrent layers", "wn --layers rnn", why)


def sequences(facts: Facts) -> Advice | None:
    if not facts.along_time:
        return None
    why = "gn, ln, in and bcn take statistics along time: outputs would depend on later positions and on padding"
    return Advice("causal, streamed, padded or masked sequences", "pn, frozen or est", why)


def without_training(facts: Facts) -> Advice | None:
    groups = [layer.auto_groups for layer in facts.layers if layer.auto_groups]
    if not groups or not facts.batch_norms:
        return None
    training, use = (span([numbers[purpose] for numbers in groups]) for purpose in ("training", "use"))
    why = f"groups per norm: {use} keeps most without training, {training} to train on"
    depthwise = [c for c in facts.layers if c.kind == "weight" and (c.groups or 0) > 1 and c.groups == c.channels]
    if depthwise:
        why = f"{why}; {len(depthwise)} depthwise layers: several groups keep less there, and --ws strict little"
    return Advice("use right after the conversion", "gn --for use, or --calibrate", why)


def pointlike(facts: Facts) -> Advice | None:
    norms = [layer for layer in facts.layers if layer.kind == "norm"]
    small = [norm for norm in norms if norm.spatial and max(norm.spatial) == 1]
    if len(small) < max(1, _MANY_POINTS * len(norms)):
        return None
    where = f"{len(small)} of {len(norms)} norms read 1×1 maps"
    why = f"{where}, so that a group has few elements: take few groups, and avoid in"
    return Advice("many 1×1 maps", "ln, or gn --groups 1", why)


FOR_BATCH_NORM = (
    Advice("large batches", "keep BatchNorm",
           "from 16 samples a device on, nothing is better and nothing is faster"),
    Advice("a short fine-tuning near the original data", "frozen",
           "exact; worse than the others if your data differ much"),
    Advice("private or federated training", "gn, or gn-ws",
           "no sample and no client depends on another; Opacus also needs activations with inplace=False"),
    Advice("you have some data", "--calibrate PATH",
           "a few hundred samples without labels win back most of what gn, ln and bcn lose"),
)  # fmt: skip
"""For every model with batch norms."""
ADVICE_RULES: tuple[Callable[[Facts], Advice | None], ...] = (
    sequences, recurrence, recurrent_weights, without_training, pointlike, deployment,
)  # fmt: skip


def advise(facts: Facts) -> tuple[Advice, ...]:
    """What to pick in which situation: what goes for every model with batch norms, and what this one's layers say."""
    general = (small_batches(facts), *FOR_BATCH_NORM) if facts.batch_norms else ()
    return tuple(advice for advice in (*general, *(rule(facts) for rule in ADVICE_RULES)) if advice is not None)
