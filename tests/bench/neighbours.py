"""What is proven with other libraries: the tests in tests/integration, run, with the versions that they ran with.

Run: python tests/bench/neighbours.py [--json] [--results FILE] [--only NAME]; about ten minutes. A row is a library or
an engine: which tests are its proof, how many passed, and the versions. A test that fails or is skipped for want of a
package ends the run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from common import Row, main

TESTS = Path(__file__).parents[1] / "integration"


@dataclass(frozen=True)
class Neighbour:
    """What a model comes from or goes to, the packages that are it, its tests, and what they prove in a line."""

    name: str
    packages: tuple[str, ...]
    tests: str
    proven: str


NEIGHBOURS = (
    Neighbour(
        "timm", ("timm",), "test_timm_families.py",
        "every family with BatchNorm: `gn`, `gn-ws`, `frozen`, `fold`; `timm:NAME`; activations in norms; its data "
        "config for calibration",
    ),
    Neighbour(
        "timm, folded further", ("timm",), "test_timm_folding.py",
        "RepVGG and MobileOne with one convolution a block, as timm's own `reparameterize` leaves; RepGhost, RepViT, "
        "MixNet without a norm left; `StdConv2d` of BiT and NF-nets baked in",
    ),
    Neighbour(
        "torchvision detection and segmentation", ("torchvision",), "test_torchvision_tasks.py",
        "training at batch 1 after `gn-ws`, with FPN and heads; frozen backbones",
    ),
    Neighbour(
        "transformers", ("transformers",), "test_transformers.py",
        "vision models and a detector, converted, trained, saved and loaded with the recipe",
    ),
    Neighbour(
        "segmentation-models-pytorch", ("segmentation-models-pytorch",), "test_segmentation_models.py",
        "U-Net and others, decoder included, trained at batch 1",
    ),
    Neighbour(
        "EfficientNet-PyTorch", ("efficientnet_pytorch", "segmentation-models-pytorch"), "test_efficientnet_pytorch.py",
        "convolutions that pad by themselves: `ws`, `wn` and `fold`, also in encoders of segmentation-models-pytorch",
    ),
    Neighbour(
        "ultralytics", ("ultralytics",), "test_ultralytics.py",
        "YOLO v5, v8, 11 without a norm left by `fold`; checkpoints converted with `--allow 'ultralytics.nn.*'`",
    ),
    Neighbour(
        "PointNet", ("torch",), "test_pointnet.py",
        "rebuilt: forwards that ask for shapes, folded entirely",
    ),
    Neighbour(
        "SlowFast", ("torch",), "test_slowfast.py",
        "rebuilt: its pathways; norms of split batches, left by norms within a sample and named",
    ),
    Neighbour(
        "vocoders", ("torch", "transformers"), "test_vocoders.py",
        "HiFi-GAN, rebuilt, and those of transformers: torch's `weight_norm`, hooks and parametrizations, baked in",
    ),
    Neighbour(
        "diffusion policy", ("torch",), "test_diffusion_policy.py",
        "checkpoints like its own: models, averages and optimizers one level down; its normalizers stay",
    ),
    Neighbour(
        "Lightning", ("lightning",), "test_lightning.py",
        "checkpoints of `Trainer.fit` converted and resumed; converted models trained",
    ),
    Neighbour(
        "Lightning and transformers, while they train", ("lightning", "transformers"), "test_trainer_callbacks.py",
        "`SwapNorms` converts before the first step; checkpoints load, resume and are folded at the end",
    ),
    Neighbour(
        "detectron2", ("torch",), "test_detectron2.py",
        "its backbones, rebuilt: norms that convolutions hold, exchanged and folded; frozen and synchronized ones; "
        "steps without proposals",
    ),
    Neighbour(
        "torch_geometric", ("torch_geometric",), "test_torch_geometric.py",
        "norms within its wrappers; those over a graph are named",
    ),
    Neighbour(
        "Opacus", ("opacus",), "test_opacus.py",
        "nothing left to complain of; gradients for each sample equal a loop's, `gn-ws` too, also by functorch; "
        "private training. Not `est` and `bcn`, which follow their samples, nor recurrent layers, nor operations in "
        "place, which its hooks do not allow",
    ),
    Neighbour(
        "federated averaging", ("torch",), "test_federated.py",
        "rounds on clients whose data differ; no state depends on a batch",
    ),
    Neighbour(
        "DDP, FSDP2, torchrun", ("torch",), "test_distributed.py",
        "a step on two processes equals one process's; conversion on meta, weights from a distributed checkpoint; "
        "calibration by all together. FSDP2 runs on a CPU from torch 2.7 on",
    ),
    Neighbour(
        "torch.compile", ("torch",), "test_compile_fullgraph.py",
        "`fullgraph=True`, no graph break, forward and backward equal to eager",
    ),
    Neighbour(
        "torch.export, ONNX, torch.jit.trace", ("torch", "onnx", "onnxruntime"), "test_export.py",
        "equal to eager, in onnxruntime to 1e-4, folded and not",
    ),
    Neighbour(
        "autocast, layouts, copies, EMA, torch.func", ("torch",), "test_amp_and_copies.py",
        "bfloat16 and float16, channels-last kept, pickle, hooks, `AveragedModel`, `vmap` over samples",
    ),
    Neighbour(
        "torch.optim", ("torch",), "test_optimizers.py",
        "`remap_optimizer` for optimizers made before, `param_groups` for new ones",
    ),
)  # fmt: skip


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    for neighbour in NEIGHBOURS:
        if arguments.only not in neighbour.name:
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(os.cpu_count()), "-rs", str(TESTS / neighbour.tests)]
        done = subprocess.run(command, cwd=TESTS.parents[1], capture_output=True, text=True)
        passed = re.search(r"(\d+) passed", done.stdout)
        if done.returncode or passed is None or "could not import" in done.stdout:
            raise SystemExit(f"{neighbour.name} is not proven:\n{done.stdout[-3000:]}")
        yield {
            "neighbour": neighbour.name, "versions": {name: version(name) for name in neighbour.packages},
            "tests": neighbour.tests, "passed": int(passed[1]), "proven": neighbour.proven,
        }  # fmt: skip


if __name__ == "__main__":
    main(__doc__, measure, only="")
