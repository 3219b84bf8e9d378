"""The layout says where each line runs: the packages that a room may import are a contract."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import flexmoe_jax

PACKAGE, PREFIX = Path(flexmoe_jax.__file__).parent, "flexmoe_jax."

# Words that all share, options, and files read with limits.
COMMON = {"errors", "options", "types", "reading", "npz"}
MAY_IMPORT = {
    "errors": set(),
    "options": {"errors"},
    "types": {"errors"},
    "reading": {"errors"},
    "npz": {"errors", "reading"},
    "tasks": COMMON,
    "assignment": COMMON,
    "data": COMMON,
    "models": COMMON,
    "edge": COMMON,
    "client": COMMON | {"tasks"},
    "server": COMMON | {"assignment"},
    "federation": COMMON | {"assignment", "client", "models", "server", "tasks"},
    "simulation": COMMON
    | {"assignment", "client", "compiling", "data", "edge", "federation", "models"}
    | {"server", "tasks"},
    "metrics": COMMON,
    "plot": COMMON,
    "checkpoint": COMMON,
    "compiling": set(),
    "deploy": COMMON | {"client", "compiling", "data", "federation", "server", "tasks"},
}


def modules(file: Path) -> set[str]:
    """What a file imports of the package, wherever in it: `client`, `client.codec`, ..."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{file}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)}
    return found


def imports(file: Path) -> set[str]:
    """The rooms of the package that a file imports."""
    return {name.partition(".")[0] for name in modules(file)}


def rooms() -> dict[str, list[Path]]:
    """Files by room: a folder of the package, or a file of its own."""
    files: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        files.setdefault(room, []).append(file)
    files.pop("__init__")
    return files


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_what_it_may(room: str) -> None:
    assert room in MAY_IMPORT, f"say what the new room {room} may import"
    known = rooms().keys()
    for file in rooms()[room]:
        beyond = (imports(file) & known) - MAY_IMPORT[room] - {room}
        assert not beyond, f"{file.relative_to(PACKAGE)} imports {sorted(beyond)}"


@pytest.mark.parametrize("room", sorted(rooms().keys() - {"options"}))
def test_a_room_takes_its_own_options_and_those_of_rooms_that_it_imports(room: str) -> None:
    for file in rooms()[room]:
        taken = {name.split(".")[1] for name in modules(file) if name.startswith("options.")}
        # Those of no room are for all.
        beyond = (taken & rooms().keys()) - MAY_IMPORT[room] - {room}
        assert not beyond, f"{file.relative_to(PACKAGE)} takes options of {sorted(beyond)}"
        names = {path.stem for path in rooms()["options"]}
        assert taken <= names, f"{file.relative_to(PACKAGE)}: import options from their own file"


def test_the_contract_has_teeth(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("def f():\n    from flexmoe_jax.server import close\n")
    assert imports(tmp_path / "x.py") == {"server"}
    (tmp_path / "x.py").write_text(
        "from flexmoe_jax import client, data\nimport flexmoe_jax.edge\n"
    )
    assert imports(tmp_path / "x.py") == {"client", "data", "edge"}


MOST_LINES = 60


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring among them."""
    return (function.end_lineno or 0) - function.lineno + 1


def test_a_function_fits_a_screen() -> None:
    root = PACKAGE.parent
    longer = {
        f"{file.relative_to(root)}:{node.name}"
        for folder in (PACKAGE, root / "experiments", root / "examples")
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > MOST_LINES
    }
    assert not longer
