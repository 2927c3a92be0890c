"""The fit of the new norms to the original's outputs on calibration data."""

import warnings
from dataclasses import replace

from torch import nn

from normswap.analysis.copies import clone
from normswap.analysis.running import batch_size
from normswap.calibration import processes
from normswap.calibration.distillation import LEAST_SAMPLES, FitSettings, distill
from normswap.conversion.evidence import Evidence
from normswap.conversion.planning import Plan
from normswap.conversion.request import Phase, Request
from normswap.printable import printable
from normswap.report.report import Calibration


def keep_original(model: nn.Module, plan: Plan, evidence: Evidence, request: Request) -> tuple[nn.Module | None, Plan]:
    """The model as it is before the conversion, where the new norms are fitted to it; None where they are not.

    The plan comes back with a notice where the data are not the network's own, and where a model that is converted in
    place cannot be copied.
    """
    options = request.options
    if options.calibrate is None or options.transfer != "match" or not plan.fitted:
        return None, plan
    if evidence.refused is not None:
        notice = (
            f"the calibration data are {evidence.refused}: nothing is chosen or fitted on them; give inputs such as "
            "the model was trained on, prepared as it takes them"
        )
        warnings.warn(printable(notice), stacklevel=5)  # seen where `convert` was called
        return None, replace(plan, notices=[*plan.notices, notice])
    if 0 < (samples := sum(map(batch_size, evidence.batches))) < LEAST_SAMPLES:
        notice = (
            f"measured on {samples} sample{'s' * (samples > 1)}: too few to choose groups by; give at least "
            f"{LEAST_SAMPLES}, better some hundred"
        )
        plan = replace(plan, notices=[*plan.notices, notice])
    if options.calibrate_seconds <= 0:
        return None, plan
    if not request.inplace:
        return model, plan
    try:
        return clone(model), plan
    except Exception as error:  # an attribute of the model that cannot be copied
        notice = f"not calibrated: that needs a copy of the model, which fails ({type(error).__name__}: {error})"
        return None, replace(plan, notices=[*plan.notices, notice])


def calibrate(
    original: nn.Module | None, work: nn.Module, plan: Plan, evidence: Evidence, request: Request
) -> Calibration | None:
    """Fit the new norms of `work` to `original` on the calibration data; None where there is nothing to fit.

    The fit gets what the runs of the model before it have left of the time.
    """
    if evidence.refused is not None and plan.fitted and request.options.transfer == "match":
        samples, note = sum(map(batch_size, evidence.batches)), "the data are not like the model's own"
        return Calibration(samples, 0, "matched", unlikeness=evidence.refused.median, note=note)
    if original is None:
        return None
    unlike = evidence.unlikeness.median if evidence.unlikeness and evidence.unlikeness.is_telling else None
    request.begin(Phase.CALIBRATE)

    def tell(share: float) -> None:
        request.progress(f"{Phase.CALIBRATE.value}: {share:.0%}")

    def fit() -> Calibration:
        settings = FitSettings(max(0.0, request.options.calibrate_seconds - evidence.seconds))
        fitted = distill(original, work, evidence.batches, plan.fitted, settings, tell)
        return replace(fitted, seconds=evidence.seconds + fitted.seconds, unlikeness=unlike)

    return processes.fit_in_first(fit, work, plan.fitted) if request.on_all_processes else fit()
