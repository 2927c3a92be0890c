"""What a target's function reads, the context, and what it gives back, the swap."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor, nn

from normswap.analysis.flow import Flow
from normswap.analysis.running import Seen
from normswap.analysis.sites import Site
from normswap.calibration.measuring import Measured
from normswap.layers.matching import Affine
from normswap.layers.recurrent_matching import VectorMoments
from normswap.targets.options import Options


class Place(Enum):
    """Where a layer stands that takes in a norm."""

    BEFORE = "before"
    """It feeds the norm: its filters and its bias are multiplied by `scale`, and `shift` is added to the bias."""
    BEHIND = "behind"
    """The norm feeds it: its filters' inputs are multiplied, and what they give on `shift` is added to the bias."""
    BESIDE = "beside"
    """Both read the same, and their outputs are added: `scale` is added to what a filter sees of its own channel in its
    middle, and `shift` to the bias."""


@dataclass(frozen=True)
class Merger:
    """A convolution that goes into one beside it, as both read the same and their outputs are added."""

    site: Site
    """The convolution that takes in the other."""
    branch: Site
    """The other, which leaves a shortcut: the first `channels` of its input, at its stride, and zeros for the rest."""
    channels: int
    bias: nn.Parameter | None
    """A new bias for `site`, where it has none and the other adds one."""


@dataclass(frozen=True)
class Absorption:
    """A norm, or those of its channels that one layer gives, that goes into a layer."""

    site: Site
    """The layer."""
    affine: Affine
    bias: nn.Parameter | None
    """A new bias, where the layer has none."""
    place: Place = Place.BEFORE
    needs: tuple[str, ...] = ()
    """Norms that have to go into the same layer, too."""


@dataclass(frozen=True)
class Swap:
    """A replacement that is built but not yet in the model."""

    site: Site
    module: nn.Module
    """The new layer; the old one itself where only its values change."""
    after: str
    """The new layer as the report writes it."""
    how: str
    """What becomes of the learnt values, for the report."""
    exact: bool
    """Whether the function in eval mode stays the same, up to rounding."""
    note: str = ""
    """What differs from what was asked, for the report."""
    groups: int | None = None
    eps: float | None = None
    """The new layer's, where it is another than the old one's."""
    writes: tuple[tuple[Tensor, Tensor | Callable[[], Tensor]], ...] = ()
    """Tensors of the model that take new values in place, so that optimizers and other holders of a parameter keep it.
    A large value is a function, which is called when its turn comes."""
    absorptions: tuple[Absorption, ...] = ()
    """Of a norm: the layers that it goes into."""
    merger: Merger | None = None
    """Of a convolution: the one that it goes into."""
    first: bool = False
    """Whether it comes before any norm is folded: the layer is one that a norm can go into only then."""
    tied_lengths: Mapping[int, nn.Parameter] = field(default_factory=dict)
    """The lengths of filters that several layers share, by the id of the weight."""


@dataclass(frozen=True)
class Context:
    """What the functions of targets read: the options, the dataflow, and what is known of the model's tensors."""

    options: Options
    flow: Flow
    sites: Mapping[str, Site]
    """Every site, by its first path."""
    shared: frozenset[int] = frozenset()
    """The ids of parameters that stand in more than one module."""
    excluded: frozenset[Site] = frozenset()
    """Sites that the user excluded: nothing is folded into them either."""
    seen: Mapping[str, Seen] = field(default_factory=dict)
    """The sizes that norms saw in example inputs or data, by path."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    """What calibration data showed of norms, by path."""
    vectors: Mapping[str, Mapping[str, VectorMoments]] = field(default_factory=dict)
    """What calibration data showed of recurrent layers, by path and vector."""
    recorded_groups: Mapping[str, int] = field(default_factory=dict)
    """The groups of norms that the recipe of a converted file tells, by path."""
    recorded_eps: Mapping[str, float] = field(default_factory=dict)
    """The eps of norms, where the recipe tells of another than they had, by path."""
    recorded_changes: Mapping[str, str] = field(default_factory=dict)
    """The layers that the recipe of a converted file tells to have changed, by path, and what they became."""
    told_apart: frozenset[Site] = frozenset()
    """Layers that a forward was seen to go another way for, were they what they would become."""
    measured_exact: bool = False
    """Whether a run on the user's inputs shows afterwards whether what should be exact is."""
    release: Callable[[Tensor], None] = lambda tensor: None
    """Told of each large weight that has been read: its memory may be given back."""
    rescaling: Mapping[str, Tensor] = field(default_factory=dict)
    """By the path of a norm: how strict standardization multiplies the filters of the convolution before it."""
    folded: Mapping[str, Sequence[Absorption]] = field(default_factory=dict)
    """By the path of a weight layer: the norms that are folded into it."""
    merged: Mapping[str, Sequence[Merger]] = field(default_factory=dict)
    """By the path of a convolution: those that it takes in."""
    tied_lengths: Mapping[int, nn.Parameter] = field(default_factory=dict)
    """The lengths of filters that layers planned before share with others, by the id of the weight."""


def join_notes(*notes: str) -> str:
    """Several notes of a report as one; empty ones are left out."""
    return "; ".join(note for note in notes if note)
