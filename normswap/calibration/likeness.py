"""Whether calibration data are such as a network has learnt its statistics from.

Before each norm by running statistics, data have a mean and a variance a channel, and so had the network's own. The
Kullback-Leibler divergence of two normals with these (Kullback & Leibler 1951), averaged over the channels, tells how
unlike they are; √(2·KL) is its unit: a shift of all channels by so many of their standard deviations has the same. The
median over the norms counts, since one layer with odd statistics (a dead stage, a large mean) says nothing of the data.

Measured on ResNet-20 for CIFAR-10 | its top-1 (.805 after matching) once it was fitted, in 60 steps, to 128 of them:
- its own test pictures .1 to .2; of one class alone .28 | .781; ImageNet's, made as small, .22 | .782; grey .21 | .79;
- half as bright .36 | .764; noise of .1 added .53 | .671; normalized by other numbers .55 | .668; discs .47 | .460; not
  normalized .89 | .358; Gaussian noise .88, uniform noise 1.0, one colour each 1.0, bytes 42, of which a fit before had
  taken the net from .668 to .432.
EfficientNet-Lite0: its own .2, not normalized .3, normalized by other numbers .34, CIFAR's enlarged .7, noise 1.2.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.analysis.sites import Site
from normswap.analysis.statistics import is_untrained
from normswap.calibration.measuring import Measured, running_statistics
from normswap.layers.matching import Moments, Statistics

FURTHEST = 0.33
"""The largest unlikeness, in standard deviations, of data that a network is fitted to."""


class Unlikeness(NamedTuple):
    """How far data are from what norms have learnt, in standard deviations of a channel."""

    median: float
    """Over the norms."""
    worst: float
    worst_path: str
    """The norm where it is largest."""
    is_telling: bool = True
    """Whether there are enough samples to call data alike: what chance may make of fewer is more than `FURTHEST`."""

    @property
    def is_refused(self) -> bool:
        return self.median > FURTHEST

    def __str__(self) -> str:
        return (
            f"{self.median:.2g} standard deviations from what the norms have learnt "
            f"({self.worst_path or 'the model'}: {self.worst:.2g}; at most {FURTHEST:g} is usual)"
        )


def unlikeness(sites: Iterable[Site], measured: Mapping[str, Measured], samples: int) -> Unlikeness | None:
    """How unlike `samples` samples are to what the norms by running statistics at `sites` have learnt.

    None where there are no such norms. What few samples differ by chance does not count: about one over their number.
    """
    found: dict[str, float] = {}
    for site in sites:
        if site.path in measured and site.form == "data" and not is_untrained(site.module):
            divergence = mean_divergence(measured[site.path].moments, running_statistics(site.module))
            found[site.path] = math.sqrt(2 * max(0.0, divergence - 1 / samples))
    if not found:
        return None
    worst = max(found, key=lambda path: found[path])
    median = torch.tensor(list(found.values())).median().item()
    return Unlikeness(median, found[worst], worst, 2 / samples <= FURTHEST**2)


def mean_divergence(moments: Moments, stats: Statistics) -> float:
    """The mean over channels of the divergence of normals with the moments of data from those with the running ones."""
    ratio = (moments.var + stats.eps) / (stats.var + stats.eps)
    shift: Tensor = (moments.mean - stats.mean).square() / (stats.var + stats.eps)
    divergence: Any = 0.5 * (ratio + shift - 1 - ratio.log())
    return float(divergence.mean())
