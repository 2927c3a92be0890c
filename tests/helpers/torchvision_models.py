"""What must hold of a conversion of any model of torchvision."""

from pathlib import Path

import torch
from helpers.checks import check_named
from helpers.nets import randomize
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import normswap
from normswap.analysis.drift import floating_tensors
from normswap.analysis.noise import guess_inputs
from normswap.analysis.running import call_model, eval_mode
from normswap.checkpoints import reading
from normswap.files import model_specs

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
TARGETS = ["gn-ws", "fold"]  # gn-ws does to norms what gn does
SIZES = {"raft": (1, 3, 128, 128), "inception": (2, 3, 299, 299), "maxvit_t": (1, 3, 224, 224)}
SIZES |= dict.fromkeys(("mc3", "r2plus1d", "r3d"), (1, 3, 4, 32, 32)) | {"s3d": (1, 3, 16, 224, 224)}


SMALL_MODELS = [
    "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "quantized_resnet18", "mc3_18", "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large",
]  # fmt: skip
"""One small model of each way to build a network with batch norm."""


def has_batch_norm(name: str) -> bool:
    """Told from a model on meta. RegNet computes a number from a tensor as it is built, which meta cannot."""
    if name.startswith("regnet"):
        return True
    with torch.device("meta"):
        return any(isinstance(m, BATCH_NORMS) for m in skeleton(name).modules())


def skeleton(name: str) -> nn.Module:
    return model_specs.build(f"torchvision:{name}")


def inputs_for(name: str, model: nn.Module) -> object:
    size = next((s for prefix, s in SIZES.items() if prefix in name), (2, 3, 64, 64))
    if is_detection(model):
        size = (1, 3, 96, 96)
        model.transform.min_size, model.transform.max_size = (128,), 160
    guess = guess_inputs(model, size)
    assert guess is not None
    return guess[0]


def finite(output: object) -> bool:
    tensors = floating_tensors(output)
    return bool(tensors) and all(t.isfinite().all() for t in tensors)


def train_step(name: str, model: nn.Module, inputs: object) -> object:
    if is_detection(model):
        target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, 96, 96, dtype=torch.uint8)
        target["keypoints"] = torch.tensor([[[20.0, 20.0, 1.0]] * 17])
        return model(inputs[0], [target])
    return call_model(model, inputs)


def check_conversions(name: str) -> None:
    """Each target names and changes every norm, leaves the model alone, gives finite outputs, and loads."""
    torch.manual_seed(0)
    model = randomize(model_specs.build(f"torchvision:{name}"))
    inputs = inputs_for(name, model)
    before = features(model, inputs)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    norms = {p for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, BATCH_NORMS)}
    for target in TARGETS:
        converted, report = normswap.convert(model, target)
        check_untouched(model, state, norms)
        check_named(converted, report)
        still = {p for p, m in converted.named_modules(remove_duplicate=False) if isinstance(m, BATCH_NORMS)}
        assert still <= {left.path for left in report.left}
        if target != "fold":
            assert not still, "every batch norm of torchvision becomes a GroupNorm"
        with torch.no_grad():
            assert finite(call_model(converted.eval(), inputs))
            if target == "fold":
                check_equal(before, features(converted, inputs))
            assert finite(train_step(name, converted.train(), inputs))
        check_loads(name, target, converted)


def check_untouched(model: nn.Module, state: dict[str, torch.Tensor], norms: set[str]) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in state)
    assert norms == {p for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, BATCH_NORMS)}


def features(model: nn.Module, inputs: object) -> object:
    """What to compare: the output; for detection the features, since boxes of equal score may change places."""
    with eval_mode(model):
        return model.backbone(inputs[0][0][None]) if is_detection(model) else call_model(model, inputs)


def is_detection(model: nn.Module) -> bool:
    return type(model).__module__.startswith("torchvision.models.detection")


def check_equal(before: object, after: object) -> None:
    old, new = floating_tensors(before), floating_tensors(after)
    assert [t.shape for t in old] == [t.shape for t in new]
    for a, b in zip(old, new, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6


def check_loads(name: str, target: str, converted: nn.Module) -> None:
    if name.startswith("regnet"):
        fresh = skeleton(name).to("meta")
    else:
        with torch.device("meta"):
            fresh = skeleton(name)
    normswap.convert(fresh, target).model.load_state_dict(converted.state_dict(), strict=True, assign=True)


def check_they_load_back_safely(names: list[str], folder: Path) -> None:
    """Whole models, on meta and in one file, as it is read where nothing is trusted."""
    with torch.device("meta"):
        everything = nn.ModuleList(skeleton(name) for name in names if not name.startswith("regnet"))
    for tensor in (*everything.parameters(), *everything.buffers()):
        assert tensor.is_meta
    torch.save(everything, folder / "models.pt")
    assert len(reading.read_checkpoint(folder / "models.pt").content) == len(everything)
