"""Every example runs, and shows what it says it shows."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "shared")


def learnt_by_fellows(said: str) -> bool:
    """Factories with machines of one make hold the same expert."""
    experts = re.findall(r"expert \((\d),\): wears", said)
    return experts[::2] == experts[1::2] and len(set(experts)) == 4


SHOWS = {
    "assignment_in_a_loop": lambda said: "expert 0: clients [0, 4, 8]" in said,
    "experts_on_servers": lambda said: "optimised: 76%" in said and "3 to 4 copies" in said,
    "export_and_serve": lambda said: "5 pictures: [" in said,
    "newcomer": lambda said: int(re.findall(r"untrained: (\d+)%", said)[0]) > 50,
    "own_task": learnt_by_fellows,
    "own_choices": lambda said: int(re.findall(r"right on (\d+)% of all", said)[0]) > 40,
    "own_test_sets": lambda said: min(map(int, re.findall(r": (\d+)% of its own", said))) > 40,
    "nnx_model": lambda said: int(re.findall(r"right on (\d+)%", said)[0]) > 60,
    "equinox_model": lambda said: int(re.findall(r"right on (\d+)%", said)[0]) > 60,
}


def test_every_example_is_looked_at():
    assert sorted(SHOWS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_example(name, capsys):
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    assert len(lines) < 60
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert SHOWS[name](capsys.readouterr().out)


def test_the_notebook():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    cells = json.loads((FOLDER / "who_holds_what.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    known: dict = {}
    exec(compile("\n".join(code), "who_holds_what.ipynb", "exec"), known)
    assert known["found"].status == "optimal"
    assert known["greedy"].load.max() > 4
    assert known["fair"].load.max() == 4
    assert len(pyplot.get_fignums()) == 2
    pyplot.close("all")
