"""Flipped bits and values of the wrong kind in files that are read: left out, with a note.

Of every kind of file a few, by a seed. Those of archives and checkpoints have tests beside the
modules that read them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.configs import digits
from experiments.inputs import inputs_text
from experiments.report import write_report
from experiments.reporting.runs import different_data, read_run
from experiments.studying.results import figures, read_results
from experiments.studying.status import OTHER, UNKNOWN, read_record, read_status, write_record
from experiments.table import write_tables
from experiments.train import summarise
from experiments.workdir import Workdir
from flexmoe_jax.errors import InputError
from tests.experiments.test_report import Page, make_workdir, record
from tests.experiments.test_table import make_study, write_run

FILES = ("config.json", "summary.json", "metrics.jsonl", "arrays.npz", "inputs.json")
FLIPS = 25
HASH = "a" * 32


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Creates four finished runs with all files of a run."""
    folder = tmp_path_factory.mktemp("damage") / "study"
    write_record(make_study(seeds=(0, 1)), folder)
    model = make_workdir(folder.with_name("model"))
    with np.load(model / "arrays.npz") as file:
        arrays = dict(file)
    for trial in make_study(seeds=(0, 1)).trials():
        run = folder / trial.name
        write_run(run, [0.5, 0.65, 0.7])
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        lines = [json.dumps(record(row["round"]) | row) + "\n" for row in rows]
        (run / "metrics.jsonl").write_text("".join(lines))
        np.savez_compressed(run / "arrays.npz", **arrays)
        (run / "inputs.json").write_text(inputs_text({"data.train_images": HASH}))
    return folder


@pytest.fixture
def copied(study: Path, tmp_path: Path) -> Path:
    shutil.copytree(study, tmp_path / "study")
    return tmp_path / "study"


def flipped(content: bytes, draw: random.Random) -> bytes:
    broken = bytearray(content)
    broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
    return bytes(broken)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_one_run_costs_no_other_run_anything(copied, name):
    first, *others = (trial.name for trial in make_study(seeds=(0, 1)).trials())
    path, draw = copied / first / name, random.Random(name)
    whole = path.read_bytes()
    for _ in range(FLIPS):
        path.write_bytes(flipped(whole, draw))
        write_tables(copied)
        results = {result.trial.name: result for result in read_results(copied).results}
        assert all(results[other].finished for other in others)
        read_run(copied / first)
        with suppress(InputError):
            Workdir(copied / first).check(digits.get_config())
    if name in ("metrics.jsonl", "arrays.npz"):
        Page(write_report([copied / first]))


def test_a_flipped_bit_in_the_record_is_one_line_or_harmless(copied):
    path, draw = copied / "study.json", random.Random(0)
    whole, refused = path.read_bytes(), 0
    for _ in range(2 * FLIPS):
        path.write_bytes(flipped(whole, draw))
        try:
            write_tables(copied)
        except InputError:
            refused += 1
    assert refused > 5
    path.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="start the sweep again, which writes it anew"):
        write_tables(copied)
    write_record(make_study(seeds=(0, 1)), copied)
    assert path.read_bytes() == whole


def test_what_is_left_out_is_named_in_table_and_page(copied):
    first, second, *_ = (trial.name for trial in make_study(seeds=(0, 1)).trials())
    content = bytearray((copied / first / "arrays.npz").read_bytes())
    content[content.index(b"fitness.npy") + 60] ^= 1
    (copied / first / "arrays.npz").write_bytes(content)
    (copied / second / "metrics.jsonl").write_bytes(
        b"\xff" + (copied / second / "metrics.jsonl").read_bytes()
    )
    text = write_tables(copied)[0].read_text()
    page = Page(write_report([copied])).text
    for words in (text, page):
        assert f"{first}: arrays.npz is without fitness: " in words
        assert (
            f"{second}: Lines of metrics.jsonl that could not be read and are left out: 1." in words
        )
        assert f"{second}: metrics.jsonl lacks 1 round: totals and means are without." in words
    assert "All 4 runs are finished." in text
    # What was there before is drawn all the same.
    shown = read_run(copied / first)
    assert set(shown.arrays) == {
        "label_counts",
        "classes",
        "capacity",
        "holds",
        "held_rounds",
        "usage",
    }
    # It is unknown whether a lost round reached the target first, and how much it sent.
    whole, lacking = figures(shown, 0.6), figures(read_run(copied / second), 0.6)
    counted = {"target/rounds", "target/bytes", "down/bytes", "up/bytes"}
    assert set(whole) - set(lacking) == counted
    assert lacking["global/final"] == whole["global/final"]


def test_other_data_under_one_name_are_said(copied):
    first, *_, last = (trial.name for trial in make_study(seeds=(0, 1)).trials())
    said = "Not all runs of digits read the same data: those of"
    assert said not in write_tables(copied)[0].read_text()
    (copied / last / "inputs.json").write_text(inputs_text({"data.train_images": "b" * 32}))
    expected = f"{said} {first} and 2 more; of {last} differ."
    assert expected in write_tables(copied)[0].read_text()
    assert expected in Page(write_report([copied])).text
    for name in (first, last):
        (copied / name / "arrays.npz").unlink()
    pair = Page(write_report([copied / first, copied / last]))
    assert f"{said} seed 0; of seed 1 differ." in pair.text
    # A TFDS data set is known by its whole name, a file by its own without that of its folder.
    runs = {name: read_run(copied / name) for name in (first, last)}
    for here, there, warnings in (("digits", "emnist/digits", 0), ("a/x.npz", "b/x.npz", 1)):
        asked = {
            name: replace(run, config={**run.config, "data.name": of})
            for (name, run), of in zip(runs.items(), (here, there), strict=True)
        }
        assert len(different_data(asked)) == warnings
    # Those that have another limit, or do not say, are no others.
    (copied / last / "inputs.json").unlink()
    runs = {name: read_run(copied / name) for name in (first, last)}
    assert different_data(runs) == []


@pytest.mark.parametrize(
    ("summary", "status", "seconds"),
    [
        ('{"status": "finished", "seconds": 3}', "finished", 3.0),
        ('{"status": "finished", "seconds": "3"}', "finished", None),
        ('{"status": "finished", "seconds": true}', "finished", None),
        ('{"status": "finished", "seconds": -1}', "finished", None),
        ('{"status": "finished", "seconds": 1e999}', "finished", None),
        ('{"status": ["finished"], "seconds": 3}', "unfinished", 3.0),
        ('{"status": "fin\\u001b[1m", "seconds": NaN}', r"fin\x1b[1m", None),
        ('{"seconds": ' + "9" * 400 + "}", "unfinished", None),
        ("[" * 99_999, "unfinished", None),
        ("[]", "unfinished", None),
        ("", "unfinished", None),
    ],
)
def test_how_far_a_run_is_whatever_its_summary_says(tmp_path, summary, status, seconds):
    write_run(tmp_path / "run", [0.5])
    (tmp_path / "run" / "summary.json").write_text(summary)
    assert read_status(tmp_path / "run", {}) == (status, seconds)
    assert Workdir(tmp_path / "run").seconds() == (seconds or 0.0)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def folder_(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def huge(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("make", [pipe, endless, folder_, huge])
def test_files_that_never_end_are_left_out(copied, make):
    first = copied / make_study(seeds=(0, 1)).trials()[0].name
    for name in FILES[1:]:
        make(first / name)
    run = read_run(first)
    assert len(run.notes) == len(FILES) - 1
    assert (run.records, run.arrays, run.summary) == ((), {}, {})
    Page(write_report([first]))
    assert "1 of 4 runs are not finished" in write_tables(copied)[0].read_text()
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read") as refusal:
        Workdir(first).check(digits.get_config())
    assert len(str(refusal.value).splitlines()) == 1
    make(first / "config.json")
    asked = read_record(copied).fields
    assert read_status(first, asked).status == UNKNOWN
    assert "config.json cannot be read" in write_tables(copied)[0].read_text()
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        Workdir(first).check(digits.get_config())
    make(copied / "study.json")
    with pytest.raises(InputError):
        write_tables(copied)


ODD: tuple[Any, ...] = (
    *("x", "9" * 400, True, False, None, -1, 2**62, 1e99, 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), -float("inf"), [], {}, [1, "a"], [[1]], [1e308] * 4, [0] * 4),
    *([float("nan")] * 4, [-1, 0, 0, 1], [1.0] * 9, list(range(5000)), {"a": {"b": 1}}),
)


def pictures_of(rows: list[dict[str, Any]], run: Path) -> Page:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Page(write_report([run]))


def test_values_of_any_kind_and_size_are_drawn_or_left_out(tmp_path):
    """Every key of metrics.jsonl with several odd values, in one round or in all."""
    run, draw = make_workdir(tmp_path / "run", finished=False), random.Random(3)
    for turn in range(4):
        rows = [record(number) for number in range(1, 5)]
        for key in sorted(rows[0].keys() - {"round"}):
            value = draw.choice(ODD)
            for row in rows if turn % 2 else [draw.choice(rows)]:
                row[key] = value
        page = pictures_of(rows, run)
        assert "of the wrong kind and are left out" in page.text
        summary = {f"final/{key}": draw.choice(ODD) for key in rows[0]}
        summary |= {"status": draw.choice(ODD), "seconds": draw.choice(ODD)}
        (run / "summary.json").write_text(json.dumps(summary))
        figures(read_run(run), 0.6)
        summarise([*Workdir(run).read(), record(5)])
    assert summarise([record(1) | {"train/loss": "x"}, record(2)])["best/train/loss"] == 1.0


def test_a_round_of_a_billion_takes_no_memory_and_moves_no_other(tmp_path):
    run = make_workdir(tmp_path / "run", finished=False)
    rows = [record(number) for number in (1, 2, 3, 10**9)]
    assert "load-usage" in " ".join(pictures_of(rows, run).ids)
    x, vectors = read_run(run).vectors("load/usage")
    assert x.tolist() == [1, 2, 3, 10**9]
    assert vectors.shape == (4, 4)
    # Where the config says how many rounds there are, it is none of them.
    (run / "config.json").write_text('{"rounds": 40}')
    assert read_run(run).rounds == 3


CONFIGS: tuple[Any, ...] = (
    {"clients": {"capacity": {}}, "assignment": {"load": "auto"}},
    {"clients": {"capacity": "1-999999999"}, "assignment": {"load": "auto"}},
    {"clients": {"capacity": "9-1"}, "assignment": {"load": "auto"}, "seed": [[[]]]},
    {"clients": 3, "data": {"name": None}, "rounds": "many", "x": {"": {"": 1}}},
    {"data": {"name": ["x"] * 9000}, "assignment": {"policy": "y" * 9000}, "rounds": -1},
)


def test_configs_of_any_values_are_shown(tmp_path):
    runs = [
        make_workdir(tmp_path / str(number), config, rounds=1, arrays=False)
        for number, config in enumerate(({}, *CONFIGS))
    ]
    Page(write_report(runs))
    for run in runs[1:]:
        with pytest.raises(InputError, match="holds a run with"):
            Workdir(run).check(digits.get_config())
        assert read_status(run, {"seed": 1}).status == OTHER


ARRAYS: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "negative": lambda shape: -np.ones(shape),
    "not finite": lambda shape: np.full(shape, np.nan),
    "huge": lambda shape: np.full(shape, 1e300),
    "unsigned": lambda shape: np.full(shape, 2**64 - 1, np.uint64),
    "half": lambda shape: np.full(shape, 6e4, np.float16),
    "complex": lambda shape: np.ones(shape, complex),
    "dates": lambda shape: np.zeros(shape, "M8[s]"),
    "texts": lambda shape: np.full(shape, "<b>"),
    "bytes": lambda shape: np.full(shape, b"\xff"),
    "zeros": lambda shape: np.zeros(shape),
    "empty": lambda shape: np.zeros((0,) * len(shape)),
    "a number": lambda shape: np.array(3),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_any_kind_are_drawn_or_left_out(tmp_path, kind):
    run = make_workdir(tmp_path / "run")
    # Without figures of rounds, the pictures are those of the arrays.
    (run / "metrics.jsonl").write_text('{"round": 1}\n')
    with np.load(run / "arrays.npz") as file:
        whole = dict(file)
    np.savez(run / "arrays.npz", **{n: ARRAYS[kind](array.shape) for n, array in whole.items()})
    found = read_run(run)
    assert len(found.arrays) + len(found.notes) == len(whole)
    Page(write_report([run]))
