"""Models of transformers, made from small configurations: converted, saved and loaded its ways, and trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap

transformers = pytest.importorskip("transformers")

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

EXACT = ("frozen", "fold", "frozen-ws", "fold-wn")
APPROXIMATE = ("gn", "gn-ws")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) + 0.5
LABELS = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])}]


def resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3
        )
    )


def resnet_of_bottlenecks() -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", num_labels=3
        )
    )


def regnet() -> nn.Module:
    return transformers.RegNetForImageClassification(
        transformers.RegNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, num_labels=3)
    )


def mobilenet_v2() -> nn.Module:
    return transformers.MobileNetV2ForImageClassification(
        transformers.MobileNetV2Config(depth_multiplier=0.25, num_labels=3, tf_padding=False)
    )


def efficientnet() -> nn.Module:
    return transformers.EfficientNetForImageClassification(
        transformers.EfficientNetConfig(
            image_size=64, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_labels=3
        )
    )


def levit() -> nn.Module:
    return transformers.LevitForImageClassificationWithTeacher(
        transformers.LevitConfig(
            image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
            key_dim=[8, 8, 8], num_labels=3,
        )
    )  # fmt: skip


def mobilevit() -> nn.Module:
    return transformers.MobileViTForImageClassification(
        transformers.MobileViTConfig(
            image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64], num_labels=3
        )
    )


def detr() -> nn.Module:
    """Its norms are of its own class, whose gain, bias and statistics are buffers."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, num_labels=3,
        )
    )  # fmt: skip


def rt_detr(frozen: bool = False) -> nn.Module:
    """Norms in the backbone, of torch or frozen ones of its own class, and torch's in the encoder."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
            freeze_backbone_batch_norms=frozen, d_model=16, encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16],
            decoder_in_channels=[16, 16, 16], encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layers=1,
            decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5, num_labels=3,
            num_denoising=2, anchor_image_size=None, eval_size=None,
        )
    )  # fmt: skip


CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": resnet, "ResNet of bottlenecks": resnet_of_bottlenecks, "RegNet": regnet,
    "MobileNetV2": mobilenet_v2, "EfficientNet": efficientnet, "LeViT": levit, "MobileViT": mobilevit,
}  # fmt: skip
MODELS = {**CLASSIFIERS, "RT-DETR": rt_detr}


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose norms and weights are far from where they start, and whose output goes by its input."""
    torch.manual_seed(0)
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = 0.5
        elif type(module).__name__.endswith("FrozenBatchNorm2d"):
            for value, low, high in zip(module.buffers(), (0.5, -0.5, -0.5, 0.5), (1.5, 0.5, 0.5, 1.5), strict=True):
                value.uniform_(low, high)
    detects = "Detection" in type(model).__name__
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(8, 3, 64, 64) + 0.5, **({"labels": LABELS * 8} if detects else {}))
    return model.eval()


def outputs(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    with torch.no_grad():
        found = model.eval()(pixel_values=x)
    return [found[name] for name in ("logits", "pred_boxes") if name in found]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Up to rounding, measured by how far the outputs for two pictures are apart."""
    for a, b in zip(got, wanted, strict=True):
        apart = (b[0] - b[1]).abs().max().item()
        assert apart > 1e-3, "the outputs hardly depend on the input, so they prove nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * apart)


def assert_identical(got: nn.Module, wanted: nn.Module) -> None:
    for a, b in zip(outputs(got), outputs(wanted), strict=True):
        assert torch.equal(a, b)


# ---- conversion ----


@pytest.mark.parametrize("name", MODELS)
def test_exact_targets_keep_the_function(name: str) -> None:
    model = trained(MODELS[name])
    wanted = outputs(model)
    for target in EXACT:
        converted, report = normswap.convert(model, target)
        assert report.exact and report.warnings == (), target
        assert_same(outputs(converted), wanted)
    assert_same(outputs(model), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_every_batch_norm_becomes_one_of_groups(name: str) -> None:
    model = trained(MODELS[name])
    count, wanted = len(batch_norms(model)), outputs(model)
    for target in APPROXIMATE:
        converted, report = normswap.convert(model, target)
        assert report.totals.norms_changed == count > 0 and not batch_norms(converted)
        assert sum(isinstance(module, nn.GroupNorm) for module in converted.modules()) == count
        got = outputs(converted)
        assert all(a.shape == b.shape and a.isfinite().all() for a, b in zip(got, wanted, strict=True))
        assert not torch.allclose(got[0], wanted[0], rtol=1e-3, atol=1e-3), "said to be approximate"


@pytest.mark.parametrize("name", ["ResNet", "ResNet of bottlenecks", "RegNet", "MobileNetV2", "MobileViT"])
def test_fold_leaves_no_batch_norm(name: str) -> None:
    converted = normswap.convert(trained(MODELS[name]), "fold").model
    assert not batch_norms(converted)


def test_levit_keeps_norms_that_follow_a_reshape() -> None:
    """Its linear layers put out (N, L, C), its norms take (N·L, C): not folded, and the report says so of each."""
    model = trained(levit)
    converted, report = normswap.convert(model, "fold")
    left = {row.path for row in report.left if row.kind == "norm"}
    assert left == {name for name, module in converted.named_modules() if isinstance(module, _BatchNorm)}
    assert all(row.reason for row in report.left) and report.totals.norms_changed == 4
    assert len(left) + 4 == len(batch_norms(model))


def test_mobilenet_v2_with_the_padding_of_tensorflow() -> None:
    """transformers' default; it depends on the size of the picture."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, num_labels=3)
    assert config.tf_padding
    model = trained(lambda: transformers.MobileNetV2ForImageClassification(config))
    wanted = outputs(model)
    for target in ("frozen", "frozen-ws", "frozen-wn"):
        converted, report = normswap.convert(model, target)
        assert report.exact
        assert_same(outputs(converted), wanted)
    assert not batch_norms(normswap.convert(model, "gn-ws").model)


def test_a_model_of_layer_norms() -> None:
    """ConvNeXt V2 has position norms, in its stem and before each stage, and others, which are named."""
    model = transformers.ConvNextV2ForImageClassification(
        transformers.ConvNextV2Config(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_labels=3)
    ).eval()
    for target in ("frozen", "fold"):
        with pytest.raises(normswap.ModelError, match="4 ConvNextV2LayerNorm: has no running statistics"):
            normswap.convert(model, target)
    report = normswap.convert(model, "gn-ws").report
    norms = Counter(row.module for row in report.left if row.kind == "norm")
    assert norms["ConvNextV2LayerNorm"] == 4 and norms["LayerNorm"] == 1
    assert report.totals.norms_changed == 4 and report.totals.weights_changed > 0
    converted, report = normswap.convert(model, "ws")
    assert report.exact
    assert_same(outputs(converted), outputs(model))


def test_layer_norms_over_tokens_stay() -> None:
    model = trained(mobilevit)
    converted, report = normswap.convert(model, "gn-ws")
    assert {row.module for row in report.left if row.kind == "norm"} == {"LayerNorm"}
    left = [row.path for row in report.left if row.kind == "norm"]
    assert sorted(left) == sorted(n for n, m in converted.named_modules() if isinstance(m, nn.LayerNorm))


def test_what_else_transformers_reads_of_a_model_stays() -> None:
    model = trained(resnet)
    converted = normswap.convert(model, "gn-ws").model
    assert type(converted) is type(model) and converted.config.to_dict() == model.config.to_dict()
    hidden = [
        m(X, output_hidden_states=True).hidden_states for m in (normswap.convert(model, "frozen").model.eval(), model)
    ]
    torch.testing.assert_close(*hidden, rtol=0, atol=0)
    assert len(converted(X, output_hidden_states=True).hidden_states) == len(hidden[1])
    assert isinstance(converted(X, return_dict=False), tuple)


@pytest.mark.parametrize(("make", "frozen", "others"), [(detr, 12, 0), (lambda: rt_detr(frozen=True), 15, 42)])
def test_frozen_norms_of_a_class_of_their_own(make: Callable[[], nn.Module], frozen: int, others: int) -> None:
    model = trained(make)

    def count(of: nn.Module) -> int:
        return sum(type(m).__name__.endswith("DetrFrozenBatchNorm2d") for m in of.modules())

    assert (count(model), len(batch_norms(model))) == (frozen, others)
    wanted = outputs(model)
    for target in ("est", "bn"):
        converted, report = normswap.convert(model, target)
        assert report.exact and count(converted) == 0
        assert_same(outputs(converted), wanted)
    for target in APPROXIMATE:
        converted, report = normswap.convert(model, target)
        assert report.totals.norms_changed == frozen + others and count(converted) == 0 and not batch_norms(converted)
        loss = converted.train()(pixel_values=X[:1], labels=LABELS).loss
        loss.backward()
        convs = [m.weight.grad for m in converted.modules() if isinstance(m, nn.Conv2d) and m.weight.grad is not None]
        assert loss.isfinite() and convs and all(grad.isfinite().all() for grad in convs)
    assert_same(outputs(model), wanted)


def test_norms_that_are_frozen_already_stay() -> None:
    with pytest.raises(normswap.ModelError, match="12 DetrFrozenBatchNorm2d: has fixed statistics already"):
        normswap.convert(detr(), "frozen")


# ---- to disk and back ----


def factory() -> nn.Module:
    return resnet()


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("target", [*APPROXIMATE, "frozen", "fold"])
def test_a_folder_of_save_pretrained_is_converted(tmp_path: Path, target: str) -> None:
    model = trained(factory)
    model.save_pretrained(tmp_path / "plain")
    report = normswap.convert_file(tmp_path / "plain", target, model=factory)
    out = tmp_path / f"plain.{target}"
    assert report.totals.norms_changed == 8
    assert (out / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    assert header(out / "model.safetensors").keys() == {"format", "normswap_recipe"}
    wanted = normswap.convert(model, target).model
    for place in (out, out / "model.safetensors"):
        assert_identical(normswap.load(place, model=factory), wanted)


def test_a_folder_in_shards_is_converted(tmp_path: Path) -> None:
    model = trained(factory)
    model.save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 1
    normswap.convert_file(tmp_path / "plain", "gn-ws", model=factory)
    wanted = normswap.convert(model, "gn-ws").model
    assert_identical(normswap.load(tmp_path / "plain.gn-ws", model=factory), wanted)
    assert_identical(Converted.from_pretrained(tmp_path / "plain.gn-ws"), wanted)


@pytest.mark.parametrize("target", [*APPROXIMATE, "frozen", "fold"])
def test_a_converted_model_is_saved_and_loaded_by_hand(tmp_path: Path, target: str) -> None:
    """`save_pretrained` writes no recipe, so the model is made as before: convert, then load, strictly."""
    model = trained(factory)
    wanted = normswap.convert(model, target).model
    wanted.save_pretrained(tmp_path)
    assert header(tmp_path / "model.safetensors") == {"format": "pt"}
    again = transformers.ResNetForImageClassification(transformers.ResNetConfig.from_pretrained(tmp_path))
    converted = normswap.convert(again, target).model
    converted.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert_identical(converted, wanted)


@pytest.mark.parametrize("target", [*APPROXIMATE, "frozen", "fold"])
def test_the_recipe_beside_the_weights(tmp_path: Path, target: str) -> None:
    """`normswap.save` into the folder that `save_pretrained` made: then `normswap.load` needs no target."""
    wanted, report = normswap.convert(trained(factory), target)
    wanted.save_pretrained(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    normswap.save(wanted, tmp_path / "model.safetensors", report=report, overwrite=True)
    assert "normswap_recipe" in header(tmp_path / "model.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), plain, rtol=0, atol=0)
    assert_identical(normswap.load(tmp_path, model=factory), wanted)
    assert_identical(normswap.load(tmp_path / "model.safetensors", model=factory), wanted)


class Converted(transformers.ResNetForImageClassification):  # type: ignore[misc, name-defined]
    """The architecture after conversion as a class of its own: what makes `from_pretrained` work."""

    def __init__(self, config: Any):
        super().__init__(config)
        normswap.convert(self, "gn-ws", inplace=True)


def test_from_pretrained_of_a_class_that_converts_itself(tmp_path: Path) -> None:
    model = trained(factory)
    wanted = normswap.convert(model, "gn-ws").model
    wanted.save_pretrained(tmp_path / "converted")
    got, told = Converted.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert_identical(got, wanted)
    got.save_pretrained(tmp_path / "again")
    assert_identical(Converted.from_pretrained(tmp_path / "again"), wanted)
    plain, told = type(model).from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert any(key.endswith("weight_gain") for key in told["unexpected_keys"])
    with pytest.raises(AssertionError):
        assert_identical(plain, wanted)  # what the plain class makes of these files


def test_a_detection_model_there_and_back(tmp_path: Path) -> None:
    """transformers 5 writes RT-DETR's weights under their published names, and only `from_pretrained` knows these."""
    model = trained(rt_detr)
    model.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain")
    assert_identical(again, model)
    wanted, report = normswap.convert(model, "gn-ws")
    assert_identical(normswap.convert(again, "gn-ws").model, wanted)
    normswap.save(wanted, tmp_path / "model.safetensors", report=report)
    assert_identical(normswap.load(tmp_path / "model.safetensors", model=rt_detr), wanted)


# ---- training ----


@pytest.mark.parametrize("target", [*APPROXIMATE, "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_one_step_at_batch_1(name: str, target: str) -> None:
    model = normswap.convert(trained(MODELS[name]), target).model.train()
    if name == "LeViT":  # its two heads are averaged; it takes no labels
        loss = nn.functional.cross_entropy(model(X[:1]).logits.requires_grad_(), torch.tensor([1]))
    else:
        loss = model(pixel_values=X[:1], labels=LABELS if name == "RT-DETR" else torch.tensor([1])).loss
    loss.backward()
    assert loss.isfinite()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = {n: p.grad for n, p in trainable.items() if p.grad is not None}
    assert len(grads) > 0.9 * len(trainable) and all(grad.isfinite().all() for grad in grads.values())
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm) or type(m).__name__ == "FrozenBatchNorm"]
    assert norms and any(m.weight.grad is not None and m.weight.grad.any() for m in norms)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert all(p.isfinite().all() for p in model.parameters())
