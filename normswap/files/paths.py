"""Where a converted model goes, and in which format."""

import os
from pathlib import Path

from normswap.checkpoints.checkpoint import INDEX_ENDING
from normswap.files import model_specs


def default_output(path: str | os.PathLike[str], suffix: str, format: str | None = None) -> Path:
    """`model.gn-ws.pt` beside `model.pt`; for a folder, or an index in one, `folder.gn-ws` beside that.

    For a model of a library, `resnet50.gn-ws.pt` in the folder where the command runs. The ending is that of `format`,
    or the input's.
    """
    endings = {"pt": ".pt", "safetensors": ".safetensors"}
    path = Path(f"{model_specs.short_name(str(path))}.pt" if model_specs.is_spec(str(path)) else path)
    if path.name.endswith(INDEX_ENDING) or path.is_dir():
        folder = path.parent if path.name.endswith(INDEX_ENDING) else path
        if folder.name in ("", ".", ".."):
            folder = folder.resolve()
        return folder.with_name(f"{folder.name}.{suffix}{endings.get(format or '', '')}")
    own = path.suffix or ".pt"
    as_pt = ".pt" if own == ".safetensors" else own  # `.bin` and `.pth` are files of torch.save too, and stay
    endings |= {"pt": as_pt, "dcp": ""}
    return path.with_name(f"{path.stem}.{suffix}{endings.get(format or '', own)}")


def format_by_ending(out: Path) -> str | None:
    """The format that the name of the output tells; None where that of the input stays."""
    return "safetensors" if out.suffix == ".safetensors" else None
