"""What a converted model is made of: the layer classes, and the mathematics of moving learnt values into them.

Saved files name these classes as `normswap.layers.NAME`, whichever file here defines them, so that the files outlive
moves.
"""

from normswap.layers.norms import ACTIVATED, BatchChannelNorm, EstimatedBatchNorm, FrozenBatchNorm, PositionNorm
from normswap.layers.recurrent import LAYER_NORMALIZED
from normswap.layers.reparametrized import NORMALIZED, STANDARDIZED

_TABLES = (ACTIVATED, STANDARDIZED, NORMALIZED, LAYER_NORMALIZED)
_NORMS = (FrozenBatchNorm, EstimatedBatchNorm, BatchChannelNorm, PositionNorm)
_CLASSES = (*_NORMS, *(made for of in _TABLES for made in of.values()))
for _class in _CLASSES:
    _class.__module__ = __name__
    globals()[_class.__name__] = _class

__all__ = sorted(_class.__name__ for _class in _CLASSES)
