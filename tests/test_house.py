"""The house: a package imports only from lines below its own, and no circle runs inside one."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import normswap
from normswap import target_table
from normswap.targets import target

ROOT = Path(normswap.__file__).parent
LINES = """
__init__ __main__ weights recurrent
cli
files
inspection
conversion
targets
calibration training
analysis
checkpoints report layers libraries demo
errors target_table
printable signals
"""
"""From the top down. `weights` and `recurrent` are the old places of layer classes that saved files name."""
FLOORS = {room: floor for floor, line in enumerate(reversed(LINES.split("\n"))) for room in line.split()}


def imported(source: Path) -> set[str]:
    """The modules of normswap that a file imports, at its top or within a function: `layers.norms`, `errors`."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "normswap":
            inner = (node.module or "").removeprefix("normswap").lstrip(".")
            named = [f"{inner}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {name if (ROOT / f"{name.replace('.', '/')}.py").exists() else inner for name in named}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("normswap.") for a in node.names if a.name.startswith("normswap.")}
    return found - {""}


SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): imported(path) for path in ROOT.rglob("*.py")}


def test_imports_point_downwards() -> None:
    for source, names in SOURCES.items():
        room = source.split(".")[0]
        above = {name for name in names if name.split(".")[0] != room and FLOORS[name.split(".")[0]] >= FLOORS[room]}
        assert not above, f"{source} imports from its own line or from above: {above}"


def test_no_circle() -> None:
    TopologicalSorter(SOURCES).prepare()  # raises CycleError, which names the circle


def test_every_row_has_its_function_and_every_target_its_name() -> None:
    assert set(target.NORM_FUNCTIONS) == {*target_table.NORM_FORMS, target_table.PLAIN_FORM.name}
    assert set(target.WEIGHT_FUNCTIONS) == {*target_table.WEIGHT_FORMS, target_table.PLAIN_FORM.name}
    assert set(target.RECURRENT_FUNCTIONS) == set(target_table.RECURRENT_FORMS)
    assert list(target_table.TARGET_FORMS) == list(normswap.TARGETS)


def test_no_test_imports_another() -> None:
    """What tests share lies in tests/helpers."""
    tests = {path.stem: path.read_text() for path in Path(__file__).parent.rglob("test_*.py")}
    for name, text in tests.items():
        others = set(re.findall(r"^\s*(?:from|import)\s+[\w.]*?(test_\w+)", text, re.MULTILINE))
        assert not others & tests.keys(), f"{name} imports {others}"


def test_functions_are_on_one_screen() -> None:
    public = {*normswap.__all__, "convert_file", "inspect_file"}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                where = f"{path.name}: {node.name}"
                documented = len((ast.get_docstring(node, clean=False) or "").splitlines())
                assert (node.end_lineno or 0) - node.lineno - documented < 60, f"{where} has more than 60 lines"
                many = len(arguments) > 8 and path.parent.name != "cli" and node.name not in public
                assert not many, f"{where} has more than 8 parameters"
