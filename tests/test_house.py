"""The house: imports point downwards only."""

import ast
from pathlib import Path

import normswap
from normswap import target_table
from normswap.targets import target

FLOORS = [
    {"errors", "copies", "report", "transfer", "layers", "weights", "optimizer", "patterns", "inspection", "forms"},
    {
        "trace",
        "reach",
        "disk",
        "entries",
        "pickles",
        "sources",
        "pictures",
        "wording",
        "charts",
        "advice",
        "bare",
        "recurrent",
        "private",
        "ranks",
    },
    {"sites", "recurrent_transfer", "tensorfiles", "distributed", "render", "page", "markdown"},
    {"graph", "views", "render_inspection", "sample_files", "training"},
    {"probe", "checkpoint", "samples", "model_inputs", "findings"},
    {"calibrate", "forwards"},
    {"distill"},
    {"plan"},
    {"norm_forms", "weight_forms", "swap", "diff"},
    {"plain_forms"},
    {"targets"},
    {"selection", "account"},
    {"decide"},
    {"convert", "inspect"},
    {"recipe"},
    {"fitting"},
    {"entry_conversion"},
    {"files", "options"},
    {"cli"},
    {"__init__", "__main__"},
]
SOURCES = {path.stem: path for path in Path(normswap.__file__).parent.glob("*.py")}


def imported(source: Path) -> set[str]:
    """The files of normswap that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "normswap":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("normswap."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("normswap.")}
    return found


def test_every_file_has_a_floor() -> None:
    assert set().union(*FLOORS) == set(SOURCES)


def test_imports_point_downwards() -> None:
    below: set[str] = set()
    for floor in FLOORS:
        for name in floor:
            assert imported(SOURCES[name]) <= below, f"{name} imports from its own floor or from above"
        below |= floor


def test_every_row_has_its_function_and_every_target_its_name() -> None:
    rows = [
        *target_table.NORMS.values(),
        *target_table.WEIGHTS.values(),
        *target_table.RECURRENT.values(),
        target_table.PLAIN_NORM,
        target_table.PLAIN_WEIGHT,
    ]
    for row in rows:
        assert callable(target._FUNCTIONS[row.function])
    assert list(target_table.TARGET_FORMS) == list(normswap.TARGETS)
