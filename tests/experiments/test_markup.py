"""Names and values from files cannot change the structure of a page, table or spreadsheet."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.markup import csv_text, latex_text, markdown_text
from experiments.report import write_report
from experiments.reporting import fill as fill_in
from experiments.studying.status import write_record
from experiments.table import write_tables
from flexmoe_jax.errors import printable
from tests.experiments.test_report import Page, make_workdir, svg_of
from tests.experiments.test_table import make_study, write_run

HOSTILE = (
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\uff1d1",
    "a;=1",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a|b`c`",
    "[x](http://evil)",
    "![x](y)",
    "&lt;b&gt;",
    "\x1b[2J\x07",
    "a\nb\n# c",
    "\u202etxt.exe",
    "\ud800",
    "$x$ \\input{/etc/passwd} {",
    '"><b>',
)
texts = st.sampled_from(HOSTILE) | st.text(alphabet="=+-@\t;,|a1<>&`[]*\\'\" \n\x1b") | st.text()


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@given(texts)
def test_no_cell_of_a_spreadsheet_begins_with_a_formula(text):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([csv_text(text), "x"])
    assert len(out.getvalue().splitlines()) == 1
    for cell in re.split(r"[;,\t]", csv_text(text)):
        begin = cell.strip()[:1]
        assert begin not in tuple("=+-@") or is_number(csv_text(text)), cell


@pytest.mark.parametrize("number", ["-1.5", "+3", "1e-300", "-0", "-inf"])
def test_numbers_stay_numbers(number):
    assert csv_text(number) == number


@given(texts)
def test_html_shows_what_is_printable(text):
    made = fill_in.TEMPLATES.from_string('<p title="{{ text }}">{{ text }}</p>').render(text=text)
    found: list[tuple[str, list[tuple[str, str | None]]]] = []
    words: list[str] = []
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_starttag = lambda *tag: found.append(tag)  # type: ignore[method-assign]
    parser.handle_data = words.append  # type: ignore[method-assign]
    parser.feed(made)
    parser.close()
    shown = printable(text, 10_000)
    assert found == [("p", [("title", shown)])]
    assert "".join(words) == shown


@given(texts)
def test_markdown_opens_nothing(text):
    shown = markdown_text(text)
    assert len(shown.splitlines()) <= 1
    bare = re.sub(r"\\[\\`|\[\]*]", "", shown)
    assert not re.search(r"[\\`|\[\]*]|<[A-Za-z/!?]", bare)
    assert html.unescape(bare) == re.sub(r"[\\`|\[\]*]", "", printable(text, 10_000))


def test_text_without_a_meaning_stays_as_it_is():
    for text in ("flex_paper", "p < 0.001", "90.0 ± 0.2", "a & b", "1-4"):
        assert markdown_text(text) == csv_text(text) == text


@given(texts)
def test_latex_has_no_command_of_the_texts_own(text):
    bare = latex_text(text)
    for known in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}"):
        bare = bare.replace(known, "")
    bare = re.sub(r"\\[&%$#_{}]|\$(<|>|-|\\pm|\\cdot)\$|\{[\[*]\}", "", bare)
    assert not re.search(r"[\\&%$#_{}^~\[*]", bare.replace("~", ""))
    assert "\n" not in bare


def hostile_study(folder: Path) -> None:
    """Creates a study of two runs in which every name is a hostile one."""
    study = make_study(seeds=(0,), variants={"axis": {"1": {}}})
    write_record(study, folder)
    record = json.loads((folder / "study.json").read_text())
    record["name"], record["config"] = HOSTILE[7], {}
    names = iter(("=cmd|x!A0", "+1+1", "@SUM(A1)", "日本 <b>", "[x](y) `a`"))
    shared = {"dataset": next(names), "partition": next(names), "variant": {"<axis>": next(names)}}
    for run in record["runs"]:
        run |= {**shared, "method": next(names)}
        axis = f"<axis>_{shared['variant']['<axis>']}"
        name = "/".join([run["dataset"], run["partition"], axis, run["method"], "seed_0"])
        write_run(folder / name, [0.5, 0.7])
    record["runs"] += [{**record["runs"][0], "method": name} for name in HOSTILE]
    record["runs"].append({**record["runs"][0], "dataset": "/etc", "partition": "../.."})
    (folder / "study.json").write_text(json.dumps(record))


def test_names_from_a_study_are_shown_and_do_nothing(tmp_path):
    hostile_study(tmp_path)
    paths = write_tables(tmp_path)
    words, cells, latex = (path.read_text() for path in paths)
    assert "20 of 22 runs are not finished" in words
    assert "not in the study" in words
    for text in (words, cells, latex):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    assert not re.search(r"<(script|img|b)", words)
    rows = list(csv.reader(io.StringIO(cells)))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert all(is_number(c) for row in rows for c in row if c[:1] in tuple("=+-@") and c)
    page = Page(write_report([tmp_path]))
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert HOSTILE[7] in page.text
    pictures = [ElementTree.fromstring(svg_of(image)) for image in page.images]
    assert len(pictures) >= 4
    assert not [tag for picture in pictures for tag in picture.iter() if "script" in tag.tag]


def test_values_and_classes_of_a_run_are_shown_and_do_nothing(tmp_path):
    config = {f"field {i}": text for i, text in enumerate(HOSTILE)} | {HOSTILE[7]: HOSTILE[13]}
    run = make_workdir(tmp_path / "<b>\x1b\nrun", {"data": {"name": HOSTILE[8]}, **config})
    with np.load(run / "arrays.npz") as file:
        arrays = {**file, "classes": np.array([HOSTILE[13], HOSTILE[7], "a\nb"])}
    np.savez(run / "arrays.npz", **arrays)
    page = Page(write_report([run]))
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", page.source)
    assert r"\x1b[2J\x07" in page.text
