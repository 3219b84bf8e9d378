"""The layout says where each line runs: what a room may import is a contract."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import flexmoe_jax

PACKAGE = Path(flexmoe_jax.__file__).parent

# Words that all share, and files read with limits.
COMMON = {"errors", "types", "reading", "npz"}
MAY_IMPORT = {
    "errors": set(),
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
    | {"assignment", "client", "data", "edge", "federation", "models", "server", "tasks"},
    "metrics": COMMON,
    "checkpoint": COMMON,
}


def imports(file: Path) -> set[str]:
    """The rooms of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{file}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("flexmoe_jax.")}
    return found


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


def test_the_contract_has_teeth(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("def f():\n    from flexmoe_jax.server import close\n")
    assert imports(tmp_path / "x.py") == {"server"}
    (tmp_path / "x.py").write_text(
        "from flexmoe_jax import client, data\nimport flexmoe_jax.edge\n"
    )
    assert imports(tmp_path / "x.py") == {"client", "data", "edge"}
