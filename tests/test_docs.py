"""Code in the documentation runs: the blocks of a page are one script."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

FOLDER = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
SHOWS = {
    "assignment": lambda said: "optimal: 12 clients x 8 experts" in said,
    "data": lambda said: True,
    "devices": lambda said: "{'clients': 8, 'experts': 1}" in said,
    "federation": lambda said: min(map(int, re.findall(r": (\d+)% of the test", said))) > 80,
    "sweeps": lambda said: True,
    "tutorial": lambda said: (
        int(re.findall(r"own digits: (\d+)%", said)[0]) > 85
        and "holders of each expert, flex:   [2, " in said.replace("[3, ", "[2, ")
    ),
}


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def test_every_page_with_code_is_looked_at():
    assert sorted(page.stem for page in FOLDER.glob("*.md") if blocks(page)) == sorted(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_the_code_of_a_page(name, tmp_path, monkeypatch, capsys):
    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    exec(compile("\n".join(blocks(FOLDER / f"{name}.md")), f"{name}.md", "exec"), known)
    assert SHOWS[name](capsys.readouterr().out)
    if name == "federation":
        assert known["evaluation"].personal_accuracy.shape == (2,)


@pytest.mark.parametrize("page", sorted(FOLDER.rglob("*.md")), ids=lambda page: page.stem)
def test_links_within_the_documentation_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
