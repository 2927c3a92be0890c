"""Makes a corpus of hostile and broken checkpoints, each of which normswap must refuse without harm.

    python tests/threats/make.py FOLDER

`THREATS` maps a name to the function that makes that one file or folder. Code that a threat smuggles in makes the
file `ran` in its folder, so that whoever finds that file knows that the code ran.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

RECIPE = "normswap_recipe"
MARK = "ran"
HURT = "hurt_by_a_file"
"""What a pickle that can change modules or classes sets in `os` and in torch's `MetadataIndex`."""
Maker = Callable[[Path], Path]

THREATS: dict[str, Maker] = {}
MAY_LOAD: set[str] = set()
"""Nothing in these is wrong enough to refuse: loading them with their model, or converting them, may also succeed."""
MAY_CONVERT: set[str] = set()
"""What is wrong with these does not concern a conversion without the model, which may succeed."""


def threat(make: Maker) -> Maker:
    """Register a maker under its name, with spaces for underscores."""
    THREATS[make.__name__.replace("_", " ").strip()] = make
    return make


def may_load(make: Maker) -> Maker:
    MAY_LOAD.add(make.__name__.replace("_", " ").strip())
    return make


def may_convert(make: Maker) -> Maker:
    MAY_CONVERT.add(make.__name__.replace("_", " ").strip())
    return make


# ---- a good model, and parts of files ----


def net() -> nn.Module:
    """The model that the good files hold."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


def state() -> OrderedDict[str, Any]:
    return net().state_dict()  # type: ignore[return-value]


def training(**others: Any) -> dict[str, Any]:
    """A training checkpoint after one step of SGD."""
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **others}


def saved(content: Any, path: Path, zipped: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def archive(path: Path, data: bytes, name: str = "archive/data.pkl") -> Path:
    """A zip archive as torch.save makes it, around a pickle made by hand."""
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(name, data)
        made.writestr("archive/byteorder", "little")
        made.writestr("archive/version", "3\n")
    return path


def text(value: str) -> bytes:
    """A string as a pickle holds it."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    """A global as a pickle holds it."""
    return f"c{module}\n{name}\n".encode()


class Call:
    """Becomes a call of any function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __call__(self) -> None:
        """Never called: pickle takes only callables as functions."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


class Built:
    """Becomes `copyreg.__newobj__` of a class and a call of its `__setstate__`."""

    def __init__(self, cls: Any, content: Any):
        self.cls, self.content = cls, content

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (self.cls,), self.content


class Unlisted:
    """A class of a module that is not listed; `made_module` writes that module."""

    def __setstate__(self, content: Any) -> None: ...


def made_module(folder: Path) -> None:
    """The module `unlisted` in `folder`; to import it, to build its class or to call its factory leaves the mark."""
    run = f"open({str(folder / MARK)!r}, 'w').close()"
    (folder / "unlisted.py").write_text(
        f"{run}\nclass Unlisted:\n    def __setstate__(self, content):\n        {run}\n"
        f"def factory(**arguments):\n    {run}\n"
    )


def _payloads(mark: Path) -> dict[str, Callable[[], Any]]:
    """Objects whose unpickling runs code that makes `mark`."""
    touch, source = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    system = Call(getattr, Call(__import__, "os"), "system")
    return {
        "os.system": lambda: Call(os.system, touch),
        "subprocess": lambda: Call(subprocess.check_call, ["touch", str(mark)]),
        "eval": lambda: Call(eval, source),
        "exec": lambda: Call(exec, source),
        "getattr chain": lambda: Call(system, touch),
        "partial": lambda: Call(functools.partial, os.system, touch),
        "called partial": lambda: Call(Call(functools.partial, os.system, touch)),
        "hub load": lambda: Call(torch.hub.load, str(mark.parent), "hubconf", "local"),
        "hub download": lambda: Call(torch.hub.load_state_dict_from_url, f"file://{mark.parent}/fetched.pt"),
        "torch.load": lambda: Call(torch.load, str(mark), None, None),
        "hostile setstate": lambda: Built(Unlisted, {"a": 1}),
    }


def _pickle_threats() -> None:
    """Every payload alone, in a training checkpoint and in a folder's optimizer file, in both formats of torch.save."""

    def maker(payload: str, where: str, zipped: bool) -> Maker:
        def make(folder: Path) -> Path:
            made_module(folder)
            Unlisted.__module__ = "unlisted"
            sys.modules["unlisted"] = sys.modules[__name__]
            try:
                hostile = _payloads(folder / MARK)[payload]()
                if where == "alone":
                    return saved(hostile, folder / "bad.pt", zipped)
                if where == "in training":
                    return saved(training(scheduler={"deep": [{"er": hostile}]}), folder / "bad.pt", zipped)
                inner = folder / "run"
                inner.mkdir()
                saved(state(), inner / "pytorch_model.bin")
                saved({"state": {0: hostile}, "param_groups": []}, inner / "optimizer.bin", zipped)
                return inner
            finally:
                del sys.modules["unlisted"]
                Unlisted.__module__ = __name__

        return make

    for payload in _payloads(Path(MARK)):
        for zipped in (True, False):
            for where in ("alone", "in training", "in optimizer.bin"):
                THREATS[f"{payload} {where}{'' if zipped else ' old format'}"] = maker(payload, where, zipped)


_pickle_threats()


# ---- pickles made by hand ----


@threat
def an_unlisted_module(folder: Path) -> Path:
    made_module(folder)
    return archive(folder / "bad.pt", b"\x80\x02" + named("unlisted", "Unlisted") + b"\x81}b.")


@threat
def a_library_class_that_fetches(folder: Path) -> Path:
    """A class that is an nn.Module of timm, called with arguments that make it read an address."""
    saved({}, folder / "fetched.pth")
    overlay = b"}(" + text("url") + text((folder / "fetched.pth").as_uri()) + text("hf_hub_id") + b"Nu"
    call = named("timm.task.distillation", "DistillationTeacher") + b"(" + text("resnet10t") + b"M\xe8\x03K\x03N"
    return archive(folder / "bad.pt", b"\x80\x02" + call + overlay + b"tR.")


@threat
def a_class_called_with_a_huge_size(folder: Path) -> Path:
    """nn.Linear(20000, 20000): 1.6 GB that no file holds; it could as well be all there is."""
    size = b"J" + struct.pack("<i", 20_000)
    return archive(
        folder / "bad.pt", b"\x80\x02" + named("torch.nn.modules.linear", "Linear") + size + size + b"\x86R."
    )


@threat
def a_call_of_an_allowed_class_with_a_shell(folder: Path) -> Path:
    call = named("functools", "partial") + named("posix", "system") + text(f"touch {folder / MARK}") + b"\x86R)R."
    return archive(folder / "bad.pt", b"\x80\x02" + call)


@threat
def a_dunder_of_an_allowed_class(folder: Path) -> Path:
    return archive(folder / "bad.pt", b"\x80\x02" + named("torch.nn.modules.linear", "__builtins__") + b".")


@threat
def a_name_with_a_newline_and_escapes(folder: Path) -> Path:
    """The name of an entry that would write its own line to a terminal."""
    content = {"a\nerror: all is well\x1b[2J": torch.ones(2), "b": 1, "c": 2, "d": 3}
    return saved(content, folder / "bad.pt")


@may_convert
@threat
def keys_with_a_newline(folder: Path) -> Path:
    """A state dict that does not fit, whose message would hold the keys."""
    content = state()
    content["1.run\nning\x1b[2J"] = torch.ones(8)
    return saved(content, folder / "bad.pt")


@threat
def a_very_long_key(folder: Path) -> Path:
    return saved({"x" * 10_000_000: torch.ones(1), "b": 1, "c": 2}, folder / "bad.pt")


@threat
def keys_that_are_numbers(folder: Path) -> Path:
    return saved({0: torch.ones(3), 1: torch.ones(3)}, folder / "bad.pt")


@threat
def keys_of_several_kinds(folder: Path) -> Path:
    return saved({None: torch.ones(3), (1, 2): torch.ones(3), "running_mean": torch.ones(3)}, folder / "bad.pt")


@threat
def a_dict_that_holds_itself(folder: Path) -> Path:
    content: dict[str, Any] = {}
    content["model"] = content
    return saved(content, folder / "bad.pt")


@threat
def a_list_nested_deep(folder: Path) -> Path:
    return archive(folder / "bad.pt", b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")


@threat
def a_pickle_with_a_huge_memo(folder: Path) -> Path:
    return archive(folder / "bad.pt", b"\x80\x02}r\xff\xff\xff\x7f.")


@threat
def a_pickle_that_claims_a_long_string(folder: Path) -> Path:
    return archive(folder / "bad.pt", b"\x80\x02X\xff\xff\xff\x7fabc.")


@threat
def a_pickle_without_an_end(folder: Path) -> Path:
    return archive(folder / "bad.pt", b"\x80\x02}")


@threat
def a_pickle_of_nothing_on_the_stack(folder: Path) -> Path:
    return archive(folder / "bad.pt", b"\x80\x02.")


# ---- zip archives ----


def _rezipped(folder: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> Path:
    """A good state dict, its entries written again by `change`."""
    good = saved(state(), folder / "good.pt")
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(folder / "bad.pt", "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in old.infolist():
            change(new, entry, old.read(entry))
    good.unlink()
    return folder / "bad.pt"


@threat
def a_zip_that_leads_outside(folder: Path) -> Path:
    def change(new: zipfile.ZipFile, entry: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(entry.filename, data)
        new.writestr(f"{entry.filename}/../../../../outside", data)

    return _rezipped(folder, change)


@threat
def a_zip_with_absolute_paths(folder: Path) -> Path:
    def change(new: zipfile.ZipFile, entry: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(entry.filename, data)
        new.writestr(f"/outside/{entry.filename}", data)

    return _rezipped(folder, change)


@threat
def a_zip_with_duplicates(folder: Path) -> Path:
    def change(new: zipfile.ZipFile, entry: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(entry.filename, data)
        new.writestr(entry.filename, bytes(len(data)))

    return _rezipped(folder, change)


@threat
def a_zip_bomb(folder: Path) -> Path:
    """A pickle of 256 MB in a quarter of a megabyte."""
    with zipfile.ZipFile(folder / "bad.pt", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", b"\x80\x02X\x00\x00\x00\x10" + bytes(1 << 28) + b".")
        made.writestr("archive/version", "3\n")
    return folder / "bad.pt"


def _tables(data: bytes) -> tuple[int, int]:
    """Where the table of contents of a zip archive without a comment begins and ends."""
    size, start = struct.unpack("<II", data[-10:-2])
    return start, start + size


@threat
def a_zip_that_claims_a_huge_entry(folder: Path) -> Path:
    made = bytearray(archive(folder / "bad.pt", b"\x80\x02}.").read_bytes())
    start, _ = _tables(made)
    made[start + 24 : start + 28] = struct.pack("<I", 0x7FFFFFFF)
    return written(folder / "bad.pt", bytes(made))


@threat
def a_zip_with_two_tables_of_contents(folder: Path) -> Path:
    """One reader takes the table before the end record, another the one that the record points to: a packed bomb."""
    path = folder / "bad.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", b"\x80\x02}(" + text("w" * (1 << 26)) + b"K\x01u.")
        made.writestr("archive/version", "3\n", zipfile.ZIP_STORED)
    data = path.read_bytes()
    start, end = _tables(data)
    decoy, at = bytearray(data[start:end]), 0
    while at < len(decoy):
        decoy[at + 10 : at + 12] = b"\0\0"  # not packed
        decoy[at + 24 : at + 28] = decoy[at + 20 : at + 24]  # and no larger than its bytes
        at += 46 + sum(struct.unpack("<HHH", decoy[at + 28 : at + 34]))
    return written(path, data[:end] + bytes(decoy) + data[end:])


@threat
def a_zip_of_something_else(folder: Path) -> Path:
    return archive(folder / "bad.pt", b"hello", "archive/readme.txt")


# ---- tensors that claim more than there is ----


def _claims(folder: Path, nest: Callable[[torch.Tensor], Any], zipped: bool = True) -> Path:
    return saved(nest(torch.ones(1).expand(1 << 40)), folder / "bad.pt", zipped)


@threat
def a_view_of_terabytes(folder: Path) -> Path:
    return _claims(folder, lambda t: {**state(), "1.running_mean": t, "1.running_var": t, "1.weight": t, "1.bias": t})


@threat
def a_view_of_terabytes_old_format(folder: Path) -> Path:
    return _claims(folder, lambda t: {**state(), "1.running_mean": t, "1.running_var": t}, zipped=False)


@threat
def a_view_of_terabytes_in_training(folder: Path) -> Path:
    nest = {"1.running_mean", "1.running_var", "1.weight", "1.bias"}
    return _claims(folder, lambda t: {"model": {**state(), **dict.fromkeys(nest, t)}, "epoch": 1})


@threat
def a_view_of_terabytes_in_a_module(folder: Path) -> Path:
    model = net()
    model[1]._buffers["running_mean"] = torch.zeros(1).expand(1 << 40)
    return saved(model, folder / "bad.pt")


@may_load
@threat
def a_hidden_view_of_terabytes_in_a_module(folder: Path) -> Path:
    """In an attribute that no state dict shows."""
    model = net()
    model[1]._buffers["running_mean"] = torch.zeros(1).expand(1 << 40)
    model[1]._non_persistent_buffers_set.add("running_mean")
    return saved(model, folder / "bad.pt")


@may_load
@threat
def many_views_of_one_storage(folder: Path) -> Path:
    """2000 norms of 4 MB on the same 4 MB: 24 GB of results."""
    wide = torch.ones(1 << 20)
    content = {f"n{i}.{name}": wide for i in range(2000) for name in ("running_mean", "running_var", "weight", "bias")}
    return saved(content, folder / "bad.pt")


@threat
def a_sparse_tensor_of_terabytes(folder: Path) -> Path:
    sparse = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (1 << 40,))
    names = ("1.running_mean", "1.running_var", "1.weight", "1.bias")
    return saved({**state(), **dict.fromkeys(names, sparse)}, folder / "bad.pt")


@threat
def statistics_on_meta(folder: Path) -> Path:
    content = state()
    content["1.running_mean"] = torch.empty(8, device="meta")
    return saved(content, folder / "bad.pt")


@may_load
@threat
def statistics_of_quantized_numbers(folder: Path) -> Path:
    content = state()
    content["1.running_mean"] = torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8)
    return saved(content, folder / "bad.pt")


@may_load
@threat
def statistics_of_eight_bits(folder: Path) -> Path:
    content = state()
    for name in ("1.running_mean", "1.running_var", "1.weight", "1.bias"):
        content[name] = content[name].to(torch.float8_e4m3fn)
    return saved(content, folder / "bad.pt")


@may_load
@threat
def statistics_of_complex_numbers(folder: Path) -> Path:
    content = state()
    for name in ("1.running_mean", "1.running_var", "1.weight", "1.bias"):
        content[name] = content[name].to(torch.complex64)
    return saved(content, folder / "bad.pt")


@threat
def counts_that_are_text(folder: Path) -> Path:
    return saved({**state(), "1.num_batches_tracked": "many"}, folder / "bad.pt")


@may_load
@threat
def weights_that_are_whole_numbers(folder: Path) -> Path:
    content = state()
    content["1.weight"] = content["1.weight"].to(torch.int32)
    return saved(content, folder / "bad.pt")


# ---- whole modules ----


def _module(folder: Path, change: Callable[[nn.Sequential], Any]) -> Path:
    model = net()
    assert isinstance(model, nn.Sequential)
    changed = change(model)
    return saved(model if changed is None else changed, folder / "bad.pt")


@threat
def a_module_that_holds_itself(folder: Path) -> Path:
    return _module(folder, lambda model: model._modules.update(again=model))


@may_load
@threat
def a_module_with_paths_without_end(folder: Path) -> Path:
    """Each of 40 containers holds the next one twice: 2^40 paths."""

    def change(model: nn.Sequential) -> nn.Module:
        inner: nn.Module = model
        for _ in range(40):
            inner = nn.Sequential(inner, inner)
        return inner

    return _module(folder, change)


@may_load
@threat
def a_module_nested_deep(folder: Path) -> Path:
    """5000 containers in one another, as no recursion can follow; made by hand, since pickle cannot write it either."""
    empty = b"}q\x00"
    begin = named("torch.nn.modules.container", "Sequential") + b")\x81}(" + text("training") + b"\x88"
    for name in ("_parameters", "_buffers"):
        begin += text(name) + b"}"
    begin += text("_modules") + b"}" + text("0")
    return archive(folder / "bad.pt", b"\x80\x02" + empty + b"0" + begin * 5000 + b"N" + b"sub" * 5000 + b".")


@threat
def a_module_without_its_parts(folder: Path) -> Path:
    return archive(folder / "bad.pt", b"\x80\x02" + named("torch.nn.modules.container", "Sequential") + b")\x81.")


@threat
def a_module_with_a_number_for_its_children(folder: Path) -> Path:
    return _module(folder, lambda model: model.__dict__.update(_modules=5))


@threat
def a_module_with_a_number_for_its_parameters(folder: Path) -> Path:
    return _module(folder, lambda model: model[1].__dict__.update(_parameters=5))


@threat
def a_module_with_text_for_a_child(folder: Path) -> Path:
    return _module(folder, lambda model: model._modules.update({"1": "norm"}))


@may_load
@threat
def a_module_with_text_for_a_parameter(folder: Path) -> Path:
    return _module(folder, lambda model: model[1]._parameters.update(weight="heavy"))


@may_load
@threat
def a_module_with_text_for_statistics(folder: Path) -> Path:
    return _module(folder, lambda model: model[1]._buffers.update(running_mean="mean"))


@may_load
@threat
def a_norm_with_a_huge_size(folder: Path) -> Path:
    return _module(folder, lambda model: model[1].__dict__.update(num_features=1 << 40))


@may_load
@threat
def a_norm_with_text_for_eps(folder: Path) -> Path:
    return _module(folder, lambda model: model[1].__dict__.update(eps="small"))


@may_load
@threat
def a_norm_with_text_for_its_size(folder: Path) -> Path:
    return _module(folder, lambda model: model[1].__dict__.update(num_features="eight"))


@may_load
@threat
def a_convolution_with_a_huge_size(folder: Path) -> Path:
    return _module(folder, lambda model: model[0].__dict__.update(out_channels=1 << 40))


@may_load
@threat
def a_module_with_children_that_are_code(folder: Path) -> Path:
    """A name that would be code, were it pasted into some."""
    code = f'x", __import__("os").system("touch {folder / MARK}"), "'
    return _module(folder, lambda model: model._modules.update({code: model._modules.pop("1")}))


@may_load
@threat
def a_module_with_hooks_that_call(folder: Path) -> Path:
    """A hook that is an allowed class, called with what no such class takes."""
    hooks = OrderedDict({0: functools.partial(nn.Linear, 100_000, 100_000)})
    return _module(folder, lambda model: model[1].__dict__.update(_forward_hooks=hooks))


@may_load
@threat
def a_module_with_text_for_hooks(folder: Path) -> Path:
    return _module(folder, lambda model: model[1].__dict__.update(_forward_hooks="hooks"))


@may_load
@threat
def a_module_with_a_damaged_recipe(folder: Path) -> Path:
    return _module(folder, lambda model: model.__dict__.update({RECIPE: ["not", "a", "recipe"]}))


@threat
def a_module_that_is_a_graph(folder: Path) -> Path:
    return _module(folder, torch.fx.symbolic_trace)


# ---- optimizers ----


def _optimizer(folder: Path, **changes: Any) -> Path:
    content = training()
    content["optimizer"].update(changes)
    return saved(content, folder / "bad.pt")


def _group(**entries: Any) -> list[dict[str, Any]]:
    return [{"lr": 0.1, "params": [0, 1, 2, 3], **entries}]


@threat
def an_optimizer_with_unhashable_parameters(folder: Path) -> Path:
    return _optimizer(folder, param_groups=_group(params=[([],), ([],), ([],), ([],)]))


@threat
def an_optimizer_with_numbers_for_names(folder: Path) -> Path:
    return _optimizer(folder, param_groups=_group(param_names=5))


@threat
def an_optimizer_with_names_of_numbers(folder: Path) -> Path:
    return _optimizer(folder, param_groups=_group(param_names=[1, 2, 3, 4]))


@threat
def an_optimizer_with_repeated_parameters(folder: Path) -> Path:
    return _optimizer(folder, param_groups=_group(params=[0, 0, 0, 0]))


@threat
def an_optimizer_with_a_view_of_terabytes(folder: Path) -> Path:
    return _optimizer(folder, state={0: {"momentum_buffer": torch.ones(1).expand(1 << 40)}})


@threat
def an_optimizer_with_keys_that_are_lists(folder: Path) -> Path:
    return _optimizer(folder, state={("a", 1): {"momentum_buffer": 5}, None: 3})


MAY_LOAD |= {name for name in THREATS if name.startswith("an optimizer")}


# ---- safetensors ----


def _safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    return written(path, (len(packed) if length is None else length).to_bytes(8, "little") + packed + data)


def _tensors(metadata: Any = None) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes of the good state dict."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, value in state().items():
        kind = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        raw = value.numpy().tobytes()
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def _header_threats() -> None:
    """Headers of safetensors, each with one thing wrong."""

    def maker(change: Callable[[dict[str, Any]], Any]) -> Maker:
        def make(folder: Path) -> Path:
            header, data = _tensors()
            changed = change(header)
            return _safetensors(folder / "bad.safetensors", header if changed is None else changed, data)

        return make

    def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
        return lambda header: header["1.running_mean"].update(changes)

    def twice(header: dict[str, Any], last: bool) -> bytes:
        """One name with two descriptions, of which each reader may take another."""
        packed = json.dumps(header).encode()
        other = b'"1.running_mean":' + json.dumps({**header["1.running_mean"], "data_offsets": [0, 32]}).encode()
        return packed[:-1] + b"," + other + b"}" if last else b"{" + other + b"," + packed[1:]

    for name, change in {
        "overlapping offsets": lambda header: header["1.running_mean"].update(
            data_offsets=header["1.running_var"]["data_offsets"]
        ),
        "offsets beyond the end": entry(data_offsets=[1 << 20, (1 << 20) + 32]),
        "offsets backwards": entry(data_offsets=[32, 0]),
        "offsets below zero": entry(data_offsets=[-32, 0]),
        "offsets that are text": entry(data_offsets=["0", "32"]),
        "a shape beyond the bytes": entry(shape=[1 << 40]),
        "a shape that overflows": entry(shape=[1 << 32, 1 << 32, 8]),
        "a shape of nothing and too much": lambda header: header.update(
            empty={"dtype": "F32", "shape": [0, (1 << 64) - 1], "data_offsets": [0, 0]}
        ),
        "a shape of nothing and much": lambda header: header.update(
            empty={"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}
        ),
        "a dtype that is none": entry(dtype="F99"),
        "a dtype that torch lacks": entry(dtype="F6_E2M3", shape=[128], data_offsets=[0, 96]),
        "an entry that is a number": lambda header: header.update({"1.running_mean": 5}),
        "a name twice": lambda header: twice(header, True),
        "a name twice, the last one good": lambda header: twice(header, False),
        "metadata that is no text": lambda header: header.update(__metadata__={"a": 5}),
        "metadata that is a list": lambda header: header.update(__metadata__=[1]),
        "deep JSON": lambda header: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "JSON cut off": lambda header: json.dumps(header).encode()[:100],
        "no JSON": lambda header: b'{"' + bytes(range(128, 256)) * 4,
    }.items():
        THREATS[f"safetensors: {name}"] = maker(change)


_header_threats()
MAY_LOAD.add("safetensors: a name twice, the last one good")


@threat
def safetensors_that_claim_a_header_of_100_MB(folder: Path) -> Path:
    header, data = _tensors()
    return _safetensors(folder / "bad.safetensors", header, data, length=100_000_000)


@threat
def safetensors_that_claim_a_header_of_exabytes(folder: Path) -> Path:
    header, data = _tensors()
    return _safetensors(folder / "bad.safetensors", header, data, length=(1 << 63) - 1)


@threat
def a_pickle_called_safetensors(folder: Path) -> Path:
    return saved(Call(os.system, f"touch {folder / MARK}"), folder / "bad.safetensors")


@may_load
@threat
def metadata_that_is_not_ours(folder: Path) -> Path:
    return _safetensors(folder / "bad.safetensors", *_tensors({"format": "pt", "recipe": "boil", "x": "\n\x1b[2J"}))


# ---- recipes ----


def _recipe(**changes: Any) -> dict[str, Any]:
    layers = {"1": {"to": "GroupNorm", "groups": 2}}
    return {"format": 1, "target": "gn", "layers": layers, "versions": {"normswap": "0.1.0"}, **changes}


def _deep(steps: int) -> dict[str, Any]:
    made = _recipe()
    for _ in range(steps):
        made = _recipe(previous=made)
    return made


_LIES: dict[str, Callable[[Path], Any]] = {
    "the path __class__": lambda _: _recipe(layers={"__class__": {"to": "GroupNorm", "groups": 2}}),
    "the path of globals": lambda _: _recipe(layers={"__init__.__globals__": {"to": "GroupNorm", "groups": 2}}),
    "the path of a method": lambda _: _recipe(layers={"1.forward": {"to": "GroupNorm", "groups": 2}}),
    "a path with a newline": lambda _: _recipe(layers={"a\n\x1b[2Jb": {"to": "GroupNorm", "groups": 2}}),
    "groups that do not divide": lambda _: _recipe(layers={"1": {"to": "GroupNorm", "groups": 3}}),
    "more groups than a number holds": lambda _: _recipe(layers={"1": {"to": "GroupNorm", "groups": 10**4000}}),
    "another class": lambda _: _recipe(layers={"1": {"to": "os.system\nerror", "groups": None}}),
    "a path of 100,000 parts": lambda _: _recipe(layers={"a." * 100_000 + "b": {"to": "GroupNorm", "groups": 2}}),
    "previous conversions without end": lambda _: _deep(100),
    "a model that is code": lambda folder: _recipe(model="unlisted:factory"),
    "a model that is a file": lambda folder: _recipe(model=f"{folder}/unlisted.py:factory"),
    "a model that is none": lambda _: _recipe(model="torchvision:../../etc/passwd"),
    "a model of timm by its address": lambda _: _recipe(model="timm:hf-hub:somebody/something"),
    "a model of timm in a folder": lambda folder: _recipe(model=f"timm:local-dir:{folder}"),
    "arguments that fetch": lambda folder: _recipe(
        model="timm:resnet10t",
        model_args={"pretrained": True, "pretrained_cfg_overlay": {"url": (folder / "f.pth").as_uri()}},
    ),
    "arguments that read": lambda folder: _recipe(
        model="timm:resnet10t", model_args={"checkpoint_path": str(folder / "checkpoint.pth")}
    ),
    "arguments that fetch weights": lambda _: _recipe(
        model="torchvision:fcn_resnet50", model_args={"weights_backbone": "IMAGENET1K_V1", "pretrained_backbone": True}
    ),
    "arguments without end": lambda _: _recipe(
        model="torchvision:mobilenet_v2", model_args={"inverted_residual_setting": [[1, 16, 100_000_000, 1]]}
    ),
    "arguments of terabytes": lambda _: _recipe(
        model="torchvision:resnet18", model_args={"num_classes": 10**12, "norm_layer": "x"}
    ),
    "arguments that are a list": lambda _: _recipe(model="torchvision:resnet18", model_args=[1, 2]),
}
"""Recipes in which nothing is malformed; what they say is harmful or wrong."""
_DAMAGES: dict[str, Any] = {
    "a target that is none": _recipe(target="__class__"),
    "a target that is a list": _recipe(target=["gn"]),
    "a newer format": _recipe(format=99, versions={"normswap": "9\n\x1b[2J"}),
    "a format that is text": _recipe(format="1"),
    "no format": {"target": "gn", "layers": {}},
    "layers that are a list": _recipe(layers=[1, 2]),
    "a layer that is text": _recipe(layers={"1": "GroupNorm"}),
    "groups that are text": _recipe(layers={"1": {"to": "GroupNorm", "groups": "2"}}),
    "groups below zero": _recipe(layers={"1": {"to": "GroupNorm", "groups": -2}}),
    "a number": 5,
    "a list": ["gn"],
    "text": "gn",
    "a damaged previous": _recipe(previous=[1]),
}


def _recipe_threats() -> None:
    """Every hostile recipe in a state dict, a safetensors file and an index."""

    def in_state(folder: Path, recipe: Any) -> Path:
        content = state()
        content._metadata[RECIPE] = recipe  # type: ignore[attr-defined]
        return saved(content, folder / "bad.pt")

    def in_header(folder: Path, recipe: Any) -> Path:
        return _safetensors(folder / "bad.safetensors", *_tensors({RECIPE: json.dumps(recipe)}))

    def in_index(folder: Path, recipe: Any) -> Path:
        (folder / "shards").mkdir()
        names = dict.fromkeys(state(), "model.safetensors")
        _safetensors(folder / "shards/model.safetensors", *_tensors())
        index = {"metadata": {RECIPE: json.dumps(recipe)}, "weight_map": names}
        return written(folder / "shards/model.safetensors.index.json", json.dumps(index).encode()).parent

    def maker(place: Callable[[Path, Any], Path], recipe: Callable[[Path], Any]) -> Maker:
        def make(folder: Path) -> Path:
            made_module(folder)
            saved(Call(os.system, f"touch {folder / MARK}"), folder / "checkpoint.pth")
            saved(state(), folder / "f.pth")
            return place(folder, recipe(folder))

        return make

    for where, place in {"_metadata": in_state, "safetensors": in_header, "index": in_index}.items():
        for name, recipe in _LIES.items():
            if "number holds" in name and where != "_metadata":
                continue  # JSON holds no such number
            THREATS[f"recipe in {where}: {name}"] = maker(place, recipe)
            MAY_CONVERT.add(f"recipe in {where}: {name}")
        for name, damage in _DAMAGES.items():
            THREATS[f"recipe in {where}: {name}"] = maker(place, lambda _, damage=damage: damage)


_recipe_threats()


@threat
def a_recipe_that_is_no_JSON(folder: Path) -> Path:
    return _safetensors(folder / "bad.safetensors", *_tensors({RECIPE: "{"}))


@threat
def a_recipe_of_deep_JSON(folder: Path) -> Path:
    return _safetensors(folder / "bad.safetensors", *_tensors({RECIPE: '{"previous":' * 100_000 + "1" + "}" * 100_000}))


@threat
def a_recipe_with_a_number_without_end(folder: Path) -> Path:
    return _safetensors(folder / "bad.safetensors", *_tensors({RECIPE: '{"format":' + "9" * 100_000 + "}"}))


@threat
def a_recipe_that_holds_itself(folder: Path) -> Path:
    content, made = state(), _recipe()
    made["previous"] = made
    content._metadata[RECIPE] = made  # type: ignore[attr-defined]
    return saved(content, folder / "bad.pt")


@may_load
@threat
def metadata_of_a_state_dict_that_is_a_number(folder: Path) -> Path:
    content = state()
    content._metadata = 5  # type: ignore[attr-defined]
    return saved(content, folder / "bad.pt")


# ---- folders ----


def _index(folder: Path, described: Any, content: bytes | None = None) -> Path:
    inner = folder / "shards"
    inner.mkdir()
    header, data = _tensors()
    _safetensors(inner / "model.safetensors", header, data)
    _safetensors(folder / "outside.safetensors", header, data)
    written(inner / "model.safetensors.index.json", content or json.dumps(described).encode())
    return inner


def _index_threats() -> None:
    def maker(described: Callable[[Path], Any], content: bytes | None = None) -> Maker:
        return lambda folder: _index(folder, described(folder), content)

    keys = list(state())

    def names(name: Any) -> Callable[[Path], Any]:
        return lambda folder: {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}

    good = dict.fromkeys(keys, "model.safetensors")
    for name, described in {
        "a file above": names("../outside.safetensors"),
        "the folder above": names(".."),
        "an absolute path": lambda folder: names(str(folder / "outside.safetensors"))(folder),
        "a name with a newline": names("a\n\x1b[2J"),
        "an empty name": names(""),
        "a name with a null": names("model\0.safetensors"),
        "a name that is a number": names(5),
        "a missing file": names("absent.safetensors"),
        "itself": names("model.safetensors.index.json"),
        "keys that are not there": lambda _: {"weight_map": {**good, "more\n": "model.safetensors"}},
        "metadata that is text": lambda _: {"metadata": "text", "weight_map": good},
        "metadata that is a number": lambda _: {"metadata": 5, "weight_map": good},
        "a recipe that is a dict": lambda _: {"metadata": {RECIPE: _recipe()}, "weight_map": good},
        "a map that is a list": lambda _: {"weight_map": [1]},
        "a list": lambda _: [1],
        "no map": lambda _: {},
        "an empty map": lambda _: {"weight_map": {}},
    }.items():
        THREATS[f"index of {name}"] = maker(described)
    for name, content in {
        "no text": b"\xff\xfe\x00{",
        "deep JSON": b"[" * 100_000,
        "a number without end": b'{"weight_map": ' + b"9" * 100_000 + b"}",
    }.items():
        THREATS[f"index of {name}"] = maker(lambda _: None, content)


_index_threats()


@threat
def an_index_of_a_hostile_pickle(folder: Path) -> Path:
    inner = _index(folder, {"weight_map": dict.fromkeys(state(), "pytorch_model.bin")})
    saved(Call(os.system, f"touch {folder / MARK}"), inner / "pytorch_model.bin")
    return inner


@threat
def an_index_of_a_dict_with_numbers(folder: Path) -> Path:
    inner = _index(folder, {"weight_map": dict.fromkeys(state(), "pytorch_model.bin")})
    saved({0: torch.ones(1), "a": torch.ones(1)}, inner / "pytorch_model.bin")
    return inner


@threat
def a_folder_with_a_list_for_weights(folder: Path) -> Path:
    inner = folder / "run"
    inner.mkdir()
    saved([1, 2], inner / "pytorch_model.bin")
    return inner


@threat
def a_folder_with_a_number_for_weights(folder: Path) -> Path:
    inner = folder / "run"
    inner.mkdir()
    saved(5, inner / "pytorch_model.bin")
    return inner


def _beside(folder: Path) -> Path:
    """A folder with good weights, to put something beside them."""
    inner = folder / "run"
    inner.mkdir()
    saved(state(), inner / "pytorch_model.bin")
    return inner


@may_load
@threat
def a_folder_with_a_device_in_it(folder: Path) -> Path:
    """A link to a device that has no end, which a copy of the folder would follow."""
    inner = _beside(folder)
    (inner / "notes.txt").symlink_to("/dev/zero")
    return inner


@may_load
@threat
def a_folder_with_links_to_itself(folder: Path) -> Path:
    """Two links to the folder itself: 2^40 copies, if they are followed."""
    inner = _beside(folder)
    for name in ("a", "b"):
        (inner / name).symlink_to(".")
    return inner


@may_load
@threat
def a_folder_with_a_pipe_in_it(folder: Path) -> Path:
    inner = _beside(folder)
    os.mkfifo(inner / "notes.txt")
    return inner


@threat
def a_pipe_for_an_index(folder: Path) -> Path:
    inner = folder / "run"
    inner.mkdir()
    os.mkfifo(inner / "model.safetensors.index.json")
    return inner


@threat
def a_pipe_for_weights(folder: Path) -> Path:
    inner = folder / "run"
    inner.mkdir()
    os.mkfifo(inner / "model.safetensors")
    return inner


# ---- distributed checkpoints ----


def _distributed(folder: Path, change: Callable[[Metadata, Path], Any] | None = None) -> Path:
    """A good distributed checkpoint whose description `change` changes."""
    inner = folder / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state(), storage_writer=dcp.FileSystemWriter(inner, sync_files=False))
    if change is not None:
        with (inner / ".metadata").open("rb") as file:
            metadata = pickle.load(file)
        changed = change(metadata, inner)
        written(inner / ".metadata", pickle.dumps(metadata if changed is None else changed))
    return inner


_HERE = "torch.distributed.checkpoint.metadata"


@threat
def a_distributed_call_of_os_system(folder: Path) -> Path:
    return _distributed(folder, lambda metadata, _: Call(os.system, f"touch {folder / MARK}"))


@threat
def a_distributed_call_in_the_planner(folder: Path) -> Path:
    return _distributed(
        folder, lambda metadata, _: metadata.__dict__.update(planner_data=Call(os.system, f"touch {folder / MARK}"))
    )


@threat
def a_distributed_dataclass_made_of_code(folder: Path) -> Path:
    """`dataclass`, which that module imports, pastes the names of fields into code; a pickle can set these names."""
    inner = _distributed(folder)
    code = f"a=__import__('os').system('touch {folder / MARK}')):#"
    fields = b"}" + text("__annotations__") + b"}" + text(code) + text("InitVar") + b"s" + b"s"
    fields += text("__module__") + text("dataclasses") + b"s"
    made = b"\x80\x02" + named(_HERE, "StorageMeta") + b"N" + fields + b"\x86bq\x000"
    written(inner / ".metadata", made + named(_HERE, "dataclass") + b"h\x00\x85R.")
    return inner


@threat
def a_distributed_change_of_a_module(folder: Path) -> Path:
    """A pickle that sets an attribute of the module `os`, which that module imports."""
    inner = _distributed(folder)
    return written(inner / ".metadata", b"\x80\x02" + named(_HERE, "os") + b"}" + text(HURT) + b"K\x01sb.").parent


@threat
def a_distributed_change_of_a_class(folder: Path) -> Path:
    inner = _distributed(folder)
    fields = b"N}" + text(HURT) + b"K\x01s\x86b"
    return written(inner / ".metadata", b"\x80\x02" + named(_HERE, "MetadataIndex") + fields + b".").parent


@threat
def a_distributed_huge_memo(folder: Path) -> Path:
    """A memo entry of a high number: pickle's own reader takes 16 bytes for each below it, here 3 GB, at most 68."""
    return written(_distributed(folder) / ".metadata", b"\x80\x02}r\xff\xff\xff\x0b.").parent


@threat
def a_distributed_long_string(folder: Path) -> Path:
    claim = b"\x8d" + struct.pack("<Q", 1 << 42)
    return written(_distributed(folder) / ".metadata", b"\x80\x04" + claim + b"abc.").parent


def _moved(metadata: Metadata, name: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = name


def _spread(metadata: Metadata, path: Path) -> None:
    """400 entries that all claim the same 20 MB of one shard: 8 GB."""
    path.parent.joinpath("big").mkdir()
    big = path.parent / "big"
    dcp.save({"a": torch.ones(5 << 20)}, storage_writer=dcp.FileSystemWriter(big, sync_files=False))
    (big / "__0_0.distcp").rename(path / "__1_0.distcp")
    with (big / ".metadata").open("rb") as file:
        one = pickle.load(file)
    (big / ".metadata").unlink()
    big.rmdir()
    info = next(iter(one.storage_data.values()))
    info.relative_path = "__1_0.distcp"
    for i in range(400):
        metadata.state_dict_metadata[f"w{i}"] = one.state_dict_metadata["a"]
        metadata.storage_data[MetadataIndex(f"w{i}", torch.Size([0]), 0)] = info


def _size(metadata: Metadata, size: Any) -> None:
    entry = metadata.state_dict_metadata["1.running_mean"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.size = size


def _chunks(metadata: Metadata, **changes: Any) -> None:
    entry = metadata.state_dict_metadata["1.running_mean"]
    assert isinstance(entry, TensorStorageMetadata)
    for chunk in entry.chunks:
        chunk.__dict__.update(changes)


def _infos(metadata: Metadata, **changes: Any) -> None:
    for info in metadata.storage_data.values():
        info.__dict__.update(changes)


def _renamed(metadata: Metadata, name: Any) -> None:
    metadata.state_dict_metadata[name] = metadata.state_dict_metadata.pop("1.running_mean")
    for index in list(metadata.storage_data):
        if index.fqn == "1.running_mean":
            metadata.storage_data[MetadataIndex(name, index.offset, index.index)] = metadata.storage_data.pop(index)


_DESCRIPTIONS: dict[str, Callable[[Metadata, Path], Any]] = {
    "file above": lambda m, _: _moved(m, "../outside"),
    "absolute file": lambda m, _: _moved(m, "/etc/passwd"),
    "folder above": lambda m, _: _moved(m, ".."),
    "file with a newline": lambda m, _: _moved(m, "a\n\x1b[2Jb"),
    "file that is a number": lambda m, _: _moved(m, 5),
    "missing file": lambda m, _: _moved(m, "__9_0.distcp"),
    "claim of terabytes": lambda m, _: _size(m, torch.Size([1 << 40])),
    "claim of many": lambda m, path: _spread(m, path),
    "size below zero": lambda m, _: _size(m, torch.Size([-8])),
    "size that is a tuple": lambda m, _: _size(m, (8,)),
    "size that is text": lambda m, _: _size(m, "eight"),
    "size that overflows": lambda m, _: _size(m, torch.Size([1 << 62, 1 << 62, 0])),
    "chunks beyond the tensor": lambda m, _: _chunks(m, offsets=torch.Size([1 << 30])),
    "chunks below zero": lambda m, _: _chunks(m, offsets=torch.Size([-4])),
    "chunks that are huge": lambda m, _: _chunks(m, sizes=torch.Size([1 << 40])),
    "no chunks": lambda m, _: m.state_dict_metadata["1.running_mean"].__dict__.update(chunks=[]),
    "chunks that are numbers": lambda m, _: m.state_dict_metadata["1.running_mean"].__dict__.update(chunks=[1]),
    "offset beyond the file": lambda m, _: _infos(m, offset=1 << 40),
    "offset below zero": lambda m, _: _infos(m, offset=-1),
    "offset that is text": lambda m, _: _infos(m, offset="0"),
    "length without end": lambda m, _: _infos(m, length=1 << 62),
    "transformation that is none": lambda m, _: _infos(m, transform_descriptors=["os.system"]),
    "properties that are none": lambda m, _: m.state_dict_metadata["1.running_mean"].__dict__.update(properties=None),
    "entries that are a list": lambda m, _: m.__dict__.update(state_dict_metadata=[1]),
    "entries without attributes": lambda m, _: m.__dict__.clear(),
    "storage that is a list": lambda m, _: m.__dict__.update(storage_data=[1]),
    "entry that is a number": lambda m, _: m.state_dict_metadata.update(a=5),  # type: ignore[arg-type]
    "name with a newline": lambda m, _: m.state_dict_metadata.update({"a\n\x1b[2J": 5}),  # type: ignore[dict-item]
    "name that is a number": lambda m, _: _renamed(m, 7),
    "list": lambda m, _: [1, 2],
    "planner of numbers": lambda m, _: m.__dict__.update(planner_data=dict.fromkeys(m.state_dict_metadata, 5)),
    "planner that is a list": lambda m, _: m.__dict__.update(planner_data=[1]),
    "planner of deep keys": lambda m, _: m.__dict__.update(planner_data={"1.weight": ((("a",) * 9,) * 9)}),
}


def _distributed_threats() -> None:
    def maker(change: Callable[[Metadata, Path], Any]) -> Maker:
        return lambda folder: _distributed(folder, change)

    for name, change in _DESCRIPTIONS.items():
        THREATS[f"distributed {name}"] = maker(change)
        if name.startswith(("planner", "chunks that are huge", "length", "size that is a tuple")):
            MAY_LOAD.add(f"distributed {name}")


_distributed_threats()


@threat
def a_distributed_hostile_shard(folder: Path) -> Path:
    def change(metadata: Metadata, path: Path) -> None:
        saved(Call(os.system, f"touch {folder / MARK}"), path / "__0_0.distcp")
        _infos(metadata, offset=0, length=(path / "__0_0.distcp").stat().st_size)

    return _distributed(folder, change)


def _hostile_bytes(folder: Path, name: str) -> Path:
    def change(metadata: Metadata, path: Path) -> None:
        saved(Call(os.system, f"touch {folder / MARK}"), path / "__1_0.distcp")
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        (info,) = list(metadata.storage_data.values())[:1]
        made = type(info)("__1_0.distcp", 0, (path / "__1_0.distcp").stat().st_size)
        metadata.storage_data[MetadataIndex(name)] = made

    return _distributed(folder, change)


@may_load
@threat
def a_distributed_hostile_entry_of_bytes(folder: Path) -> Path:
    return _hostile_bytes(folder, "1._extra_state")


@may_load
@threat
def a_distributed_hostile_recipe(folder: Path) -> Path:
    return _hostile_bytes(folder, RECIPE)


@threat
def a_distributed_cut_shard(folder: Path) -> Path:
    inner = _distributed(folder)
    os.truncate(inner / "__0_0.distcp", 1000)
    return inner


@threat
def a_distributed_overlap(folder: Path) -> Path:
    """Two chunks for one place, which together fill half of the tensor."""

    def change(metadata: Metadata, path: Path) -> None:
        half = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([4]))
        entry = metadata.state_dict_metadata["1.running_mean"]
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks = [half, half]

    return _distributed(folder, change)


# ---- other kinds of files ----


@threat
def an_empty_file(folder: Path) -> Path:
    return written(folder / "bad.pt", b"")


@threat
def a_text_file(folder: Path) -> Path:
    return written(folder / "bad.pt", b"weights, honest\n" * 50)


@threat
def a_file_of_noise(folder: Path) -> Path:
    return written(folder / "bad.pt", bytes(range(255, -1, -1)) * 4)


@threat
def a_truncated_file(folder: Path) -> Path:
    data = saved(state(), folder / "bad.pt").read_bytes()
    return written(folder / "bad.pt", data[: len(data) // 2])


@threat
def a_truncated_file_old_format(folder: Path) -> Path:
    data = saved(state(), folder / "bad.pt", zipped=False).read_bytes()
    return written(folder / "bad.pt", data[:-20])


@threat
def truncated_safetensors(folder: Path) -> Path:
    data = _safetensors(folder / "bad.safetensors", *_tensors()).read_bytes()
    return written(folder / "bad.safetensors", data[:-20])


@threat
def a_TorchScript_archive(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net(), torch.ones(1, 3, 8, 8)).save(str(folder / "bad.pt"))
    return folder / "bad.pt"


@threat
def an_exported_program(folder: Path) -> Path:
    torch.export.save(torch.export.export(net(), (torch.ones(1, 3, 8, 8),)), folder / "bad.pt2")
    return folder / "bad.pt2"


@threat
def an_ONNX_file(folder: Path) -> Path:
    return written(folder / "bad.onnx", b"\x08\x08\x12\x07pytorch" + bytes(100))


@threat
def a_bare_pickle(folder: Path) -> Path:
    return written(folder / "bad.pt", pickle.dumps([1, 2, 3]))


@threat
def a_bare_pickle_of_a_call(folder: Path) -> Path:
    return written(folder / "bad.pt", pickle.dumps(Call(os.system, f"touch {folder / MARK}"), protocol=2))


@threat
def a_pickle_that_is_a_tar(folder: Path) -> Path:
    """torch's oldest format was a tar archive, whose parts it unpacks; this one begins like a pickle."""
    import io
    import tarfile

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as made:
        for name in ("\x7f\x02first", "storages", "tensors", "pickle"):
            data = pickle.dumps(Call(os.system, f"touch {folder / MARK}"), protocol=2)
            part = tarfile.TarInfo(name)
            part.size = len(data)
            made.addfile(part, io.BytesIO(data))
    head = bytearray(stream.getvalue())
    head[0] = 0x80
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head[:512])
    return written(folder / "bad.pt", bytes(head))


@threat
def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "bad.pt")
    return folder / "bad.pt"


@threat
def a_link_to_a_device(folder: Path) -> Path:
    (folder / "bad.pt").symlink_to("/dev/zero")
    return folder / "bad.pt"


@threat
def a_link_to_itself(folder: Path) -> Path:
    (folder / "bad.pt").symlink_to("bad.pt")
    return folder / "bad.pt"


@threat
def a_link_to_nothing(folder: Path) -> Path:
    (folder / "bad.pt").symlink_to("absent.pt")
    return folder / "bad.pt"


@threat
def an_empty_folder(folder: Path) -> Path:
    (folder / "bad").mkdir()
    return folder / "bad"


@threat
def a_state_dict_of_nothing(folder: Path) -> Path:
    return saved(OrderedDict(), folder / "bad.pt")


# ---- pickles that make much of little, or what nobody can check ----


def _dtype(name: str, state: bytes = b"") -> bytes:
    """A dtype of numpy in a pickle, with the state that BUILD gives it."""
    return named("numpy", "dtype") + b"(" + text(name) + b"\x89\x88tR" + (state + b"b" if state else b"")


def _held(data: bytes) -> Maker:
    """A training checkpoint whose further entry is the object of some instructions."""

    def make(folder: Path) -> Path:
        start = b"\x80\x02}(" + text("model") + b"}" + text("1.weight") + b"Ns" + text("more")
        return archive(folder / "bad.pt", start + data + b"u.")

    return make


def _again(value: bytes, each: bytes, times: int) -> bytes:
    """A list of what some instructions make of one value (`h\\x01`), many times over: it is in the file once."""
    return b"]" + value + b"q\x010(" + each * times + b"e"


_LATIN = named("_codecs", "encode")
_DEEP = b")" + b"".join(b"r" + struct.pack("<I", n) + b"j" + struct.pack("<I", n) + b"\x86" for n in range(1, 80))
_HALF = text("A" * 500_000)
_ALIKE = b"".join(b"\x8a\x0b" + ((k << 61) - k + 5).to_bytes(11, "little") + b"N" for k in range(1, 50_000))
_PLAIN = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
_INNER = b"(K\x03" + text("<") + b"(" + _dtype("u1") + b"J\x00\x00\x10\x00\x85tNNK\x08K\x08K\x00t"
_FIELDS = b"(K\x03" + text("<") + b"N" + text("a") + b"\x85}" + text("a") + _dtype("O8") + b"K\x00\x86sK\x08K\x08K\x03t"


def _array(dtype: bytes, shape: bytes, size: int) -> bytes:
    data = _LATIN + b"(" + text("A" * size) + text("latin1") + b"tR"
    start = (
        named("numpy._core.multiarray", "_reconstruct") + b"(" + named("numpy", "ndarray") + b"K\x00\x85" + data + b"tR"
    )
    return start + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"


def _calls(name: str, *arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return named(module, function) + b"(" + b"".join(arguments) + b"tR"


_BILLION = b"J\x00\xca\x9a\x3b"
THREATS |= {
    "a dtype of objects": _held(_array(_dtype("O8"), b"K\x01\x85", 8)),
    "a dtype within a dtype": _held(_array(_dtype("f8", _INNER), b"K\x01\x85", 8)),
    "a dtype of fields": _held(_array(_dtype("f8", _FIELDS), b"K\x01\x85", 8)),
    "a dtype of two gigabytes": _held(_dtype("V2000000000")),
    "a text dtype of gigabytes": _held(_array(_dtype("U500000000"), b"K\x01\x85", 8)),
    "an array of more than its bytes": _held(_array(_dtype("f8", _PLAIN), _BILLION + b"\x85", 8)),
    "an array of no bytes": _held(_array(_dtype("f8", _PLAIN), b"J\xff\xff\xff\xff\x85", 8)),
    "a call of an array": _held(_calls("numpy.ndarray", _BILLION + b"\x85")),
    "a number of other bytes": _held(_calls("numpy._core.multiarray.scalar", _dtype("f8"), b"U\x03AAA")),
    "a bytearray of a size": _held(_calls("builtins.bytearray", _BILLION)),
    "a tensor class called": _held(_calls("torch.FloatTensor", _BILLION)),
    "a parameter of a size": _held(_calls("torch.nn.parameter.Parameter", _BILLION)),
    "a slow encoding": _held(_calls("_codecs.encode", text("\u4e00" * 400_000), text("punycode"))),
    "a text encoded often": _held(_again(_HALF, _LATIN + b"h\x01" + text("latin1") + b"\x86R", 20_000)),
    "a list copied often": _held(
        _again(b"](" + b"K\x01" * 200_000 + b"e", named("builtins", "frozenset") + b"h\x01\x85R", 5000)
    ),
    "a key that holds itself": _held(b"}" + _DEEP + b"Ns"),
    "a layout that holds itself": _held(named("torch.serialization", "_get_layout") + _DEEP + b"\x85R"),
    "an element that holds itself": _held(named("builtins", "set") + b"](" + _DEEP + b"e\x85R"),
    "keys of one hash": _held(b"}(" + _ALIKE + b"u"),
    "a factory that is a module": _held(_calls("collections.defaultdict", named("torch.nn.modules.rnn", "LSTM"))),
    "a forward called": _held(
        _calls("torch._tensor._rebuild_from_type_v2", named("torch.nn.modules.upsampling", "Upsample") + b")\x81",
               named("torch", "Tensor"), b")", b"}")
    ),
    "a tensor with a changed shape": _held(
        _calls("torch._utils._rebuild_parameter_with_state",
               _calls("torch._utils._rebuild_meta_tensor_no_storage", named("torch", "float32"), b"))", b"\x89"),
               b"\x88", b"N", b"}" + text("data") + b"Ns")
    ),
    "a sparse tensor of lists": _held(
        _calls("torch._utils._rebuild_sparse_tensor",
               _calls("torch.serialization._get_layout", text("torch.sparse_coo")),
               _DEEP + _DEEP + b"K\x01\x85\x87")
    ),
    "an LSTM of a billion layers": _held(
        named("torch.nn.modules.rnn", "LSTM") + b")\x81}(" + text("num_layers") + _BILLION
        + text("_all_weights") + b"](]K\x01aeub"
    ),
    "a compiled layer": _held(named("torch.ao.nn.quantized.modules.conv", "Conv2d") + b")\x81(K\x01K\x01tb"),
}  # fmt: skip


def _storage_of(key: str, numbers: bytes) -> bytes:
    return b"(" + text("storage") + named("torch", "FloatStorage") + text(key) + text("cpu") + numbers + b"tQ"


def _tensor_of(storage: bytes, offset: bytes, size: bytes) -> bytes:
    return _calls("torch._utils._rebuild_tensor_v2", storage, offset, size + b"\x85K\x01\x85\x89N")


def _with_storage(data: bytes) -> Maker:
    def make(folder: Path) -> Path:
        path = _held(data)(folder)
        with zipfile.ZipFile(path, "a") as made:
            made.writestr("archive/data/0", bytes(64))
        return path

    return make


THREATS |= {
    "a storage of more than its entry": _with_storage(_tensor_of(_storage_of("0", _BILLION), b"K\x00", b"K\x01")),
    "a storage of less than nothing": _with_storage(
        _tensor_of(_storage_of("0", b"J\xff\xff\xff\xff"), b"K\x00", b"K\x01")
    ),
    "a tensor beyond its storage": _with_storage(_tensor_of(_storage_of("0", b"K\x10"), b"K\x00", b"K\x20")),
    "a tensor before its storage": _with_storage(
        _tensor_of(_storage_of("0", b"K\x10"), b"J\xff\xff\xff\xff", b"K\x01")
    ),
    "a storage that is missing": _with_storage(_tensor_of(_storage_of("1", b"K\x10"), b"K\x00", b"K\x01")),
}


@threat
def an_old_file_without_one_of_its_storages(folder: Path) -> Path:
    """Memory that nobody filled would be written into the output."""
    path = saved(training(), folder / "bad.pt", zipped=False)
    data = path.read_bytes()
    keys = data.rindex(b"\x80\x02]q\x00(X")
    return written(path, data[:keys] + b"\x80\x02].")


@threat
def an_old_file_of_a_huge_storage(folder: Path) -> Path:
    path = saved(state(), folder / "bad.pt", zipped=False)
    data = path.read_bytes()
    return written(path, data.replace(b"cpuq", b"cpur\x09\x00\x00\x00" + _BILLION + b"00" + b"q", 1))


def main() -> None:
    """Make the whole corpus, each threat in a folder of its own."""
    root = Path(sys.argv[1])
    for name, make in THREATS.items():
        folder = root / "".join(c if c.isalnum() or c in " ._" else "-" for c in name).replace(" ", "_")
        folder.mkdir(parents=True)
        print(make(folder.resolve()))


if __name__ == "__main__":
    main()
