from __future__ import annotations

import base64
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.report import default_out, write_report
from experiments.reporting.heat_maps import client_pictures
from experiments.reporting.orders import by_clients, by_label, pool
from experiments.reporting.quantities import NBSP, QUANTITIES, duration, ratio, show, size
from experiments.reporting.runs import differing_fields, name_runs, read_run
from experiments.reporting.style import spread, thin
from flexmoe_jax.errors import InputError

ROOT = Path(__file__).parents[2]
C, E, Y, T = 12, 4, 3, 6
VOID = {"img", "input", "meta", "line", "br"}
RUN_PICTURES = {
    "accuracy",
    "loss",
    "balance",
    "communication",
    "cost",
    "load-assigned",
    "load-usage",
    "labels",
    "holders",
    "routing",
    "specialisation",
    "fitness",
}


def record(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "round": number,
        "train/loss": 2.0 / number,
        "eval/personal_accuracy": 0.5 + 0.05 * number,
        "eval/global_accuracy": 0.4 + 0.05 * number,
        "eval/server_accuracy": 0.45 + 0.05 * number,
        "eval/assembled_accuracy": 0.35 + 0.05 * number,
        "eval/personal_accuracy_p10": 0.3 + 0.05 * number,
        "eval/personal_loss": 1.5 / number,
        "eval/global_loss": 1.8 / number,
        "eval/server_loss": 1.2 / number,
        "eval/assembled_loss": 2.4 / number,
        "eval/clients": C,
        "eval/personal_clients": C - 1,
        "load/assigned_cv": 0.0,
        "load/assigned_cv_cumulative": 0.02 / number,
        "load/usage_cv": 0.4,
        "load/usage_cv_cumulative": 0.3,
        "load/assigned": [6, 6, 6, 6],
        "load/usage": [10, 20, 30, 40 * number],
        "assignment/gap": 0.0,
        "assignment/solve_seconds": 0.01,
        "assignment/status": "optimal",
        "comm/bytes_down": 2_000_000,
        "comm/bytes_up": 1_500_000,
        "time/round_seconds": 0.5,
        "time/train_examples_per_second": 1500.0,
        **changes,
    }


def make_workdir(
    path: Path,
    config: dict[str, Any] | None = None,
    rounds: int = T,
    finished: bool = True,
    arrays: bool = True,
) -> Path:
    """Writes a run; without arrays, its page has only the pictures of rounds, not of clients."""
    path.mkdir(parents=True)
    default = {"seed": 0, "assignment": {"policy": "flex"}, "clients": {"count": C}}
    (path / "config.json").write_text(json.dumps(default if config is None else config))
    lines = [json.dumps(record(t)) + "\n" for t in range(1, rounds + 1)]
    (path / "metrics.jsonl").write_text("".join(lines))
    if not finished:
        return path
    summary = {
        "status": "finished",
        "rounds": rounds,
        "seconds": 27.4,
        "device": "cpu:0",
        "versions": {"jax": "0.10.2"},
        "final/eval/personal_accuracy": 0.8123,
        "best/eval/personal_accuracy": 0.9,
        "compilations": 1,
    }
    (path / "summary.json").write_text(json.dumps(summary))
    if not arrays:
        return path
    rng = np.random.default_rng(0)
    holds = rng.random((C, E)) < 0.5
    np.savez(
        path / "arrays.npz",
        label_counts=rng.integers(1, 30, (C, Y)),
        classes=np.array(["cat", "<dog>", "a class with a very long name"]),
        capacity=rng.integers(1, 4, C),
        fitness=rng.random((C, E)),
        holds=holds,
        held_rounds=holds * rounds,
        usage=holds * 10.0,
    )
    return path


class Page(HTMLParser):
    """Collects what the tests ask of a page, and fails on tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(f"{w} " for w in self.words).split())

    @property
    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.tags if a.get("id")]

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [a for tag, a in self.tags if tag == "img"]


def svg_of(image: dict[str, str | None]) -> str:
    head, _, body = str(image["src"]).partition(",")
    assert head == "data:image/svg+xml;base64"
    return base64.b64decode(body).decode()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its page."""
    run = make_workdir(tmp_path_factory.mktemp("one") / "run")
    assert write_report([run]) == run / "report" / "index.html"
    return run


def test_one_run_has_every_picture_and_the_right_numbers(one: Path) -> None:
    page = Page(one / "report" / "index.html")
    assert {f"run-{name}" for name in RUN_PICTURES} <= set(page.ids)
    assert len(page.images) == len(RUN_PICTURES)
    assert all(len(str(image["alt"])) > 20 for image in page.images)
    assert page.source.count("<figcaption>") == len(RUN_PICTURES)
    # Each can be enlarged, by keyboard as well.
    boxes = [attributes["aria-label"] for tag, attributes in page.tags if tag == "input"]
    assert len(boxes) == len(set(boxes)) == len(RUN_PICTURES)
    # The summary's values go before the last round's, 0.5 + 0.05 · 6 = 0.8.
    assert "Personal accuracy 81.2 %" in page.text
    assert "90.0 %" in page.text
    # 0.4 + 0.05 · 6 = 0.7; six rounds of 2 MB + 1.5 MB make 21 MB; 0.02 / 6 = 0.00333.
    assert "Global accuracy 70.0 %" in page.text
    assert "21 MB 3.5 MB a round" in page.text
    assert "Assigned load CV, cumulative 0.00333" in page.text
    for words in ("finished", "27.4 s", "cpu:0", "jax 0.10.2", "compilations 1", "policy flex"):
        assert words in page.text


def test_losses_and_what_all_experts_reach_together_are_shown(tmp_path: Path) -> None:
    run = make_workdir(tmp_path / "run", {"eval": {"prior": True}}, arrays=False)
    page = Page(write_report([run]))
    for row in (
        "Accuracy of all experts in one model 65.0 % 65.0 % 6",
        "Personal accuracy, tenth percentile of clients 60.0 % 60.0 % 6",
        "Personal loss 0.25 nats 0.25 nats 6",
        "Global loss 0.3 nats 0.3 nats 6",
        "Server loss 0.2 nats 0.2 nats 6",
        "Loss of all experts in one model 0.4 nats 0.4 nats 6",
        "Clients with personal figures 11",
    ):
        assert row in page.text
    accuracy, loss = (svg_of(page.images[i]) for i in (0, 1))
    assert ">assembled</text>" in accuracy
    assert all(f">{word}</text>" in loss for word in ("personal", "server", "global", "assembled"))
    assert "assembled: all experts in one model" in page.text
    assert "whose label shares it adds to what it predicts" in page.text
    # Every number of a line has a name.
    known = {"round", "load/assigned", "load/usage", "assignment/status"}
    assert record(1).keys() - known <= QUANTITIES.keys()


def test_losses_of_text_are_told_in_bits_a_byte(tmp_path: Path) -> None:
    text = {"task": {"name": "next_token"}, "eval": {"prior": True}}
    run = make_workdir(tmp_path / "text", text, arrays=False)
    page = Page(write_report([run]))
    # 0.25, 1 / 3 and 0.4 over ln 2.
    for row in (
        "Personal loss 0.361 bits a byte 0.361 bits a byte 6",
        "Training loss 0.481 bits a byte 0.481 bits a byte 6",
        "Loss of all experts in one model 0.577 bits a byte 0.577 bits a byte 6",
    ):
        assert row in page.text
    loss = svg_of(page.images[1])
    assert all(f">Mean {what} loss, bits a byte</text>" in loss for what in ("training", "test"))
    assert "nats" not in page.text
    # Tokens have no label shares.
    assert "label shares" not in page.text
    twins = [run, make_workdir(tmp_path / "other", {**text, "seed": 1}, arrays=False)]
    of_twins = Page(write_report(twins))
    assert ">Personal loss, bits a byte</text>" in svg_of(of_twins.images[1])
    # Half a squared distance has no unit, and nothing in common with bits.
    run = make_workdir(tmp_path / "numbers", {"task": {"name": "regression"}}, arrays=False)
    assert "Personal loss 0.25 0.25 6" in Page(write_report([run])).text
    both = Page(write_report([run, twins[0]]))
    # Both recorded 0.25, of which neither is the best.
    assert f'<td class="n top">0.361{NBSP}bits' in of_twins.source
    assert '<td class="n top">0.25</td>' not in both.source
    assert f'<td class="n top">0.361{NBSP}bits' not in both.source
    assert ">Personal loss, as recorded</text>" in svg_of(both.images[1])


def test_loads_say_what_they_count(tmp_path: Path) -> None:
    counted = {
        ("next_token", "usage"): "an expert's tokens that holders are expected to send it",
        ("next_token", "samples"): "an expert's samples that holders train on",
        ("classification", "usage"): "an expert's samples that holders are expected to send it",
    }
    for i, ((task, load), text) in enumerate(counted.items()):
        config = {"task": {"name": task}, "assignment": {"load": load}}
        page = Page(write_report([make_workdir(tmp_path / str(i), config)]))
        assert text in page.text
        assert f">{text.split()[2]}, all rounds</text>" in "".join(map(svg_of, page.images))


def test_only_times_that_leave_the_first_round_out_say_so(tmp_path: Path, one: Path) -> None:
    told = "times without the first round"
    assert told in Page(one / "report" / "index.html").text
    run = make_workdir(tmp_path / "run", arrays=False)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in (1, 2)))
    assert told not in Page(write_report([run])).text


def test_a_run_without_them_has_the_pictures_that_it_had(tmp_path: Path) -> None:
    """Runs without these metrics: of an older version, and with private gates."""
    run = make_workdir(tmp_path / "run")
    kept = {key: v for key, v in record(1).items() if "_loss" not in key and "assem" not in key}
    (run / "metrics.jsonl").write_text(json.dumps(kept) + "\n")
    page = Page(write_report([run]))
    assert len(page.images) == len(RUN_PICTURES)
    assert "assembled" not in page.text
    assert "in one model" not in page.text
    assert "label shares" not in page.text


def test_page_needs_nothing_but_itself(compared: Page) -> None:
    page = compared
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:"))
    assert not re.search(r"url\(|@import", page.source)
    for image in page.images:
        svg = svg_of(image)
        assert not re.search(r"(?:href|src)=\"(?!data:|#)", svg)
        assert "<script" not in svg
    ids = page.ids
    assert len(ids) == len(set(ids))
    links = [str(a["href"])[1:] for tag, a in page.tags if tag == "a"]
    assert set(links) <= set(ids)


def test_same_workdir_gives_the_same_page(tmp_path: Path, one: Path) -> None:
    first = (one / "report" / "index.html").read_bytes()
    assert write_report([one], tmp_path / "2.html").read_bytes() == first
    assert not list(tmp_path.glob("*.part"))


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    config = {"name": "<script>alert(1)</script>", "note": 'a "quoted" & b'}
    page = Page(write_report([make_workdir(tmp_path / "<b>run", config)]))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in page.text
    assert 'a "quoted" & b' in page.text


def test_run_that_is_still_going(tmp_path: Path) -> None:
    run = make_workdir(tmp_path / "run", finished=False)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    page = Page(write_report([run]))
    assert read_run(run).rounds == T - 1
    assert "unfinished" in page.text
    # Round 5 is the last whole one: 0.5 + 0.05 · 5 = 0.75; five rounds of 0.5 s.
    assert "Personal accuracy 75.0 % best 75.0 %, round 5" in page.text
    assert "Wall time 2.5 s" in page.text
    assert "arrays.npz, which is not there yet" in page.text
    assert "run-labels" not in page.ids
    assert "could not be read" not in page.text


@pytest.mark.parametrize("present", ["config.json", "metrics.jsonl"])
def test_run_without_a_single_round(tmp_path: Path, present: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / present).write_text("{}" if present == "config.json" else "")
    page = Page(write_report([tmp_path / "run"]))
    assert page.images == []
    assert "No round has been recorded yet." in page.text


def test_rounds_without_evaluation_and_values_that_are_not_finite(tmp_path: Path) -> None:
    run = make_workdir(tmp_path / "run", finished=False)
    kept = {k: v for k, v in record(7).items() if not k.startswith("eval/")}
    diverged = {**kept, "train/loss": float("nan"), "assignment/gap": float("inf")}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(diverged) + "\n")
    (run / "summary.json").write_text('{"status": "diverged", "final/train/loss": NaN}')
    read = read_run(run)
    assert read.series("eval/personal_accuracy")[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert read.best("train/loss") == pytest.approx(2 / 6)
    page = Page(write_report([run]))
    assert "diverged" in page.text
    assert "Training loss NaN 0.333 nats 6" in page.text
    assert "Assignment gap ∞ 0 1" in page.text


def test_damaged_files_are_left_out_and_named(tmp_path: Path) -> None:
    run = make_workdir(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    # A round cut short by a kill, and written again after the resume with another loss.
    again = json.dumps(record(6, **{"train/loss": 0.125}))
    (run / "metrics.jsonl").write_text("\n".join([*lines, lines[5][:50], again]) + "\n")
    (run / "summary.json").write_text('{"status": "fin')
    (run / "arrays.npz").write_bytes(b"PK\x03\x04 cut")
    read = read_run(run)
    assert read.rounds == T
    assert read.final("train/loss") == 0.125
    page = Page(write_report([run]))
    for words in (
        "metrics.jsonl that could not be read and are left out: 1.",
        "summary.json could",
    ):
        assert words in page.text
    assert "arrays.npz could not be read" in page.text


def test_arrays_that_do_not_fit_each_other(tmp_path: Path) -> None:
    run = make_workdir(tmp_path / "run")
    np.savez(run / "arrays.npz", capacity=np.ones(3, int), fitness=np.ones((4, 2)))
    read = read_run(run)
    assert read.arrays == {}
    assert "fitness has shape (4, 2), which does not fit (C, E)" in read.notes[0]


def test_newcomers_stand_beside_the_clients_that_train(tmp_path: Path) -> None:
    new = {
        "eval/newcomer_accuracy": 0.625,
        "eval/newcomer_loss": 1.5,
        "eval/newcomer_clients": 3,
        "comm/newcomer_bytes_down": 4_000_000,
        "assignment/newcomer_status": "optimal",
    }
    runs = [make_workdir(tmp_path / name, arrays=False) for name in ("with", "without")]
    lines = [json.dumps(record(t, **new)) + "\n" for t in range(1, T + 1)]
    (runs[0] / "metrics.jsonl").write_text("".join(lines))
    page = Page(write_report(runs[:1]))
    assert "Newcomers' accuracy 62.5 % best 62.5 %, round 1" in page.text
    assert "newcomers: 3 clients without training, each on its own." in page.text
    assert "Sent to newcomers, to probe them 4 MB" in page.text
    assert ">newcomers</text>" in svg_of(page.images[0])
    # A column, and a panel, where one of the runs has them.
    both = Page(write_report(runs))
    assert both.source.count('<th scope="col" class="n">Newcomers&#39; accuracy</th>') == 1
    assert ">Newcomers accuracy, %</text>" in svg_of(both.images[0])
    alone = Page(write_report([runs[1]]))
    assert "Newcomers" not in alone.text
    assert "ewcomers<" not in svg_of(alone.images[0])


POLICIES = ("flex", "greedy", "random")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of three runs, of which the second learns little."""
    folder = tmp_path_factory.mktemp("compared")
    runs = [
        make_workdir(folder / p, {"seed": 0, "assignment": {"policy": p, "slack": 0.1}})
        for p in POLICIES
    ]
    weak = [json.dumps(record(t, **{"train/loss": 3.0})) + "\n" for t in range(1, T + 1)]
    (runs[1] / "metrics.jsonl").write_text("".join(weak))
    out = write_report(runs)
    assert out == folder / "report.html"
    return Page(out)


def test_several_runs_are_compared(compared: Page) -> None:
    page = compared
    assert "3 runs compared" in page.text
    for letter, policy in zip("ABC", POLICIES, strict=True):
        assert f"{letter} policy {policy}" in page.text
    all_together = {f"all-{name}" for name in ("accuracy", "test-loss", "balance", "loss")}
    assert all_together | {"run-1-fitness", "run-3-labels"} <= set(page.ids)
    assert len(page.images) == 4 + 3 * len(RUN_PICTURES)
    # The field that differs is marked once in each run's section; slack and seed are not.
    assert page.source.count('class="differs"') == 3
    assert re.findall(r'class="differs"><dt>(\w+)', page.source) == ["policy"] * 3
    # 2 / 6 wins against 3.0, in the two runs that reached it.
    assert page.source.count(f'<td class="n top">0.333{NBSP}nats</td>') == 2
    assert f'<td class="n">3{NBSP}nats</td>' in page.source
    ends = svg_of(page.images[0])
    assert all(f">{letter}</text>" in ends for letter in "ABC")


def test_a_client_without_examples_leaves_the_others_in_the_picture(tmp_path: Path) -> None:
    path, drawn = make_workdir(tmp_path / "run"), []
    with np.load(path / "arrays.npz") as file:
        arrays = dict(file)
    # Without usage it makes no difference which examples it has.
    arrays["usage"][0] = 0
    for examples in (5, 0):
        arrays["label_counts"][0] = examples
        np.savez(path / "arrays.npz", **arrays)
        pictures = {picture.name: picture.source for picture in client_pictures(read_run(path))}
        drawn.append(pictures["specialisation"])
    assert drawn[0] == drawn[1]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    same = [read_run(make_workdir(tmp_path / name / "run")) for name in ("x", "y")]
    assert differing_fields(same) == []
    assert name_runs(same) == ["x/run", "y/run"]
    # Where the data lie, and what computes, is of no interest beside the policy.
    moved = [
        read_run(make_workdir(tmp_path / d, {"data": {"dir": d}, "execution": {"devices": n}, **p}))
        for d, n, p in (("d1", 1, {"p": "flex"}), ("d2", 2, {"p": "greedy"}))
    ]
    assert differing_fields(moved) == ["p"]
    assert name_runs(moved) == ["p flex", "p greedy"]
    twice = [
        read_run(make_workdir(tmp_path / name, {"seed": seed, "a": {"n": 1}, "b": {"n": n}}))
        for name, seed, n in (("p", 0, 1), ("q", 1, 2), ("r", 1, 2))
    ]
    assert name_runs(twice) == ["n 1, seed 0", "n 2, seed 1 · q", "n 2, seed 1 · r"]
    many = [read_run(make_workdir(tmp_path / f"m{i}", dict.fromkeys("abcd", i))) for i in range(2)]
    assert name_runs(many) == ["m0", "m1"]


def test_a_workdir_named_twice_counts_once(tmp_path: Path) -> None:
    run = make_workdir(tmp_path / "run", arrays=False)
    assert write_report([run, f"{run}/"]) == default_out([run])


def test_many_clients_and_rounds_stay_readable_and_small(tmp_path: Path) -> None:
    run = make_workdir(tmp_path / "run", {"task": {"name": "next_token"}})
    clients, experts, rounds = 1500, 64, 600
    rng = np.random.default_rng(1)
    load = rng.integers(1, 90, (rounds, experts))
    with (run / "metrics.jsonl").open("w") as file:
        for t, row in enumerate(load.tolist(), start=1):
            file.write(json.dumps(record(t, **{"load/assigned": row, "load/usage": row})) + "\n")
    holds = rng.random((clients, experts)) < 0.05
    np.savez(
        run / "arrays.npz",
        label_counts=rng.integers(0, 30, (clients, 62)),
        classes=np.array([f"class {i}" for i in range(62)]),
        capacity=rng.integers(1, 9, clients),
        fitness=rng.random((clients, experts)),
        holds=holds,
        held_rounds=holds * 40,
        usage=holds * rng.random((clients, experts)),
    )
    out = write_report([run])
    assert out.stat().st_size < 4_000_000
    page = Page(out)
    pictures = dict(zip([i for i in page.ids if i[4:] in RUN_PICTURES], page.images, strict=True))
    svg = svg_of(pictures["run-holders"])
    assert svg.count("<image") == 3
    labels = re.findall(r"<text style=\"[^\"]*\" [^>]*?y=\"([\d.]+)\"[^>]*>expert \d+</text>", svg)
    heights = np.sort(np.array(labels, dtype=float))
    # Two maps with their own labels; type of 7 points needs rows at least 7 points apart.
    assert 20 < len(heights) < 2 * experts
    assert np.diff(heights).min() >= 7
    assert "grouped by most frequent domain; a column is the mean of 2" in svg
    # Each line has a window of its own, which the caption does not give in rounds.
    assert "running mean over a fortieth of them" in page.text
    assert "round (a column is the mean of 3)" in svg_of(pictures["run-load-usage"])


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "parent"])
def test_folder_that_is_no_workdir(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "given"
    if kind == "file":
        path.write_text("")
    elif kind == "empty":
        path.mkdir()
    elif kind == "parent":
        make_workdir(path / "run")
    with pytest.raises(InputError, match=r"DIR=.*given: ") as caught:
        write_report([path])
    assert "\n" not in str(caught.value)
    said = {"missing": "no such folder", "file": "not a folder", "empty": "neither", "parent": "/*"}
    assert said[kind] in str(caught.value)
    assert not (path / "report").exists()


def test_out_that_cannot_be_written(tmp_path: Path) -> None:
    run = make_workdir(tmp_path / "run")
    with pytest.raises(InputError, match=r"out=.*is a folder"):
        write_report([run], tmp_path)
    with pytest.raises(InputError, match=r"out=.*cannot be written"):
        write_report([run], run / "config.json" / "page.html")
    with pytest.raises(InputError, match="at least one training run"):
        write_report([])


def run_program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_program_writes_where_it_is_told(tmp_path: Path) -> None:
    run, out = make_workdir(tmp_path / "run"), tmp_path / "new" / "page.html"
    done = run_program(run, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(out))
    assert Page(out).images


def test_program_refuses_in_one_line_with_exit_code_2(tmp_path: Path) -> None:
    done = run_program(tmp_path / "nothing")
    assert done.returncode == 2
    assert done.stderr.strip().startswith(f"DIR={tmp_path / 'nothing'}: no such folder")
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_importing_the_library_function_declares_no_flag_and_no_matplotlib() -> None:
    code = (
        "import sys, experiments.report; from absl import flags; "
        "assert 'out' not in flags.FLAGS; assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_numbers_as_people_read_them() -> None:
    assert size(999) == "999\u00a0B"
    assert size(1_234_000_000) == "1.23\u00a0GB"
    assert size(999.6) == "1\u00a0kB"
    assert size(999_501) == "1\u00a0MB"
    assert size(1.5e15) == "1,500\u00a0TB"
    assert duration(0.99951) == "1\u00a0s"
    assert duration(119.6) == "2\u00a0min 0\u00a0s"
    assert ratio(999.4) == "999"
    assert ratio(999.6) == "1,000"
    assert duration(0.0123) == "12.3\u00a0ms"
    assert duration(685) == "11\u00a0min 25\u00a0s"
    assert duration(7_500) == "2\u00a0h 5\u00a0min"
    assert ratio(0.0031) == "0.0031"
    assert ratio(0.000022) == "2.2×10⁻⁵"  # noqa: RUF001
    assert ratio(0) == "0"
    assert show("eval/global_accuracy", None) == "–"  # noqa: RUF001
    assert show("train/loss", float("nan")) == "NaN"


def test_orders_by_hand() -> None:
    # Most frequent labels 1, 0, 0; client 2 is all of label 0, client 1 only three quarters.
    assert by_label(np.array([[1, 4], [3, 1], [5, 0]])).tolist() == [2, 1, 0]
    # With clients as they stand, expert 1 serves client 0, expert 0 client 2, expert 2 nobody.
    weight = np.array([[0, 3, 0], [0, 0, 0], [2, 0, 0]])
    assert by_clients(weight, np.arange(3)).tolist() == [1, 0, 2]


def test_pooling_by_hand() -> None:
    # Three columns into at most two: pairs, the last one alone; NaN cells do not count.
    cells, each = pool(np.array([[1.0, 3.0, 5.0], [np.nan, 3.0, np.nan]]), 2)
    assert each == 2
    np.testing.assert_array_equal(cells, [[2.0, 5.0], [3.0, np.nan]])


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.floats(0.01, 0.08),
)
def test_spread_labels_never_touch_and_keep_their_order(wanted: list[float], gap: float) -> None:
    places = np.array(spread(wanted, gap))
    assert np.all(np.diff(np.sort(places)) >= gap - 1e-9)
    assert places.min() >= -1e-9
    assert places.max() <= 1 + 1e-9
    for i, first in enumerate(wanted):
        for j, second in enumerate(wanted):
            if first < second:
                assert places[i] < places[j]


@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=40), st.floats(0.01, 1))
def test_thinned_labels_never_touch(widths: list[float], scale: float) -> None:
    kept = thin(np.arange(len(widths)), widths, scale)
    assert kept[0] == 0
    for left, right in itertools.pairwise(kept):
        assert (right - left) * scale >= (widths[left] + widths[right]) / 2 - 1e-9
