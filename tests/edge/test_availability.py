from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.edge import Availability, always, independent, make_availability, markov, trace
from flexmoe_jax.errors import InputError

SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(np.array)


def record(availability: Availability, rounds: int) -> np.ndarray:
    return np.array([availability(round_index) for round_index in range(rounds)])


def test_always_is_always() -> None:
    assert record(always(3), 4).all()


@settings(max_examples=25)
@given(SHARES, st.floats(1, 20), st.integers(0, 2**32), st.permutations(range(12)))
def test_no_order_of_asking_changes_an_answer(
    share: np.ndarray, mean_on_rounds: float, seed: int, order: list[int]
) -> None:
    for name in ("independent", "markov"):
        make = {"name": name, "share": share, "mean_on_rounds": mean_on_rounds, "seed": seed}
        expected = record(make_availability(**make), len(order))
        asked = make_availability(**make)
        for round_index in order:
            answer = asked(round_index)
            assert np.array_equal(answer, expected[round_index])
            answer[:] = ~answer  # whoever asked may write on it


def test_a_later_round_asked_in_between_changes_no_answer() -> None:
    make = {"share": np.full(50, 0.5), "mean_on_rounds": 2.0, "seed": 0}
    expected, asked = record(markov(**make), 9)[5], markov(**make)

    class Interrupted(int):
        """A round index whose first comparison lets another caller ask for a later round."""

        def __ge__(self, other: int) -> bool:
            asked(8)
            return int(self) >= other

    asked(2)
    assert np.array_equal(asked(Interrupted(5)), expected)


@pytest.mark.parametrize("mean_on_rounds", [None, 1.0, 5.0])
def test_shares_of_long_records(mean_on_rounds: float | None) -> None:
    rounds, copies = 400, 100
    share = np.repeat([0.0, 0.1, 0.5, 0.9, 1.0], copies)
    chain = (
        independent(share, seed=0)
        if mean_on_rounds is None
        else markov(share, mean_on_rounds, seed=0)
    )
    mean = record(chain, rounds).reshape(rounds, 5, copies).mean(axis=(0, 2))
    # The mean of 40,000 fair coins has a standard error of 0.0025. A chain's rounds correlate by
    # ρ = 1 - l - c of at most 0.78, and sqrt((1 + ρ) / (1 - ρ)) < 3. Four standard errors:
    assert np.abs(mean - share[::copies]).max() < 4 * 0.0025 * (3 if mean_on_rounds else 1)
    assert mean[0] == 0.0
    assert mean[-1] == 1.0


@pytest.mark.parametrize(
    ("share", "mean_on_rounds", "expected"),
    [
        (0.5, 5.0, 5.0),
        (0.2, 1.0, 1.0),
        # Present in 90 % of rounds, absent for one at a time: stays last nine, whatever was asked.
        (0.9, 2.0, 9.0),
    ],
)
def test_mean_stay(share: float, mean_on_rounds: float, expected: float) -> None:
    there = record(markov(np.full(200, share), mean_on_rounds, seed=1), 400)
    rounds_on, arrivals = there[1:].sum(), (there[1:] & ~there[:-1]).sum()
    # About 8,000 stays or more, whose deviation is at most their mean: a standard error of 1.1 %.
    assert rounds_on / arrivals == pytest.approx(expected, rel=0.05)


def test_round_0_of_a_chain_is_stationary() -> None:
    there = markov(np.full(10_000, 0.3), 50.0, seed=2)(0)
    assert there.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 10_000))


def test_seeds_differ() -> None:
    share = np.full(50, 0.5)
    for make in (independent, lambda share, seed: markov(share, 3.0, seed)):
        assert not np.array_equal(record(make(share, 0), 3), record(make(share, 1), 3))


ROWS = np.array([[1, 0, 1], [0, 0, 1]])


def test_a_trace_begins_again_past_its_end(tmp_path: Path) -> None:
    np.save(tmp_path / "trace.npy", ROWS.astype(bool))
    (tmp_path / "trace.csv").write_text("1,0,1\n\n0, 0, 1\n")
    for source in (ROWS, tmp_path / "trace.npy", str(tmp_path / "trace.csv")):
        assert np.array_equal(record(trace(source, 3), 5), ROWS[[0, 1, 0, 1, 0]])
    named = make_availability(
        str(tmp_path / "trace.csv"), share=np.zeros(3), mean_on_rounds=1, seed=0
    )
    assert np.array_equal(record(named, 2), ROWS)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "give numbers, a row a round and a column a client"),
        ("a,b,c\n1,0,1\n", "without a header"),
        ("1,0,1\n1,0\n", "without a header"),
        ("1,0\n", "it has 2 columns; give one for each of the 3 clients"),
        ("1,0,0.5\n", "give 0 \\(away\\) or 1 \\(there\\) everywhere"),
        ("1,0,nan\n", "give 0 \\(away\\) or 1 \\(there\\) everywhere"),
    ],
)
def test_bad_traces_are_refused(tmp_path: Path, text: str, remedy: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=remedy) as caught:
        trace(file, 3)
    assert caught.value.field == "edge.availability"
    assert "\n" not in str(caught.value)


def test_broken_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "objects.npy", np.array([[None]]), allow_pickle=True)
    np.save(tmp_path / "text.npy", np.array([["0", "1"]]))
    for name in ("empty.npy", "objects.npy", "text.npy", "missing.npy"):
        with pytest.raises(InputError, match=r"edge\.availability"):
            trace(tmp_path / name, 2)


@pytest.mark.parametrize(
    ("name", "share", "mean_on_rounds", "line"),
    [
        (
            "markow",
            0.5,
            2.0,
            "edge.availability=markow: did you mean markov? "
            "give always, independent, markov or the path of a trace",
        ),
        (
            "markov",
            0.5,
            0.5,
            "edge.mean_on_rounds=0.5: choose a number of at least 1",
        ),
        (
            "markov",
            0.5,
            np.inf,
            "edge.mean_on_rounds=inf: choose a number of at least 1",
        ),
        ("independent", 1.5, 2.0, "edge.share=1.5: give a share of rounds, from 0 to 1"),
        ("markov", np.nan, 2.0, "edge.share=nan: give a share of rounds, from 0 to 1"),
    ],
)
def test_bad_input_is_refused(name: str, share: float, mean_on_rounds: float, line: str) -> None:
    with pytest.raises(InputError) as caught:
        make_availability(name, share=np.array([0.5, share]), mean_on_rounds=mean_on_rounds, seed=0)
    assert str(caught.value) == line


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_what_can_be_no_file_is_refused(name):
    with pytest.raises(InputError, match=r"edge\.availability"):
        make_availability(name, share=np.ones(2), mean_on_rounds=2.0, seed=0)


def test_traces_without_end_are_refused(tmp_path: Path, recwarn) -> None:
    huge = tmp_path / "huge.csv"
    huge.write_text("1,0\n")
    with huge.open("r+b") as file:
        file.truncate(2**40)
    (tmp_path / "comments.csv").write_text("# nobody\n")
    os.mkfifo(tmp_path / "pipe.npy")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|b1", "fortran_order": False, "shape": (10**12, 2)}
    )
    (tmp_path / "vast.npy").write_bytes(header.getvalue())
    for path in ("/dev/zero", *sorted(tmp_path.iterdir())):
        with pytest.raises(InputError, match=r"^edge\.availability=") as caught:
            trace(path, 2)
        assert len(str(caught.value).splitlines()) == 1
    assert not recwarn.list


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there.csv").write_text("1,0\n")
    there = make_availability("~/there.csv", share=np.ones(2), mean_on_rounds=2.0, seed=0)
    assert there(0).tolist() == [True, False]
