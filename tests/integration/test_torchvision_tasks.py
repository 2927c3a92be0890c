"""torchvision's detection and segmentation models: trained at batch 1 after a conversion; frozen backbones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.checks import check_named, distance
from helpers.nets import randomize
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import normswap

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
SIDE = 64
SMALL = {"num_classes": 2, "min_size": SIDE, "max_size": SIDE}
FEW = {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_train": 32}
"""Regions whose heads run in training; torchvision's 512 take most of the time."""
DETECTION: dict[str, dict[str, Any]] = {
    "fasterrcnn_resnet50_fpn": SMALL | FEW,
    "fasterrcnn_resnet50_fpn_v2": SMALL | FEW,
    "maskrcnn_resnet50_fpn": SMALL | FEW,
    "keypointrcnn_resnet50_fpn": SMALL | FEW | {"num_keypoints": 2},
    "retinanet_resnet50_fpn_v2": SMALL,
    "fcos_resnet50_fpn": SMALL,
    "ssdlite320_mobilenet_v3_large": {"num_classes": 2},  # its size is fixed
}
SEGMENTATION = ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50"]
STEPS = 20


def picture() -> Tensor:
    """One bright square on noise."""
    image = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.4
    image[:, 16:48, 24:56] += 0.6
    return image


def mask() -> Tensor:
    square = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    square[16:48, 24:56] = 1
    return square


def detection_loss(model: nn.Module) -> Tensor:
    corners = torch.tensor([[[24.0, 16.0, 1.0], [55.0, 47.0, 1.0]]])
    boxes, labels = torch.tensor([[24.0, 16.0, 56.0, 48.0]]), torch.tensor([1])
    torch.manual_seed(0)  # the regions that are trained on are drawn
    losses = model([picture()], [{"boxes": boxes, "labels": labels, "masks": mask()[None], "keypoints": corners}])
    assert losses and all(loss.isfinite() for loss in losses.values()), losses
    return torch.stack(list(losses.values())).sum()


def segmentation_loss(model: nn.Module) -> Tensor:
    loss = F.cross_entropy(model(picture()[None])["out"], mask().long()[None])
    assert loss.isfinite()
    return loss


def convert_to_train(model: nn.Module) -> nn.Module:
    """As gn-ws, with everything that it must name named, ready to train at batch 1."""
    norms = {path for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, BATCH_NORMS)}
    assert norms
    converted, report = normswap.convert(model, "gn-ws")
    check_named(converted, report)
    assert norms <= {path for change in report.changes for path in change.paths}
    assert not any(isinstance(m, BATCH_NORMS) for m in converted.modules())
    return converted.train()


def check_learns(model: nn.Module, loss: Callable[[nn.Module], Tensor], rate: float) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9)
    first = loss(model).item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        nn.utils.clip_grad_norm_(trained, 5.0)  # fresh heads begin with large gradients
        optimizer.step()
    assert loss(model).item() < 0.9 * first


@pytest.mark.parametrize("name", DETECTION)
def test_detection_learns_at_batch_1(name: str) -> None:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, weights_backbone=None, **DETECTION[name])
    check_learns(convert_to_train(model), detection_loss, 2e-3)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_learns_at_batch_1(name: str) -> None:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=2)
    check_learns(convert_to_train(model), segmentation_loss, 1e-2)


# ---- backbones with batch norm, frozen and not ----


def backbone(norm: type[nn.Module], trainable: int, **arguments: Any) -> nn.Module:
    return resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=trainable, **arguments
    )


def faster_rcnn(norm: type[nn.Module], trainable: int) -> nn.Module:
    few = {"box_score_thresh": 0.0, "box_detections_per_img": 10}
    return FasterRCNN(backbone(norm, trainable), **SMALL, **few, **FEW)


def retinanet(norm: type[nn.Module], trainable: int) -> nn.Module:
    levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    return RetinaNet(backbone(norm, trainable, **levels), **SMALL, score_thresh=0.0, detections_per_img=10)


DETECTORS = {"faster": faster_rcnn, "retina": retinanet}
NORMS = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}


@functools.lru_cache(maxsize=1)
def detector(name: str, norm: str, trainable: int = 3) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in float64 with statistics, and what it finds: rounding cannot make two boxes change places."""
    torch.manual_seed(0)
    model = randomize(DETECTORS[name](NORMS[norm], trainable)).double().eval()
    return model, detections(model)


def detections(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        [found] = model([picture().double()])
    return found


def check_report(model: nn.Module, converted: nn.Module, report: normswap.Report) -> None:
    """Every layer is named, the pyramid's and the heads' too; what is trainable is what was trainable before."""
    check_named(converted, report)
    beside = {path for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and "backbone.body" not in path}
    assert any("fpn" in path for path in beside) and any("head" in path for path in beside)
    if report.target in ("gn", "frozen"):  # which are not to change convolutions
        assert not beside & {left.path for left in report.left}
    if report.target == "gn-ws":
        assert beside <= {left.path for left in report.left}
        assert {left.reason for left in report.left if left.path in beside} == {"has no normalization after it"}
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    after = {name: p.requires_grad for name, p in converted.named_parameters()}
    assert {name: after[name] for name in before.keys() & after.keys()} == {
        name: before[name] for name in before.keys() & after.keys()
    }
    new = {name for name in after.keys() - before.keys() if after[name]}
    assert all(before.get(name.replace(".bias", ".weight"), False) for name in new), (
        f"trained, of layers that were not: {new}"
    )


def check_loads(name: str, norm: str, trainable: int, target: str, converted: nn.Module) -> None:
    fresh = normswap.convert(DETECTORS[name](NORMS[norm], trainable).double(), target, inplace=True).model.eval()
    fresh.load_state_dict(converted.state_dict(), strict=True)
    expected, found = detections(converted), detections(fresh)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


EXACT = [("batch", "frozen"), ("batch", "fold"), ("frozen", "fold"), ("frozen", "frozen-ws")]


@pytest.mark.parametrize(("norm", "target"), EXACT, ids=[f"{norm}-to-{target}" for norm, target in EXACT])
@pytest.mark.parametrize("name", DETECTORS)
def test_exact_targets_find_the_same_boxes(name: str, norm: str, target: str) -> None:
    model, before = detector(name, norm)
    converted, report = normswap.convert(model, target)
    check_report(model, converted, report)
    check_loads(name, norm, 3, target, converted)
    assert report.exact and report.totals.norms_changed == (0 if (norm, target) == ("frozen", "frozen-ws") else 20)
    if target == "fold":
        assert not any(isinstance(m, BATCH_NORMS) for m in converted.modules())
    after = detections(converted)
    assert len(before["boxes"]) == 10
    assert torch.equal(before["labels"], after["labels"])
    for key in ("boxes", "scores"):
        torch.testing.assert_close(after[key], before[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", ["gn", "gn-ws"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", DETECTORS)
def test_group_norms_in_a_backbone(name: str, norm: str, target: str) -> None:
    model, before = detector(name, norm)
    converted, report = normswap.convert(model, target)
    check_report(model, converted, report)
    check_loads(name, norm, 3, target, converted)
    assert not report.exact and report.totals.norms_changed == 20
    assert sum(isinstance(m, nn.GroupNorm) for m in converted.modules()) == 20
    after = detections(converted)
    assert after["boxes"].isfinite().all() and after["scores"].isfinite().all()
    assert not torch.equal(before["scores"], after["scores"]), "a sample's statistics are not those of the data"


def test_gn_ws_is_gn() -> None:
    model, _ = detector("faster", "frozen")
    gn, both = (normswap.convert(model, target).model for target in ("gn", "gn-ws"))
    x = picture().double()[None]
    with torch.no_grad():
        for a, b in zip(gn.backbone(x).values(), both.backbone(x).values(), strict=True):
            assert distance(a, b) < 1e-9


def test_fixed_statistics_are_fixed_already() -> None:
    model, _ = detector("faster", "frozen")
    with pytest.raises(normswap.ModelError, match="20 FrozenBatchNorm2d: has fixed statistics already"):
        normswap.convert(model, "frozen")


@pytest.mark.parametrize("trainable", [0, 1, 3, 5])
@pytest.mark.parametrize("target", ["gn-ws", "fold"])
@pytest.mark.parametrize("norm", NORMS)
def test_trainable_layers_stay_those(norm: str, target: str, trainable: int) -> None:
    """What torchvision has frozen has no gradient after a step, and what it trains has one."""
    torch.manual_seed(0)
    model = randomize(faster_rcnn(NORMS[norm], trainable))
    converted, report = normswap.convert(model, target)
    check_report(model, converted, report)
    detection_loss(converted.train()).backward()
    stages = ["layer4", "layer3", "layer2", "layer1", "conv1"]
    for name, parameter in converted.backbone.body.named_parameters():
        trained = any(name.startswith(stage) for stage in stages[:trainable])
        if name.endswith(("conv1.weight", "conv2.weight")):
            assert (parameter.grad is not None) == trained, name
        elif not trained and not (trainable == 5 and name.startswith("bn1")):
            assert parameter.grad is None, name
    for part in (converted.backbone.fpn, converted.rpn, converted.roi_heads):
        assert all(p.grad is not None for p in part.parameters())


def test_gains_of_frozen_norms_stay_fixed_and_the_report_says_so() -> None:
    model, _ = detector("faster", "frozen")
    converted, report = normswap.convert(model, "gn")
    norms = [m for m in converted.modules() if isinstance(m, nn.GroupNorm)]
    assert norms and not any(p.requires_grad for m in norms for p in m.parameters())
    assert all("requires_grad_()" in change.note for change in report.changes if change.kind == "norm")
