"""The first two phases: what is in a model, and what runs of it show."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from normswap.analysis.dataflow import find_flow
from normswap.analysis.flow import Flow
from normswap.analysis.noise import guess_inputs
from normswap.analysis.running import Observed, Seen, Sketches, batch_size, calls_outside, inputs_like, run_model
from normswap.analysis.selection import hidden_layers, select, shared_tensors
from normswap.analysis.sites import Site, find_sites
from normswap.calibration.batches import Batches, further_batches
from normswap.calibration.likeness import Unlikeness, unlikeness
from normswap.calibration.measuring import Measured, measure_norms, measure_recurrent
from normswap.calibration.model_inputs import first_inputs
from normswap.conversion.accounting import class_names, count_elements
from normswap.conversion.request import Noise, Phase, Request
from normswap.errors import ModelError
from normswap.layers.norms import RUNNING_NORMS
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.recurrent_matching import VectorMoments
from normswap.report.report import Left
from normswap.target_table import NORM_FORMS, PLAIN_FORM
from normswap.targets.groups import numbers_to_measure


@dataclass(frozen=True)
class Survey:
    """What is in a model, before anything is changed."""

    model: nn.Module
    """The model that will be changed: a copy, unless the conversion is in place."""
    sites: Sequence[Site]
    """Every norm and weight layer."""
    chosen: frozenset[Site]
    """Those that the user's patterns choose."""
    excluded: frozenset[Site]
    """Those that the user's patterns exclude."""
    flow: Flow
    """How layers are connected."""
    shared: frozenset[int]
    """The ids of tensors that stand in several places."""
    hidden: Sequence[Left]
    """Layers in plain lists and attributes, where torch does not see them."""
    notices: Sequence[str]
    """Warnings about these."""
    class_names: Mapping[str, str]
    """The class of each module by its path."""
    elements: tuple[int, int]
    """How many elements parameters and buffers have."""


def survey_model(model: nn.Module, request: Request) -> Survey:
    """Find the norms and weight layers of `model`, what feeds them, and which of them the user means."""
    request.begin(Phase.FIND)
    sites = find_sites(model)
    chosen, excluded = map(frozenset, select(sites, request.options.include, request.options.exclude))
    request.begin(Phase.TRACE)
    flow = find_flow(model, sites)
    if not request.folds_in_parts:
        flow = flow.doubting(
            flow.in_parts, "only its block could be traced, and folded there the output moves on noise"
        )
    hidden, notices = hidden_layers(model)
    names, elements, shared = class_names(model), count_elements(model), shared_tensors(model)
    return Survey(model, sites, chosen, excluded, flow, shared, hidden, notices, names, elements)


@dataclass(frozen=True)
class Evidence:
    """What runs of the model before the conversion show."""

    batches: Batches
    """The calibration data, as the model takes them."""
    inputs: Any
    """What the model is run on before and after, or None."""
    inputs_name: str
    """How the report calls it."""
    output: Any
    """The model's output on it."""
    sketches: Sketches
    """Some elements of the outputs of layers that may change, by path."""
    seen: Mapping[str, Seen]
    """The sizes that norms saw, by path."""
    measured: Mapping[str, Measured]
    """What the calibration data showed of norms, by path."""
    vectors: Mapping[str, Mapping[str, VectorMoments]]
    """What the calibration data showed of recurrent layers, by path."""
    noise: Noise = ""
    """Whether the inputs are noise, and of a shape that was guessed."""
    outside: frozenset[str] = frozenset()
    """Sites that the run has called outside of the parts of the model whose traces tell of them."""
    seconds: float = 0.0
    """How long all of it took."""
    unlikeness: Unlikeness | None = None
    """How far the calibration data are from what the norms have learnt; None where nothing tells."""

    @property
    def refused(self) -> Unlikeness | None:
        """How unlike data are on which nothing is chosen and to which nothing is fitted; None of those that serve."""
        return self.unlikeness if self.unlikeness is not None and self.unlikeness.is_refused else None

    @property
    def made_up(self) -> bool:
        """Whether the inputs are noise of a guessed shape, on which nobody has asked for a run."""
        return self.noise == "guessed"

    @property
    def tells_of_exactness(self) -> bool:
        """Whether a run on inputs of the user's shows what is not exact."""
        return self.inputs is not None and not self.made_up


def gather_evidence(survey: Survey, request: Request) -> Evidence:
    """Run the model on the example inputs and on the calibration data; raises `ModelError` where it does not run."""
    options, model, begun = request.options, survey.model, time.monotonic()
    batches = _as_inputs(model, options.calibrate or ())
    inputs, name, noise = _inputs_of(survey, request, batches)
    made_up = noise == "guessed"
    seen, observed, outside = dict(request.recorded.seen), Observed(None, {}, {}), set[str]()
    if inputs is not None:
        request.begin(Phase.RUN_BEFORE)
        try:
            with calls_outside(model, survey.flow.in_parts) as outside:
                observed = _run_before(survey, request, inputs, made_up)
            seen |= {} if made_up else observed.seen
        except ModelError:
            if not made_up:
                raise
            inputs = None  # the guess was wrong, which is no fault of the model
    measured, vectors, unlike = dict(request.recorded.measured), {}, None
    if options.calibrate is not None:
        request.begin(Phase.MEASURE)
        on_data = _measure_norms(survey, request, batches)
        unlike = unlikeness(survey.sites, on_data, sum(map(batch_size, batches)))
        if unlike is not None and unlike.is_refused:
            on_data = {path: replace(norm, errors={}, gains={}) for path, norm in on_data.items()}
        measured |= on_data
        if options.recurrent:
            inner = [site for site in survey.chosen if site.base in LAYER_NORMALIZED and not site.obstacle]
            vectors = measure_recurrent(model, batches, inner)
        seen = {path: norm.seen for path, norm in measured.items()} | seen
    return Evidence(
        batches, inputs, name, observed.output, observed.sketches, seen, measured, vectors, noise,
        frozenset(outside), time.monotonic() - begun, unlike,
    )  # fmt: skip


def _as_inputs(model: nn.Module, data: Sequence[Any]) -> Batches:
    """Batches as `model` takes them."""

    def prepared(batch: Any) -> Any:
        return inputs_like(model, first_inputs(model, batch))

    return Batches(map(prepared, data), map(prepared, further_batches(data)))


def _inputs_of(survey: Survey, request: Request, batches: Sequence[Any]) -> tuple[Any, str, Noise]:
    """What the model is run on before and after, or None, with its name, and whether it is noise."""
    if request.examples is not None:
        return inputs_like(survey.model, first_inputs(survey.model, request.examples)), request.inputs_name, ""
    if request.example_inputs is not None:
        return request.example_inputs, request.inputs_name, request.noise
    if batches:
        return batches[0], f"the calibration data's first batch of {batch_size(batches[0])}", ""
    if _folds_in_parts(survey, request) and (noise := guess_inputs(survey.model)) is not None:
        return *noise, "guessed"
    return None, "", ""


def _folds_in_parts(survey: Survey, request: Request) -> bool:
    """Whether a norm or a layer may go into a layer of which only traces of parts of the model tell."""
    plain = request.target.norm is PLAIN_FORM
    folds = plain or request.target.norm is NORM_FORMS["fold"]
    if not folds or request.recorded.changes or any(p.is_meta for p in survey.model.parameters()):
        return False
    flow, told_in_parts = survey.flow, survey.flow.in_parts
    in_parts = [site for site in survey.chosen if site.path in told_in_parts]
    norms = [site for site in in_parts if site.kind == "norm" and (not plain or site.base in RUNNING_NORMS)]
    merges = not plain and any(site.kind == "weight" and len(flow.parallel(site.path)) > 1 for site in in_parts)
    return merges or any(flow.feeders(norm.path)[0] for norm in norms)


def _run_before(survey: Survey, request: Request, inputs: Any, unasked: bool) -> Observed:
    """The output, the sizes that norms saw, and some elements of what the layers put out that the target changes."""
    kind = "norm" if request.target.norm else "weight"
    tapped = [site.path for site in survey.sites if site.kind == kind]
    return run_model(survey.model, inputs, survey.sites, unasked, taps=tapped)


def _measure_norms(survey: Survey, request: Request, batches: Sequence[Any]) -> dict[str, Measured]:
    norms = [site for site in survey.sites if site.kind == "norm" and site.form and not site.obstacle]
    numbers = numbers_to_measure(request.target.norm, request.options)
    return measure_norms(survey.model, batches, norms, numbers, request.options.shrinks)
