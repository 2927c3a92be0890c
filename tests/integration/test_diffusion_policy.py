"""Checkpoints as diffusion_policy's workspaces write them: the policy, its average and the optimizer one level down.

The package has no release to install; a policy of its parts is rebuilt here: torchvision's ResNet as encoder of each
camera, a one-dimensional U-Net's blocks, `EMAModel` on a deep copy, AdamW, and `save_checkpoint`'s payload.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.nets import randomize
from torch import Tensor, nn
from torchvision.models import resnet18

import normswap
from normswap import FileError

CAMERAS = torch.randn(4, 2, 3, 32, 32)
ACTIONS = torch.randn(4, 6, 8)


class Normalizer(nn.Module):
    """As `LinearNormalizer`, which is empty when it is made, and holds whatever is loaded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.params_dict = nn.ParameterDict()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        found = nn.ParameterDict()
        for key, value in state_dict.items():
            if key.startswith(f"{prefix}params_dict."):
                _, field, name = key.removeprefix(prefix).split(".")
                found.setdefault(field, nn.ParameterDict())[name] = value.clone()
        self.params_dict = found.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        action = self.params_dict["action"]
        return x * action["scale"][:, None] + action["offset"][:, None]


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normalizer = Normalizer()
        encoder = resnet18()
        encoder.fc = nn.Identity()
        self.obs_encoder = nn.ModuleDict({"front": encoder, "wrist": encoder})
        self.model = nn.Sequential(nn.Conv1d(6, 16, 5, padding=2), nn.BatchNorm1d(16), nn.Mish(), nn.Conv1d(16, 6, 1))
        self.condition = nn.Linear(1024, 6)

    def forward(self, cameras: Tensor, actions: Tensor) -> Tensor:
        seen = torch.cat([encoder(cameras[:, i]) for i, encoder in enumerate(self.obs_encoder.values())], 1)
        return self.model(self.normalizer(actions) + self.condition(seen)[..., None])


def make_optimizer(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)


def trained(steps: int = 2) -> tuple[Policy, Policy, torch.optim.Optimizer]:
    torch.manual_seed(0)
    policy = randomize(Policy()).train()
    fitted = {"scale": torch.rand(6) + 0.5, "offset": torch.randn(6), "mean": torch.randn(6), "std": torch.rand(6)}
    policy.normalizer.load_state_dict({f"params_dict.action.{name}": value for name, value in fitted.items()})
    average, optimizer = copy.deepcopy(policy), make_optimizer(policy)
    for _ in range(steps):
        optimizer.zero_grad()
        policy(CAMERAS, ACTIONS).pow(2).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), policy.parameters(), strict=True):
                old.lerp_(new, 0.5)
    return policy, average, optimizer


def payload(policy: Policy, average: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    states = {"model": policy.state_dict(), "ema_model": average.state_dict(), "optimizer": optimizer.state_dict()}
    return {"cfg": {"policy": {"horizon": 8}}, "state_dicts": states, "pickles": {"global_step": b"\x80\x04K\x02."}}


@pytest.mark.parametrize("key", [None, "state_dicts.model"])
@pytest.mark.parametrize("to", ["gn", "frozen"])
def test_a_workspace_resumes_converted(tmp_path: Path, to: str, key: str | None) -> None:
    policy, average, optimizer = trained()
    before = payload(policy, average, optimizer)
    torch.save(before, tmp_path / "latest.ckpt")
    report = normswap.convert_file(tmp_path / "latest.ckpt", to, model=Policy, key=key)
    got = torch.load(tmp_path / f"latest.{to}.ckpt")
    assert {name: got[name] for name in ("cfg", "pickles")} == {name: before[name] for name in ("cfg", "pickles")}
    for name, source in (("model", policy), ("ema_model", average)):
        wanted = normswap.convert(source, to).model.eval()
        resumed = normswap.convert(Policy(), to).model.eval()
        resumed.load_state_dict(got["state_dicts"][name])
        loaded = normswap.load(tmp_path / f"latest.{to}.ckpt", model=Policy, key=f"state_dicts.{name}").eval()
        with torch.no_grad():
            output = wanted(CAMERAS, ACTIONS)
            assert torch.equal(resumed(CAMERAS, ACTIONS), output) and torch.equal(loaded(CAMERAS, ACTIONS), output)
    new = make_optimizer(resumed)
    new.load_state_dict(got["state_dicts"]["optimizer"])
    old = {name: optimizer.state[p]["exp_avg"] for name, p in policy.named_parameters() if p.requires_grad}
    assert all(torch.equal(new.state[p]["exp_avg"], old[n]) for n, p in resumed.named_parameters() if p.requires_grad)
    alone = normswap.convert_file(tmp_path / "latest.ckpt", to, tmp_path / "alone.ckpt", key=key)
    states = torch.load(tmp_path / "alone.ckpt")["state_dicts"]
    assert all(torch.equal(states["model"][name], v) for name, v in got["state_dicts"]["model"].items())
    assert len(states["optimizer"]["state"]) == len(old) and not any("dropped" in line for line in alone.warnings)
    assert [c.paths for c in report.changes if c.kind == "copy"] == [("state_dicts.ema_model",)]


def test_a_wrong_key_is_told_the_right_one(tmp_path: Path) -> None:
    torch.save(payload(*trained(1)), tmp_path / "latest.ckpt")
    with pytest.raises(normswap.OptionError, match=r"models stand under state_dicts\.model, state_dicts\.ema_model"):
        normswap.convert_file(tmp_path / "latest.ckpt", "gn", model=Policy, key="ema_model")
    with pytest.raises(FileError, match=r"missing: "):
        normswap.convert_file(tmp_path / "latest.ckpt", "gn", model=resnet18)
