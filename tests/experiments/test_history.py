"""metrics.jsonl: damage to a line costs that line alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import history
from experiments.history import missing_rounds, read_history
from experiments.workdir import Workdir
from flexmoe_jax.errors import InputError
from flexmoe_jax.reading import UnreadableError


def lines(*numbers: int) -> list[bytes]:
    return [json.dumps({"round": n, "train/loss": 1 / n}).encode() + b"\n" for n in numbers]


def read(folder: Path, content: bytes, most: object = None) -> history.History:
    (folder / "metrics.jsonl").write_bytes(content)
    return read_history(folder / "metrics.jsonl", most)


def rounds(found: history.History) -> list[int]:
    return [row["round"] for row in found.rows]


def test_a_file_that_is_not_there_tells_nothing(tmp_path):
    found = read_history(tmp_path / "metrics.jsonl")
    assert (found, found.last) == (history.History(), 0)


@pytest.mark.parametrize("line", [0, 1, 3])
@pytest.mark.parametrize(
    "damage", [b"", b"\xff", b"[3]", b"7", b"null", b"[" * 99_999, b'{"round": 2}', b'{"a": 1}']
)
def test_a_damaged_line_costs_itself_alone(tmp_path, line, damage):
    whole = lines(1, 2, 3, 4, 5)
    whole[line] = damage + b"\n"
    found = read(tmp_path, b"".join(whole))
    kept = [n for n in range(1, 6) if n != line + 1]
    if damage == b'{"round": 2}' and line == 1:  # As good as any.
        kept.append(2)
    assert rounds(found) == sorted(kept)
    assert found.unread == (0 if not damage or len(kept) == 5 else 1)
    assert missing_rounds(found.rows, found.last) == 5 - len(kept)


@pytest.mark.parametrize("number", ["-1", "0", "1.0", "1e9", "true", '"1"', "null", "9" * 400])
def test_a_round_is_a_whole_number_from_1(tmp_path, number):
    content = b"".join(lines(1)) + b'{"round": %b}\n' % number.encode()
    found = read(tmp_path, content)
    assert (rounds(found), found.unread) == ([1], 1)


def test_a_number_that_its_neighbours_deny_is_damaged(tmp_path):
    """One flipped bit turns 2 into 6, or 5 into 1: no other round may be lost by this."""
    for numbers, at in (((1, 6, 3, 4), 2), ((1, 2, 3, 4, 1, 6), 5), ((3, 2), 1)):
        found = read(tmp_path, b"".join(lines(*numbers)))
        assert rounds(found) == [n for n in range(1, max(numbers[-1], 2) + 1) if n != at]
        assert (found.unread, found.repeated) == (1, 0)


def test_rounds_that_the_run_does_not_have_are_damaged(tmp_path):
    content = b"".join(lines(1, 2, 1000))
    assert rounds(read(tmp_path, content, most=40)) == [1, 2]
    for unknown in (None, "40", 0, -1, 1.5):
        assert rounds(read(tmp_path, content, most=unknown)) == [1, 2, 1000]


def test_of_rounds_told_twice_the_last_counts(tmp_path):
    again = json.dumps({"round": 2, "train/loss": 9.0}).encode() + b"\n"
    found = read(tmp_path, b"".join([*lines(1, 2), again, *lines(3)]))
    assert rounds(found) == [1, 2, 3]
    assert found.rows[1]["train/loss"] == 9.0
    assert (found.unread, found.repeated) == (0, 1)


@pytest.mark.parametrize("end", [b"", b"\n", b"  \n\n", b'{"round": 3', b"\xef"])
def test_the_end_may_be_cut_short_without_a_word(tmp_path, end):
    found = read(tmp_path, b"".join(lines(1, 2)) + end)
    assert (rounds(found), found.unread) == ([1, 2], 0)


def test_a_mark_and_line_ends_of_another_system_do_not_matter(tmp_path):
    content = b"\xef\xbb\xbf" + b"".join(line[:-1] + b"\r\n" for line in lines(1, 2))
    found = read(tmp_path, content)
    assert (rounds(found), found.unread) == ([1, 2], 0)


def test_a_line_or_file_without_end_is_not_taken_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "_LONGEST_LINE", 100)
    long = b'{"round": 2, "x": "' + b"y" * 1000 + b'"}\n'
    found = read(tmp_path, b"".join([*lines(1), long, *lines(3)]))
    assert (rounds(found), found.unread) == ([1, 3], 1)
    with (tmp_path / "metrics.jsonl").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(UnreadableError, match="larger than"):
        read_history(tmp_path / "metrics.jsonl")


@given(st.lists(st.sampled_from([*lines(1, 2, 3, 4), b"\n", b"{}\n", b"\xff\n", b"[[\n"])))
def test_whatever_the_lines_rounds_rise_and_every_line_is_counted(tmp_path_factory, content):
    found = read(tmp_path_factory.mktemp("h"), b"".join(content))
    assert rounds(found) == sorted(set(rounds(found)))
    blank = content.count(b"\n")
    assert len(found.rows) + found.unread + found.repeated == len(content) - blank


def test_what_is_no_file_is_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"its metrics\.jsonl cannot be read \(is a pipe"):
        Workdir(tmp_path).history()


def test_what_is_kept_of_a_damaged_file_is_said_and_the_rest_set_aside(tmp_path):
    workdir = Workdir(tmp_path)
    damaged = b"".join([b"x\n", *lines(2, 3, 4), b'{"round": 5'])
    for again in ("", "-2"):
        workdir.metrics_path.write_bytes(damaged)
        said = workdir.keep_rounds(3)
        assert workdir.metrics_path.read_bytes() == b"".join(lines(2, 3))
        assert (tmp_path / f"metrics-set-aside{again}.jsonl").read_bytes() == damaged
        assert said[0] == "1 of the 3 rounds done are lost from metrics.jsonl"
        assert f"metrics-set-aside{again}.jsonl" in said[1]
    workdir.metrics_path.write_bytes(b"".join(lines(1, 2, 3)))
    assert workdir.keep_rounds(2) == ()
    assert rounds(workdir.history()) == [1, 2]


def test_a_run_that_is_prolonged_has_the_evaluations_of_a_longer_one(tmp_path):
    workdir = Workdir(tmp_path)
    evaluated = [{"round": n, "loss": 1.0, "eval/server_loss": 2.0} for n in (2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in ({"round": 1}, *evaluated))
    for every, last in ((2, {"round": 3, "loss": 1.0}), (3, evaluated[1]), (1, evaluated[1])):
        workdir.metrics_path.write_text(text)
        assert workdir.keep_rounds(3, every) == ()
        assert workdir.read() == [{"round": 1}, evaluated[0], last]


def test_rounds_after_the_last_checkpoint_are_cut_off(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.metrics_path.write_bytes(b"".join(lines(1, 2, 3)))
    assert workdir.keep_rounds(2) == ()
    assert rounds(workdir.history()) == [1, 2]
