"""Writes the index by which state dicts are recognized: every network of torchvision and timm, by keys and shapes.

Each is made on the meta device with two numbers of classes, and what differs is what the number of classes decides.
Networks that share keys and shapes are run on the same noise with the same weights, which tells another padding or
activation: those of one function, and of one eps, are one entry, torchvision's name first, then the shortest.

    python tests/make_index.py [PATTERN]    # a pattern on names, such as 'resnet*', only prints what it finds
"""

import contextlib
import io
import json
import lzma
import sys
import warnings
import zlib
from collections import defaultdict
from fnmatch import fnmatch
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from normswap.errors import NormswapError
from normswap.files import model_specs
from normswap.files.architectures import INDEX, ClassDimension, Shapes, fingerprint, shapes_fingerprint, told_shapes

Network = tuple[str, dict[str, Any]]  # a spec and its arguments
TRIED = (1003, 1012)  # numbers of classes that no other size is likely to be
LARGEST = 150_000_000  # parameters of a network that is run
SAME = 1e-4
"""Relative distance of the outputs of one function; another padding or activation gives more."""
OPTIONS = {"googlenet": {"aux_logits": False}, "inception_v3": {"aux_logits": False}}
"""Arguments of torchvision's builders that change keys."""
DRAWING = {
    "normal_", "uniform_", "erfinv_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_",
    "xavier_normal_", "orthogonal_",
}  # fmt: skip
UNSEEN = {"googlenet": {"transform_input": True}, "inception_v3": {"transform_input": True}}
"""Arguments that published weights are made with, and keys do not tell: a network of its own."""


def networks(pattern: str) -> list[Network]:
    """All but detectors, whose published weights have other norms than the networks that their builders make anew."""
    found: list[Network] = []
    modules = (torchvision.models, torchvision.models.segmentation, torchvision.models.video)
    for module in (*modules, torchvision.models.optical_flow):
        for name in torchvision.models.list_models(module=module):
            other = {"aux_loss": True} if module is torchvision.models.segmentation else OPTIONS.get(name)
            options = [{}] if other is None else [{}, other]
            unseen = [{**given, **UNSEEN[name]} for given in options] if name in UNSEEN else []
            found += [(f"torchvision:{name}", given) for given in (*options, *unseen)]
    found += [(f"timm:{name}", {}) for name in timm.list_models()]
    return [network for network in found if fnmatch(network[0], f"*:{pattern}")]


class WithoutInitialization(TorchFunctionMode):
    """Weights are not drawn, which takes most of the time: they do not matter here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def make(network: Network, *devices: str, **more: Any) -> nn.Module | None:
    """The network on the first of the devices that its builder works on; by default meta, then the CPU."""
    spec, arguments = network
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    for device in devices or ("meta", "cpu"):
        with torch.device(device), quiet[0], quiet[1], WithoutInitialization(), contextlib.suppress(NormswapError):
            return model_specs.build(spec, arguments={**arguments, **more})
    return None


def describe(network: Network) -> list[dict[str, Any]]:
    """A row of the index for one network, none where it cannot be made; two where it has no head unless asked."""
    model = make(network)
    if model is None:
        return []
    shapes = told_shapes(model.state_dict())
    counted = [make(network, "meta" if is_on_meta(model) else "cpu", num_classes=classes) for classes in TRIED]
    if None in counted:
        return [row_of(shapes, [], None)]
    several = [told_shapes(made.state_dict()) for made in counted if made is not None]
    classes = class_dimensions(several[0], several[1])
    if not classes or several[0].keys() != shapes.keys():
        return [row_of(shapes, [], None), *([row_of(several[0], classes, None)] if classes else [])]
    key, dim, factor, constant = classes[0]
    return [row_of(shapes, classes, (shapes[key][dim] - constant) // factor)]


def is_on_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def row_of(shapes: Shapes, classes: list[ClassDimension], default: int | None) -> dict[str, Any]:
    hashed = {"keys": fingerprint(shapes), "shapes": shapes_fingerprint(shapes, classes)}
    return {"classes": classes, "default": default, **hashed}


def class_dimensions(a: Shapes, b: Shapes) -> list[ClassDimension]:
    assert a.keys() == b.keys()
    found = []
    for key, shape in sorted(a.items()):
        for dim, sizes in enumerate(zip(shape, b[key], strict=True)):
            if sizes[0] != sizes[1]:
                factor = (sizes[1] - sizes[0]) // (TRIED[1] - TRIED[0])
                found.append((key, dim, factor, sizes[0] - factor * TRIED[0]))
    return found


# ---- which of those with the same keys are the same function ----


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Values that depend on the key alone, such that all that a network computes shows in its output."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(value.shape, generator=noise, dtype=value.dtype)
        if value.dim() > 1:
            value.copy_(drawn * (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("bias", "running_mean")):
            value.copy_(0.1 * drawn)
        else:
            value.copy_(1 + 0.3 * drawn.clamp(-2, 2))


@torch.no_grad()
def output(network: Network) -> list[Tensor] | None:
    """What a network makes of noise; None where it is large, has no batch norm, or does not run."""
    small = make(network)
    if small is None or sum(p.numel() for p in small.parameters()) > LARGEST:
        return None
    if not any(key.endswith("running_mean") for key in small.state_dict()):
        return None
    model = make(network, "cpu")
    if model is None:
        return None
    fill(model.eval())
    own = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 256, 256))
    for shape in ((1, 3, 96, 96), (1, *own), (1, 3, 16, 112, 112)):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with contextlib.suppress(Exception):
            return [*eps_of(model), *(leaf for leaf in tree_leaves(model(noise)) if isinstance(leaf, Tensor))]
    return None


def eps_of(model: nn.Module) -> list[Tensor]:
    """The eps of each norm, which noise of single precision may not show."""
    paths = sorted((path, module.eps) for path, module in model.named_modules() if hasattr(module, "eps"))
    return [torch.tensor(float(eps)) for _, eps in paths]


def is_same(a: list[Tensor] | None, b: list[Tensor] | None) -> bool:
    if a is None or b is None or [t.shape for t in a] != [t.shape for t in b]:
        return False
    return all(bool((x - y).norm() <= SAME * x.norm() < torch.inf) for x, y in zip(a, b, strict=True))


def functions(alike: list[Network]) -> list[Network]:
    """The first of each function among networks of the same keys and shapes."""
    alike = sorted(alike, key=lambda n: (not n[0].startswith("torchvision:"), len(n[0]) + len(str(n[1])), str(n)))
    if len(alike) == 1:
        return alike
    kept: list[tuple[Network, list[Tensor] | None]] = []
    for network in alike:
        made = output(network)
        if not any(is_same(before, made) for _, before in kept):
            kept.append((network, made))
    return [network for network, _ in kept]


def main(pattern: str = "*") -> None:
    warnings.simplefilter("ignore")
    alike: dict[str, tuple[dict[str, Any], list[Network]]] = {}
    for network in tqdm(networks(pattern), mininterval=20):
        rows = describe(network)
        if not rows:
            print("cannot be made:", *network)
        for row in rows:
            alike.setdefault(json.dumps([row["keys"], row["shapes"]]), (row, []))[1].append(network)
    index = defaultdict(list)
    for row, found in tqdm(alike.values(), mininterval=20):
        kept = functions(found)
        if len(found) > 1:
            print(*(f"{spec}{given or ''}" for spec, given in found), "->", len(kept), "functions", flush=True)
        index[row.pop("keys")].append({**row, "networks": kept})
    packed = lzma.compress(json.dumps(index, separators=(",", ":"), sort_keys=True).encode(), preset=9)
    print(f"{sum(map(len, index.values()))} networks, {len(packed):,} bytes")
    if pattern == "*":
        INDEX.write_bytes(packed)


if __name__ == "__main__":
    main(*sys.argv[1:2])
