"""State dicts of torchvision's and timm's networks are recognized by keys and shapes, or what to type is said."""

import importlib.util
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import run
from torch import nn

import normswap
from normswap.files import architectures, model_specs

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def network(spec: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return model_specs.build(spec, arguments=arguments)


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("classes", [1000, 7])
def test_a_resnet_is_converted_and_loaded_without_a_word(tmp_path: Path, classes: int) -> None:
    model = network("torchvision:resnet18", num_classes=classes)
    torch.save(model.state_dict(), tmp_path / "resnet18-f37072fd.pth")
    report = normswap.convert_file(tmp_path / "resnet18-f37072fd.pth", "frozen-ws")
    assert "--model torchvision:resnet18" in report.recognized and report.totals.weights_changed == 20
    loaded = normswap.load(tmp_path / "resnet18-f37072fd.frozen-ws.pth").eval()
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(normswap.load(tmp_path / "resnet18-f37072fd.pth").eval()(X), model(X))


@pytest.mark.parametrize("wrap", [
    lambda state: {"state_dict": prefixed(state, "module."), "epoch": 3},
    lambda state: {"model": prefixed(state, "_orig_mod."), "ema": state},
    lambda state: {"state_dict": {**prefixed(state, "model."), "criterion.weight": torch.ones(7)}},
    lambda state: {**prefixed(state, "student."), **prefixed(state, "teacher.")},
    lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
])  # fmt: skip
def test_wrapped_checkpoints_are_recognized(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(network("torchvision:resnet18", num_classes=7).state_dict()), tmp_path / "run.pth")
    done = run("convert", tmp_path / "run.pth", "--to", "gn-ws")
    assert done.exit_code == 0, done.stderr
    assert "--model torchvision:resnet18 --model-arg num_classes=7" in " ".join(done.stdout.split())


def test_networks_that_differ_in_what_no_key_shows_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(network("timm:tf_efficientnet_b0", num_classes=5).state_dict(), path)
    with pytest.raises(normswap.OptionError, match="gn-ws needs") as refusal:
        normswap.convert_file(path, "gn-ws")
    for name in ("timm:efficientnet_b0", "timm:tf_efficientnet_b0"):
        assert f"--model {name} --model-arg num_classes=5" in str(refusal.value)
    with pytest.raises(normswap.FileError, match="--model timm:tf_efficientnet_b0"):
        normswap.load(path)
    report = normswap.convert_file(path, "gn")  # on the tensors alone, as far as these tell
    assert "choose:" in report.recognized and report.recipe.get("model") is None


def test_other_networks_are_not_taken_for_one(tmp_path: Path) -> None:
    state = network("torchvision:resnet18").state_dict()
    wider = {**state, "layer4.1.conv3.weight": torch.ones(512, 512, 1, 1)}
    larger = {**prefixed(state, "backbone."), "neck.weight": torch.ones(256, 512, 1, 1)}
    reshaped = {**state, "conv1.weight": torch.ones(64, 1, 7, 7)}
    odd = {**state, "fc.weight": torch.ones(7, 512)}  # and 1000 biases
    for other in (wider, larger, reshaped, odd, {"fc.weight": state["fc.weight"]}):
        assert architectures.recognize(other) == []


def test_a_refusal_has_a_line_to_paste(tmp_path: Path) -> None:
    path = tmp_path / "my net.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict(), path)
    with pytest.raises(normswap.OptionError) as refusal:
        normswap.convert_file(path, "gn-ws")
    assert f"normswap convert {shlex.quote(str(path))} --to gn-ws --model net.py:make_model" in str(refusal.value)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.files.recognized import recognized

    only_timm = architectures.Architecture("timm:some_net", {})
    monkeypatch.setattr(architectures, "recognize", lambda state: [only_timm])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = recognized({})
    assert told.network is None and told.said.endswith("pip install timm")


def test_inspect_says_what_it_is(tmp_path: Path) -> None:
    torch.save(network("torchvision:resnet18").state_dict(), tmp_path / "weights.pth")
    done = run("inspect", tmp_path / "weights.pth")
    assert done.exit_code == 0 and "torchvision:resnet18" in done.stdout


def test_the_index_is_small() -> None:
    assert architectures.INDEX.stat().st_size < 300_000


def test_torchvisions_network_is_taken_where_timm_has_others_of_its_keys() -> None:
    from normswap.files.recognized import recognized

    with torch.device("meta"):
        told = recognized(network("torchvision:resnet50").state_dict())
    assert told.network is not None and told.network.spec == "torchvision:resnet50"
    assert "timm:resnetblur50" in told.said


def test_options_that_no_key_shows_are_listed() -> None:
    with torch.device("meta"):
        found = architectures.recognize(network("torchvision:googlenet").state_dict())
    assert [network.arguments for network in found] == [{}, {"transform_input": True}]


def test_every_key_is_looked_at_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0
    real = architectures.fingerprint

    def counting(lines: Iterable[str]) -> str:
        nonlocal looked_at
        lines = list(lines)
        looked_at += len(lines)
        return real(lines)

    monkeypatch.setattr(architectures, "fingerprint", counting)
    state = {f"{number}.{name}": torch.zeros(4) for number in range(500) for name in ("weight", "running_mean")}
    assert architectures.recognize(state) == [] and looked_at <= 5 * len(state)
