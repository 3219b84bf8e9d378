"""The public API: names that others depend on change only on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import flexmoe_jax

SNAPSHOT = Path(__file__).with_name("public.json")
ROOMS = sorted(name for name in flexmoe_jax.__all__ if name.islower() and name[0] != "_")


def face(room: str) -> list[str]:
    return sorted(import_module(room).__all__)


def test_the_public_names_are_those_of_the_list():
    """For a change on purpose: python -m tests.test_public, and a line in CHANGELOG.md."""
    found = {name: face(name) for name in ("flexmoe_jax", *(f"flexmoe_jax.{r}" for r in ROOMS))}
    assert found == json.loads(SNAPSHOT.read_text())


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_there_and_says_what_it_is(room):
    module = getattr(flexmoe_jax, room)
    for name in module.__all__:
        there = getattr(module, name)
        if callable(there) and getattr(there, "__module__", "").startswith("flexmoe_jax"):
            assert (there.__doc__ or "").strip(), f"{room}.{name} has no docstring"


def test_the_package_loads_its_rooms_when_they_are_asked_for():
    code = (
        "import sys, flexmoe_jax\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "flexmoe_jax.assignment.solve\n"
        "assert not {'jax', 'cvxpy', 'scipy', 'highspy'} & set(sys.modules)\n"
        "assert flexmoe_jax.Federation.__name__ == 'Federation'\n"
        "assert set(flexmoe_jax.__all__) <= set(dir(flexmoe_jax))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = flexmoe_jax.nothing


if __name__ == "__main__":
    known = {name: face(name) for name in ("flexmoe_jax", *(f"flexmoe_jax.{r}" for r in ROOMS))}
    SNAPSHOT.write_text(json.dumps(known, indent=1) + "\n")
