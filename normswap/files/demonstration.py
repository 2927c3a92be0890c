"""What `demo:digits` brings along: pictures to measure on and to calibrate with, and how many it still reads."""

from dataclasses import replace
from types import ModuleType
from typing import Any, TypeGuard

from torch import Tensor, nn

from normswap.analysis.running import eval_mode
from normswap.conversion.pipeline import run
from normswap.conversion.request import Request
from normswap.errors import OptionError
from normswap.files.file_request import FileRequest
from normswap.report.report import Accuracy, Report
from normswap.targets.options import Options


def is_demo(source: object) -> TypeGuard[str]:
    """Whether `source`, a path or a spec, names a demo: its network, or its data."""
    return isinstance(source, str) and source.startswith("demo:")


def held_out_pictures(source: str) -> tuple[Tensor, str]:
    """Pictures (N, 1, 8, 8) that the network was not trained on, and what they are."""
    pictures, _ = _demo(source).held_out()
    return pictures, f"{len(pictures)} held-out digits"


def training_pictures(source: str) -> Tensor:
    """Pictures (N, 1, 8, 8) that the network was trained on, without labels."""
    pictures: Tensor = _demo(source).training_pictures()
    return pictures


def _demo(source: str) -> ModuleType:
    """The package of the demo, whose files are read by those alone who ask for it."""
    from normswap import demo

    if source != "demo:digits":
        raise OptionError(f"{source}: there is one demo, demo:digits")
    return demo


def with_accuracy(report: Report, source: object, converted: nn.Module, request: FileRequest) -> Report:
    """The report on a conversion of the demo with how often the network is right, before and after.

    Where gain and bias were matched, also after the other ways. Other reports come back as they are.
    """
    if not is_demo(source):
        return report
    demo = _demo(source)
    pictures, labels = demo.held_out()

    def accuracy(model: nn.Module) -> float:
        with eval_mode(model):
            right = model(pictures).argmax(1) == labels
        return float(right.double().mean())

    def after(transfer: Any) -> float:
        default = Options().calibrate_seconds
        options = replace(request.options, transfer=transfer, calibrate=None, calibrate_seconds=default)
        return accuracy(run(demo.make_network(), Request(request.target, options)).model)

    _, name = held_out_pictures(source)
    compared = request.target.norm is not None and request.options.transfer == "match" and not report.exact
    others = {"reset": after("reset"), "copied": after("copy")} if compared else {}
    return replace(report, accuracy=Accuracy(name, accuracy(demo.make_network()), accuracy(converted), **others))
