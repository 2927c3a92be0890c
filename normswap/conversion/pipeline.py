"""The story of a conversion: look, decide, build all, replace once, prove, calibrate, measure."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from normswap.analysis.running import inputs_like
from normswap.analysis.selection import check_model, copy_of
from normswap.conversion.audit import check_exact_half, is_steady, measure_drift, prove_nothing_missed
from normswap.conversion.calibrate import calibrate, keep_original
from normswap.conversion.device import home_of, move
from normswap.conversion.evidence import Evidence, Survey, gather_evidence, survey_model
from normswap.conversion.planning import plan_conversion
from normswap.conversion.reporting import make_report
from normswap.conversion.request import Phase, Request
from normswap.conversion.surgery import replace_layers
from normswap.errors import ModelError
from normswap.printable import printable
from normswap.report.report import Report
from normswap.training.opacus import register_if_imported


class Conversion(NamedTuple):
    """The converted model, and the report of what changed."""

    model: nn.Module
    report: Report


@contextmanager
def undisturbed() -> Iterator[None]:
    """Meanwhile no garbage collection, which would look at each of the many small objects again and again.

    And no inference mode of the caller's: tensors that are made in it could never be trained.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            yield
    finally:
        if was:
            gc.enable()


def _with_more_care(request: Request, survey: Survey, evidence: Evidence) -> Request | None:
    """A request for the same that leaves what may have gone wrong; None where nothing is in doubt."""
    if evidence.made_up and request.folds_in_parts and survey.flow.in_parts:
        return replace(request, folds_in_parts=False)
    if evidence.tells_of_exactness and not request.heeds_type_tests and survey.flow.type_tests:
        return replace(request, heeds_type_tests=True)
    return None


@undisturbed()
def run(model: nn.Module, request: Request) -> Conversion:
    """Convert `model` as `request` says; nothing changes unless all of it can. `normswap.convert` tells the errors."""
    check_model(model)
    if request.device is not None:
        return _run_elsewhere(model, request, request.device)
    request.begin(Phase.COPY)
    work = model if request.inplace else copy_of(model)
    survey = survey_model(work, request)
    for notice in survey.notices:
        warnings.warn(printable(notice), stacklevel=4)  # seen where `convert` was called
    evidence = gather_evidence(survey, request)
    plan = plan_conversion(survey, evidence, request)
    original, plan = keep_original(model, plan, evidence, request)
    request.begin(Phase.REPLACE)
    exact, others = plan.halves()
    replace_layers(exact, request)
    try:
        if exact and others and evidence.inputs is not None:
            check_exact_half(work, model, evidence)
        replace_layers(others, request)
        prove_nothing_missed(work, plan, request.target, request.options)
        calibration = calibrate(original, work, plan, evidence, request)
        drift = measure_drift(work, plan, evidence, request)
    except ModelError:
        if request.inplace or not (careful := _with_more_care(request, survey, evidence)):
            raise
        if not evidence.made_up or is_steady(model, evidence):
            return run(model, careful)
        drift = None  # noise tells nothing of a model that selects by small differences, as detectors do
    register_if_imported()
    return Conversion(work, make_report(survey, plan, calibration, drift, request))


def _run_elsewhere(model: nn.Module, request: Request, device: torch.device) -> Conversion:
    """`run` on another device: the model, or a copy of it, goes there with the inputs, and comes back."""
    home, there = home_of(model), model if request.inplace else copy_of(model)
    try:
        inputs = inputs_like(move(there, device), request.example_inputs)
        work, report = run(there, replace(request, device=None, example_inputs=inputs))
    finally:
        if request.inplace:
            move(model, home)
    return Conversion(move(work, home), report)
