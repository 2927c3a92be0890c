"""What a whole module in a file would need a reader to allow: classes of the user's own."""

import io
import pickle
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.checkpoints.allowed_classes import Allowance, class_behind, find_row
from normswap.checkpoints.unpickler import names_in

_NOTHING_MORE = Allowance({})


def own_classes(model: nn.Module) -> list[str]:
    """The full names, sorted, of what a pickle of `model` names and `normswap.load` refuses without being told.

    Of a model that cannot be pickled, the classes of its modules alone.
    """
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in map(type, model.modules())}
    stream = io.BytesIO()
    try:
        _WithoutTensors(stream, protocol=2).dump(model)
        names.update(names_in(stream.getvalue()))
    except Exception:  # the objects of a model are anybody's; writing it whole says what is wrong
        pass
    return sorted({class_behind(name) for name in names if find_row(name, _NOTHING_MORE, Path()) is None})


class _WithoutTensors(pickle.Pickler):
    """Leaves out torch's own tensors, which take long to write and are always allowed."""

    def persistent_id(self, obj: Any) -> str | None:
        return "tensor" if type(obj) in (Tensor, nn.Parameter, nn.Buffer) else None
