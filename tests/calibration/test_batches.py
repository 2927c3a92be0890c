"""Calibration data: pictures, files of tensors and iterables; the hostile and broken ones among them."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from bisect import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pictures import picture
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision import models

from normswap.analysis.running import call_model
from normswap.calibration import pictures
from normswap.calibration.batches import input_batches, read_samples
from normswap.calibration.model_inputs import first_inputs
from normswap.errors import FileError, OptionError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def flat(color: int, mode: str = "L", size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new(mode, size, color if mode == "L" else (color,) * 3)


def values(read: list[Any]) -> list[int]:
    """What each sample of an `arange` file or a folder of flat pictures is, over all batches."""
    return [round(float(x.flatten()[0])) for part in read for x in part]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders of 10 flat pictures each; the brightness counts up from 0."""
    for index in range(30):
        place = tmp_path / "pictures" / "abc"[index // 10]
        place.mkdir(parents=True, exist_ok=True)
        flat(index).save(place / f"{index:02}.png")
    return tmp_path / "pictures"


def raw(folder: Path, **options: Any) -> list[Any]:
    """Batches of the values 0..255 themselves."""
    return [x * 255 for x in read_samples(folder, input_size=4, mean=0.0, std=1.0, **options)]


def one_of_each_part(found: list[int], size: int, count: int) -> bool:
    """Whether `count` of `size` numbers were taken, one of each of so many equal parts."""
    ends = [part * size // count for part in range(1, count + 1)]
    return sorted(bisect(ends, value) for value in found) == list(range(count))


# ---- folders of pictures ----


def test_one_picture_is_a_batch_of_one(folder: Path) -> None:
    path = next(path for path in sorted(folder.rglob("*")) if path.suffix == ".png")
    (one,) = read_samples(path, input_size=32)
    torch.testing.assert_close(one, read_samples(path.parent, input_size=32)[0][:1])


def test_all_pictures_in_batches(folder: Path) -> None:
    read = raw(folder, batch=8)
    assert [x.shape for x in read] == [(8, 3, 4, 4)] * 2 + [(7, 3, 4, 4)] * 2
    assert sorted(values(read)) == list(range(30))
    assert all(x.dtype == torch.float32 for x in read)
    assert values(read) == values(raw(folder, batch=8))


def test_few_of_many_are_spread_over_the_classes(folder: Path) -> None:
    read = raw(folder, limit=6, batch=3)
    assert one_of_each_part(values(read), 30, 6)


def test_flat_nested_hidden_and_linked(tmp_path: Path) -> None:
    for index, name in enumerate(["b.PNG", "a.jpg", "deep/er/c.bmp", ".hidden.png", ".cache/d.png", "__MACOSX/e.png"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        flat(index).save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "deep" / "back").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert sorted(values(raw(tmp_path))) == [0, 1, 2]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    ending = "tif" if mode == "CMYK" else "png"
    image = picture(mode) if mode != "LA" else picture("L").convert("LA")
    image.save(tmp_path / f"x.{ending}")
    [x] = read_samples(tmp_path, spec="torchvision:resnet18")
    expected = models.ResNet18_Weights.DEFAULT.transforms()(image.convert("RGB"))
    assert torch.allclose(x[0], expected)


def test_sixteen_bits_are_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 100 << 8, dtype=np.uint16)).save(tmp_path / "x.png")
    assert set(values(raw(tmp_path))) == {100}


@pytest.mark.parametrize("name", ["resnet50", "inception_v3", "fcn_resnet50", "ssdlite320_mobilenet_v3_large"])
def test_torchvisions_own_preparation(tmp_path: Path, name: str) -> None:
    picture(size=(50, 40)).save(tmp_path / "x.png")
    [read] = read_samples(tmp_path, spec=f"torchvision:{name}")
    expected = models.get_model_weights(name).DEFAULT.transforms()(picture(size=(50, 40)))
    x = read[0][0] if isinstance(read, tuple) else read[0]
    assert torch.equal(x, expected)


def test_named_weights_pick_the_recipe(tmp_path: Path) -> None:
    picture(size=(50, 40)).save(tmp_path / "x.png")
    for weights in ("IMAGENET1K_V1", "IMAGENET1K_V2"):
        [x] = read_samples(tmp_path, spec="torchvision:resnet50", weights=weights)
        assert torch.equal(x[0], models.ResNet50_Weights[weights].transforms()(picture(size=(50, 40))))
    with pytest.raises(OptionError, match="IMAGENET1K_V1"):
        read_samples(tmp_path, spec="torchvision:resnet50", weights="nope")


def test_timms_own_preparation(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    picture(size=(50, 40)).save(tmp_path / "x.png")
    for name in ("mobilenetv3_small_050", "resnet50.tv_in1k", "vit_tiny_patch16_224"):
        model = timm.create_model(name, pretrained=False)
        transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
        [x] = read_samples(tmp_path, spec=f"timm:{name}")
        assert torch.allclose(x[0], transform(picture(size=(50, 40))), atol=1e-6)
    [x] = read_samples(tmp_path, spec="timm:resnet50", input_size=(32, 48), mean=0.0, std=1.0)
    assert x.shape == (1, 3, 32, 48)
    assert x.min() >= 0 and x.max() <= 1
    [tagged] = read_samples(tmp_path, spec="timm:resnet50", weights="tv_in1k")
    [named] = read_samples(tmp_path, spec="timm:resnet50.tv_in1k")
    assert torch.equal(tagged, named)


def test_options_win(folder: Path) -> None:
    plain = read_samples(folder, spec="torchvision:resnet18", input_size=(8, 12), mean=0.0, std=1.0, limit=3)
    assert plain[0].shape == (3, 3, 8, 12)
    assert one_of_each_part(values([plain[0] * 255]), 30, 3)
    [normal] = read_samples(folder, spec="torchvision:resnet18", input_size=8, limit=3)
    expected = (plain[0][:, :, :1, :1] - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(normal[:, :, :1, :1], expected, atol=1e-5)
    for spec in (None, "package:make"):
        [x] = read_samples(folder, spec=spec, input_size=8, limit=3)
        assert torch.allclose(x, normal, atol=1e-5)
    [(listed,)] = read_samples(folder, spec="torchvision:fasterrcnn_resnet50_fpn", input_size=8, limit=3)
    assert [x.shape for x in listed] == [(3, 8, 8)] * 3 and sorted(values([listed])) == [0] * 3


def test_pictures_of_many_shapes(tmp_path: Path) -> None:
    for index, size in enumerate([(40, 30), (30, 40), (40, 30)]):
        picture(size=size).save(tmp_path / f"{index}.png")
    assert sorted(x.shape[0] for x in read_samples(tmp_path, spec="torchvision:lraspp_mobilenet_v3_large")) == [1, 2]
    [(listed,)] = read_samples(tmp_path, spec="torchvision:fasterrcnn_resnet50_fpn")
    assert [x.shape for x in listed] == [(3, 30, 40), (3, 40, 30), (3, 30, 40)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--input-size"),
        ({"spec": "package:make"}, "package:make.*--input-size"),
        ({"spec": "torchvision:nope"}, "no model 'nope'"),
        ({"spec": "torchvision:r3d_18"}, "tensors"),
        ({"spec": "torchvision:raft_small"}, "tensors"),
        ({"input_size": 0}, "--input-size: 0"),
        ({"input_size": True}, "--input-size"),
        ({"input_size": (3, 8, 8)}, "--input-size"),
        ({"input_size": "8"}, "--input-size"),
        ({"input_size": 8.5}, "--input-size"),
        ({"input_size": 1 << 40}, "--input-size"),
        ({"input_size": 8, "mean": 0.5}, "both"),
        ({"input_size": 8, "mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}, "255"),
        ({"input_size": 8, "mean": 0.5, "std": 0.0}, "not positive"),
        ({"input_size": 8, "mean": [0.5, 0.5], "std": [0.5, 0.5]}, "--mean: has 2"),
        ({"input_size": 8, "mean": float("nan"), "std": 1}, "--mean"),
        ({"input_size": 8, "mean": "grey", "std": 1}, "--mean"),
        ({"input_size": 8, "limit": 0}, "limit: 0"),
        ({"input_size": 8, "batch": -1}, "batch: -1"),
    ],
)
def test_options_that_do_not_fit(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_samples(folder, **options)


def test_timm_options_that_do_not_fit(folder: Path) -> None:
    pytest.importorskip("timm")
    with pytest.raises(OptionError, match="timm has no model"):
        read_samples(folder, spec="timm:nope")
    with pytest.raises(OptionError, match="tag"):
        read_samples(folder, spec="timm:resnet50.nope")


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("no picture")
    with pytest.raises(FileError, match=r"no pictures in it or below it.*\.jpg"):
        read_samples(tmp_path, input_size=8)
    with pytest.raises(FileError, match="No such file"):
        read_samples(tmp_path / "nothing")
    with pytest.raises(FileError, match="null"):
        read_samples("a\0b")


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of 1-bit grey with a header that may lie."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def truncated() -> bytes:
    file = io.BytesIO()
    picture(size=(64, 64)).save(file, "PNG")
    return file.getvalue()[:3000]


BROKEN = {
    "empty.png": (b"", "UnidentifiedImageError"),
    "text.jpg": (b"this is no picture", "UnidentifiedImageError"),
    "truncated.png": (truncated(), "cannot be read"),
    "bomb.png": (png(30_000, 30_000, b"\0" * 100), "DecompressionBomb"),
    "large.png": (png(12_000, 12_000, b"\0" * 100), "too large"),
    "thread.png": (png(1, 60_000, b"\0\0" * 60_000), "too narrow"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "UnidentifiedImageError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named(folder: Path, name: str) -> None:
    content, reason = BROKEN[name]
    (folder / "b" / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FileError, match=f"{name}: .*{reason}"):
            read_samples(folder, input_size=8)


# ---- files of tensors ----


def counted(n: int = 100, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """(n, 2): each sample is its index."""
    return np.repeat(np.arange(n, dtype=dtype)[:, None], 2, 1)


def write(path: Path, content: Any) -> Path:
    """An array, or arrays by name, in the format of the file's ending."""
    named = content if isinstance(content, dict) else {"x": content}
    if path.suffix in (".npy", ".npz"):
        (np.save(path, content) if path.suffix == ".npy" else np.savez(path, **named))
        return path
    tensors = {k: torch.from_numpy(np.array(v, order="C")) for k, v in named.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors if isinstance(content, dict) else tensors["x"], path)
    return path


ENDINGS = [".pt", ".pth", ".npy", ".npz", ".safetensors"]
NAMED = [".pt", ".npz", ".safetensors"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_array(tmp_path: Path, ending: str) -> None:
    read = read_samples(write(tmp_path / f"x{ending}", counted(dtype=np.float64)), limit=10, batch=4)
    assert one_of_each_part(values(read), 100, 10)
    assert [len(x) for x in read] == [4, 3, 3]
    assert all(x.dtype == torch.float32 and x.shape[1:] == (2,) for x in read)
    assert len(read_samples(tmp_path / f"x{ending}")) == 4


@pytest.mark.parametrize("ending", NAMED)
@pytest.mark.parametrize(
    "names", [("images", "labels"), ("x", "y"), ("train_images", "train_labels"), ("a", "targets")]
)
def test_labels_are_ignored(tmp_path: Path, ending: str, names: tuple[str, str]) -> None:
    path = write(tmp_path / f"x{ending}", {names[0]: counted(8), names[1]: np.arange(8)})
    [read] = read_samples(path)
    assert values([read]) == list(range(8))


@pytest.mark.parametrize("ending", NAMED)
def test_names(tmp_path: Path, ending: str) -> None:
    def read(**named: Any) -> Any:
        [found] = read_samples(write(tmp_path / f"x{ending}", named))
        return found

    splits = read(x_train=counted(8), y_train=np.arange(8), x_test=-counted(3), y_test=np.arange(3))
    assert values([splits]) == list(range(8))
    assert values([read(val_images=-counted(3), train_images=counted(8), test_images=-counted(3))]) == list(range(8))
    assert values([read(images=counted(8), mean=np.zeros(3), std=np.ones(3))]) == list(range(8))
    assert values([read(y=counted(8))]) == list(range(8))
    words = read(input_ids=counted(8, np.int64), attention_mask=counted(8, np.int32) > 0, labels=np.arange(8))
    assert set(words) == {"input_ids", "attention_mask"}
    assert words["input_ids"].dtype == torch.int64 and words["attention_mask"].dtype == torch.bool
    assert words["input_ids"].shape == words["attention_mask"].shape == (8, 2)
    with pytest.raises(FileError, match=r"different first dimensions.*a \(3,\)"):
        read(a=np.zeros(3), b=np.zeros(4))


def test_positional_arrays_of_numpy(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", counted(8), np.arange(8))
    [pair] = read_samples(tmp_path / "x.npz")
    assert values([pair]) == list(range(8))  # labels, by their kind
    np.savez(tmp_path / "x.npz", counted(8), -counted(8))
    read = read_samples(tmp_path / "x.npz", batch=4)
    firsts, seconds = ([value for pair in read for value in values([pair[place]])] for place in (0, 1))
    assert sorted(firsts) == list(range(8)) and seconds == [-value for value in firsts]
    np.savez(tmp_path / "x.npz", images=counted(8), names=np.array(["a"] * 8), more=np.array([{}] * 8))
    assert values(read_samples(tmp_path / "x.npz")) == list(range(8))
    np.savez_compressed(tmp_path / "x.npz", counted(8))
    assert values(read_samples(tmp_path / "x.npz")) == list(range(8))


def test_lists_in_pt_files_are_batches(tmp_path: Path) -> None:
    def read(content: Any, **options: Any) -> list[Any]:
        torch.save(content, tmp_path / "x.pt")
        return read_samples(tmp_path / "x.pt", **options)

    parts = list(torch.from_numpy(counted(40)).split(4))
    assert values(read(parts)) == list(range(40))
    assert [x.shape for x in read(parts, limit=10)] == [(4, 2), (4, 2), (2, 2)]
    assert one_of_each_part([value // 4 for value in values(read(parts, limit=10))[::4]], 10, 3)
    assert values(read((torch.from_numpy(counted(8)), torch.arange(8)))) == list(range(8))
    assert read([(parts[0], torch.arange(4))])[0][1].tolist() == [0, 1, 2, 3]
    assert read([{"a": parts[0].double()}])[0]["a"].dtype == torch.float32
    assert values(read({"x": counted(8), "classes": ["a", "b"]})) == list(range(8))
    assert read(parts[0].half())[0].dtype == torch.float32


@pytest.mark.parametrize("ending", ENDINGS)
def test_uint8_pictures(tmp_path: Path, ending: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 10), dtype=np.uint8)
    expected = (torch.from_numpy(pictures) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    path = tmp_path / f"x{ending}"
    for content in (pictures, pictures.transpose(0, 2, 3, 1)):
        [read] = read_samples(write(path, content))
        assert torch.allclose(read, expected, atol=1e-6)
    [read] = read_samples(path, mean=0.5, std=0.25)
    assert torch.allclose(read, (torch.from_numpy(pictures) / 255 - 0.5) / 0.25, atol=1e-6)
    [read] = read_samples(path, input_size=(4, 6), spec="torchvision:resnet18")
    assert read.shape == (5, 3, 4, 6)
    [read] = read_samples(path, spec="torchvision:fasterrcnn_resnet50_fpn")
    assert torch.allclose(read, torch.from_numpy(pictures) / 255)


def test_uint8_pictures_are_normalized_as_the_model_wants(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    path = write(tmp_path / "x.npy", np.full((2, 3, 4, 4), 255, np.uint8))
    [read] = read_samples(path, spec="timm:vit_tiny_patch16_224")  # mean and std 0.5
    assert torch.equal(read, torch.ones(2, 3, 4, 4))


def test_uint8_pictures_of_other_channels(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    grey = np.full((5, 8, 8), 51, dtype=np.uint8)
    for content in (grey, grey[:, None], grey[..., None]):
        [read] = read_samples(write(path, content), mean=0.1, std=0.5)
        assert read.shape == (5, 1, 8, 8) and torch.allclose(read, torch.full((), 0.2), atol=1e-6)
        with pytest.raises(OptionError, match="pictures of 1 channels.*--mean"):
            read_samples(path)
    with pytest.raises(OptionError, match="pictures of 4 channels"):
        read_samples(write(path, np.zeros((5, 8, 8, 4), np.uint8)), mean=MEAN, std=STD)
    for shape in [(5, 8), (8, 8, 3), (2, 3, 4, 8, 8)]:
        with pytest.raises(FileError, match="uint8 of shape"):
            read_samples(write(path, np.zeros(shape, np.uint8)))


def test_numbers_of_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    for dtype, expected in {
        ">f4": torch.float32, "f2": torch.float32, "g": torch.float32, ">i4": torch.int32, "u2": torch.int64,
        "i1": torch.int64, "u8": torch.int64, "?": torch.bool, "c8": torch.complex64,
    }.items():  # fmt: skip
        [read] = read_samples(write(path, np.ones((5, 3), dtype)))
        assert read.dtype == expected and (read == 1).all()
    for narrow in (torch.bfloat16, torch.float8_e4m3fn, torch.uint32):
        save_file({"x": torch.ones(5, 3).to(narrow)}, tmp_path / "x.safetensors")
        [read] = read_samples(tmp_path / "x.safetensors")
        assert read.dtype == (torch.int64 if narrow == torch.uint32 else torch.float32) and (read == 1).all()
    [read] = read_samples(write(path, np.asfortranarray(counted(5))))
    assert values([read]) == list(range(5))


def test_options_of_pictures_do_not_fit_floats(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npy", np.zeros((5, 3, 8, 8), np.float32))
    for options in ({"input_size": 4}, {"mean": 0.5, "std": 0.5}):
        with pytest.raises(OptionError, match="no uint8 pictures"):
            read_samples(path, **options)


@pytest.mark.parametrize("ending", ENDINGS)
def test_arrays_that_hold_no_samples(tmp_path: Path, ending: str) -> None:
    nan = counted(5)
    nan[3, 1] = np.nan
    for message, content in {
        "holds no samples": np.zeros((0, 3)),
        r"no samples: .* \(3, 0\)": np.zeros((3, 0)),
        "single number": np.zeros(()),
        "not finite": nan,
        "NaN or infinity": np.full((5, 3), np.inf),
    }.items():  # fmt: skip
        with pytest.raises(FileError, match=message) as error:
            read_samples(write(tmp_path / f"x{ending}", content))
        assert str(tmp_path / f"x{ending}") in str(error.value)


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(OptionError, match=r"\.npy"):
        read_samples(tmp_path / "x.csv")
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(FileError, match="regular"):
        read_samples(tmp_path / "x.npy")
    for content in (
        {},
        [],
        (),
        {"epoch": 3},
        {"a": {"b": torch.ones(2)}},
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 3)).state_dict(),
        3,
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(FileError, match=r"x\.pt: "):
            read_samples(tmp_path / "x.pt")
    for content in (["a"], [torch.ones(2), 3], [[]], torch.ones(2, 2).to_sparse(), torch.ones(()), [torch.ones(())]):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(FileError, match=r"x\.pt: "):
            read_samples(tmp_path / "x.pt")
    torch.save(TensorDataset(torch.ones(2)), tmp_path / "x.pt")
    with pytest.raises(FileError, match="more than plain data"):
        read_samples(tmp_path / "x.pt")


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch TRAPPED",)


def test_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "good.npz", counted(50)).read_bytes()
    header = (
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }".ljust(117) + b"\n"
    )
    files = {
        "pickle.npy": pickle.dumps(Trap()),
        "pickle.npz": pickle.dumps(Trap()),
        "pickle.pt": pickle.dumps(Trap()),
        "pickle.safetensors": pickle.dumps(Trap()),
        "empty.npy": b"",
        "empty.npz": b"",
        "empty.pt": b"",
        "empty.safetensors": b"",
        "text.npy": b"1, 2, 3",
        "cut.npz": good[:-30],
        "claims.npy": header.replace(b"%s", b"9" * 12),
        "beyond.npy": header.replace(b"%s", b"9" * 30),
        "code.npy": header.replace(b"(%s,)", b"__import__('os').system('touch TRAPPED')"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "objects.npy", np.array([Trap()] * 3), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", x=np.array([Trap()] * 3))
    np.save(tmp_path / "text_array.npy", np.array(["a", "b"]))
    np.save(tmp_path / "dates.npy", np.zeros(3, "datetime64[s]"))
    np.save(tmp_path / "records.npy", np.zeros(3, [("a", "f4"), ("b", "f4")]))
    torch.save([Trap()], tmp_path / "trap.pt")
    torch.save(torch.zeros(1, 1).expand(1 << 20, 1 << 20), tmp_path / "repeats.pt")
    torch.save([torch.zeros(1, 1).expand(1 << 20, 1 << 20)], tmp_path / "repeats_inside.pt")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.replace(b"%s", b"9" * 8) + b"\0" * (4 * 99_999_999))
    torch.save([torch.zeros(1, 1).expand(64, 64)] * 5000, tmp_path / "repeats_often.pt")
    messages = {}
    for path in sorted(tmp_path.glob("*.*")):
        if path.name == "good.npz":
            continue
        with pytest.raises(FileError) as error:
            read_samples(path)
        messages[path.name] = str(error.value)
        assert str(path) in messages[path.name]
    assert not (tmp_path / "TRAPPED").exists()
    assert "unpacks to" in messages["bomb.npz"]
    assert all("claims more" in messages[f"repeats{how}.pt"] for how in ("", "_inside", "_often"))


# ---- any iterable ----


@pytest.mark.parametrize("period", [2, 4, 8, 10])
@pytest.mark.parametrize("size", [256, 800, 1600])
def test_classes_in_turns_and_in_order_are_mixed(size: int, period: int) -> None:
    """Every eighth picture of data whose classes come in turns is of one class: no batch may be."""
    for labels in (torch.arange(size) % period, torch.arange(size) * period // size):
        found = [batch.long().flatten() for batch in input_batches(labels[:, None].float(), limit=256)]
        assert sum(map(len, found)) == 256
        assert all(len(batch.unique()) >= min(period, 5) for batch in found)
        assert all((batch == batch.mode().values).float().mean() < 0.5 + 0.5 / period for batch in found)


def endless() -> Iterator[Tensor]:
    while True:
        yield torch.ones(4, 2)


def test_arrays_in_python() -> None:
    read = input_batches(torch.from_numpy(counted(100)), limit=10, batch=4)
    assert one_of_each_part(values(read), 100, 10) and [len(x) for x in read] == [4, 3, 3]
    assert input_batches(counted(10, np.float64))[0].dtype == torch.float32
    assert input_batches(torch.ones(3, 2).double())[0].dtype == torch.float64
    assert not input_batches(torch.ones(3, 2, requires_grad=True))[0].requires_grad
    both = input_batches({"a": torch.ones(5, 2), "b": torch.zeros(5)}, batch=3)
    assert [{k: v.shape for k, v in part.items()} for part in both] == [
        {"a": (3, 2), "b": (3,)},
        {"a": (2, 2), "b": (2,)},
    ]
    pair = input_batches((torch.from_numpy(counted(5)), torch.arange(5)), batch=3)
    assert [x[:, 0].tolist() == y.tolist() for x, y in pair] == [True, True]


def test_iterables_stop_at_the_limit() -> None:
    assert [len(x) for x in input_batches(endless(), limit=10)] == [4, 4, 2]
    assert [len(x) for x in input_batches([torch.ones(4, 2)] * 3)] == [4, 4, 4]
    asked = []

    def watched() -> Iterator[Tensor]:
        for index in range(9):
            asked.append(index)
            yield torch.ones(4, 2)

    read = input_batches(watched(), limit=8)
    assert asked == [0, 1]
    assert len(next(read.further)) == 4
    assert asked == [0, 1, 2]
    assert len(list(read.further)) == 6


@pytest.mark.parametrize("kind", ["array", "dict", "pair", "dataset", "list.pt", "array.npy"])
def test_what_is_beyond_the_limit_is_read_later(tmp_path: Path, kind: str) -> None:
    """All of it once, in batches, the rows of a sample together."""
    x = torch.from_numpy(counted(100))
    if kind == "array.npy":
        np.save(tmp_path / kind, x.numpy())
        read = read_samples(tmp_path / kind, limit=20, batch=8)
    elif kind == "list.pt":
        torch.save(list(x.split(5)), tmp_path / kind)
        read = read_samples(tmp_path / kind, limit=20, batch=8)
    else:
        data = {
            "array": x,
            "dict": {"a": x, "b": x + 0},
            "pair": (x, x.flatten(1)[:, 0].long()),
            "dataset": TensorDataset(x, x),
        }
        read = input_batches(data[kind], limit=20, batch=8)
    further = list(read.further)
    assert list(read.further) == []
    if kind in ("dict", "pair", "dataset"):
        rows = [list(part.values()) if isinstance(part, dict) else part for part in [*read, *further]]
        assert all(a.flatten(1)[:, 0].tolist() == b.reshape(len(b), -1)[:, 0].tolist() for a, b in rows)
        read, further = ([part["a"] if kind == "dict" else part[0] for part in some] for some in (read, further))
    assert len(values(read)) == 20
    assert max(map(len, further)) <= 8
    assert sorted(values([*read, *further])) == list(range(100))


def test_no_more_pictures_are_decoded_than_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    decode = pictures._read_picture
    monkeypatch.setattr(pictures, "_read_picture", lambda path, how: decoded.append(path.name) or decode(path, how))
    read = read_samples(folder, input_size=4, mean=0.0, std=1 / 255, limit=8, batch=4)
    assert len(decoded) == 8
    found = values(read) + values([next(read.further)])
    assert len(decoded) == len(set(found)) == 12
    (folder / "a" / "05.png").write_bytes(b"no picture")
    (folder / "b" / "15.png").write_bytes(b"no picture")
    with pytest.raises(FileError, match=r"[01]5.png: cannot be read"):
        list(read.further)


def test_broken_samples_beyond_the_limit_are_told(tmp_path: Path) -> None:
    x = torch.from_numpy(counted(100)).numpy()
    chosen = {value for part in input_batches(x, limit=20) for value in values([part])}
    x[next(i for i in range(100) if i not in chosen)] = np.nan
    np.save(tmp_path / "x.npy", x)
    read = read_samples(tmp_path / "x.npy", limit=20)
    with pytest.raises(FileError, match=r"x.npy: holds values that are not finite"):
        list(read.further)
    mixed = Odd([torch.ones(2)] * 4 + [torch.ones(3)] * 4)
    read = input_batches(mixed, limit=1, batch=8)
    with pytest.raises(OptionError, match="calibrate: the samples of Odd cannot be stacked"):
        list(read.further)


def test_items_as_given() -> None:
    x, y = torch.ones(4, 2), torch.arange(4)
    assert [part.shape for part in input_batches([(x, y)], limit=3)[0]] == [(3, 2), (3,)]
    assert {k: v.shape for k, v in input_batches([{"x": x, "y": y}], limit=3)[0].items()} == {"x": (3, 2), "y": (3,)}
    assert input_batches([(x, torch.ones(7))], limit=3)[0][0].shape == (4, 2)  # parts of different sizes are not cut
    pictures = [torch.ones(3, 8, 8), torch.ones(3, 6, 6)]
    assert len(input_batches([(pictures,)], limit=1)[0][0]) == 1
    assert len(input_batches([(pictures,)] * 3, limit=4)) == 2
    assert input_batches([counted(4)])[0].dtype == torch.float32


def test_datasets_and_loaders() -> None:
    data = TensorDataset(torch.from_numpy(counted(30)), torch.arange(30))
    x, y = input_batches(data, limit=6, batch=6)[0]
    assert one_of_each_part(y.tolist(), 30, 6) and values([x]) == y.tolist()
    loaded = input_batches(DataLoader(data, batch_size=4), limit=10)
    assert [part[1].tolist() for part in loaded] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return endless()

    assert len(input_batches(Stream(), limit=10)) == 3
    assert [len(x) for x in input_batches(DataLoader(Stream(), batch_size=None), limit=10)] == [4, 4, 2]


class Odd(Dataset[Any]):
    def __init__(self, items: list[Any]):
        self.items = items

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return torch.ones(2)


def failing() -> Iterator[Tensor]:
    yield torch.ones(2, 2)
    raise RuntimeError("disk is gone")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "holds no inputs"),
        ("images/", "holds no inputs"),
        (Path("images"), "holds no inputs"),
        (b"images", "holds no inputs"),
        (3, "a int holds no inputs"),
        (nn.Sequential(), "a Sequential holds no inputs"),
        (endless, "a function holds no inputs"),
        ([], "before its first item"),
        ((), "before its first item"),
        ({}, "here: nothing"),
        (iter(()), "before its first item"),
        ([torch.ones(0, 2)], "item 0 holds no samples"),
        ([torch.ones(())], "item 0 holds no samples"),
        (torch.ones(()), "single number"),
        (torch.ones(0, 2), "no samples"),
        (np.array(["a"]), "not numbers"),
        (["a.jpg"], "item 0 is a str"),
        ([torch.ones(2, 2), 3], "item 1 is a int"),
        ([()], "item 0 is a tuple"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, "a 2, b 3"),
        ({"a": [1, 2]}, "a is a list"),
        (failing(), "item 1 cannot be had: RuntimeError: disk is gone"),
        (Odd([]), "empty"),
        (Odd([torch.ones(2), torch.ones(3)]), "samples of Odd cannot be stacked"),
        (Odd([picture()]), "samples of Odd cannot be stacked"),
        (Endless(), "without a length"),
    ],
)
def test_data_that_is_none(data: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        input_batches(data)


# ---- what a model takes ----


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x


class Optional(nn.Module):
    def forward(self, x: Any, targets: Any = None) -> Any:
        return x if targets is None else (x, targets)


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Any:
        return a, b


class Words(nn.Module):
    def forward(self, input_ids: Any = None, mask: Any = None, labels: Any = None) -> Any:
        return {"input_ids": input_ids, "mask": mask, "labels": labels}


class Open(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


X, Y, MASK = torch.randn(4, 2), torch.arange(4), torch.ones(4, 2, dtype=torch.int64)


def passed(model: nn.Module, item: Any) -> Any:
    return call_model(model, first_inputs(model, item))


def test_labels_are_left_out() -> None:
    for model in (Plain(), nn.Sequential(Plain()), Optional(), nn.DataParallel(Plain())):
        for item in (X, (X,), (X, Y), [X, Y], (X, Y.float()), (X, MASK), (X, 3), (X, [1, 2, 3, 4])):
            assert passed(model, item) is X
    assert passed(Plain(), (X, X)) is X
    assert passed(Plain(), (X, Y, "a.jpg")) is X
    assert passed(nn.Linear(2, 2), (X, Y)).shape == (4, 2)


def test_arguments_are_kept() -> None:
    assert passed(Two(), (X, Y)) == (X, Y)
    assert passed(Optional(), (X, X)) == (X, X)
    assert passed(Optional(), (MASK, MASK)) == (MASK, MASK)  # tokens and their mask
    assert passed(Open(), (X, X)) == ((X, X), {})
    assert passed(Open(), (X, Y)) == ((X,), {})
    assert passed(Open(), {"a": X}) == ((), {"a": X})


def test_dicts_lose_what_no_forward_accepts() -> None:
    assert passed(Words(), {"input_ids": MASK, "ids": Y}) == {"input_ids": MASK, "mask": None, "labels": None}
    assert passed(Words(), ({"input_ids": MASK}, Y)) == {"input_ids": MASK, "mask": None, "labels": None}
    assert passed(Plain(), {"images": X, "labels": Y}) is X
    assert passed(Plain(), {"x": X, "labels": Y}) is X
    assert passed(Plain(), {"pixels": X}) is X
    assert first_inputs(Two(), {"a": X, "c": X}) == {"a": X, "c": X}  # not enough: the model says so itself


def test_lists_of_pictures_stay_one_argument() -> None:
    pictures, targets = [X, X], [{"boxes": X}, {"boxes": X}]
    assert passed(Optional(), (pictures, targets)) is pictures
    assert passed(Plain(), {"images": pictures, "labels": targets}) is pictures
    assert passed(Optional(), (pictures,)) is pictures
