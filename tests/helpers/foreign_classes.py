"""Classes as people have them in files of their own, and such as would run code while a file is read."""

import dataclasses
import enum
import subprocess  # noqa: F401  # a file may ask for what a module has imported
import types
import typing
from argparse import ArgumentParser  # noqa: F401
from typing import Any

from torch import Tensor, nn

RAN: list[Any] = []
"""What code of the classes below was called with."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Act(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


# ---- plain data ----


@dataclasses.dataclass
class Config:
    lr: float = 0.1


@dataclasses.dataclass(frozen=True)
class Frozen:
    steps: int = 3


class Options(types.SimpleNamespace):
    def __iter__(self) -> Any:
        return iter(vars(self).items())


class Bag(dict[str, int]):
    pass


class Kind(enum.Enum):
    ONE = 1


class Number(enum.IntEnum):
    ONE = 1


class Pair(typing.NamedTuple):
    a: int = 1
    b: int = 2


PLAIN = {"Config": Config(0.2), "Frozen": Frozen(4), "Options": Options(lr=1), "Bag": Bag(a=1), "Kind": Kind.ONE}
PLAIN |= {"Number": Number.ONE, "Pair": Pair(3, 4)}


# ---- such as run code ----


class Builds:
    def __init__(self, *given: Any) -> None:
        RAN.append(given)


class Restores:
    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}

    def __setstate__(self, state: Any) -> None:
        RAN.append(state)


class Child(Restores):
    pass


@dataclasses.dataclass
class After:
    lr: float = 0.1

    def __post_init__(self) -> None:
        RAN.append(self)


class Setter:
    @property
    def x(self) -> int:
        return 1

    @x.setter
    def x(self, value: int) -> None:
        RAN.append(value)


class Reduced:
    def __reduce__(self) -> Any:
        return run, ()


def run() -> None:
    RAN.append("run")


WITH_CODE = {"Builds": Builds(), "Restores": Restores(), "Child": Child(), "After": After(), "Setter": Setter()}
WITH_CODE |= {"run": Reduced()}
