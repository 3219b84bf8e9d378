from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.edge import Attempt, Devices, Outcome, attempt, run_attempt
from flexmoe_jax.errors import InputError

# Totals 10, 20, 30, 40 seconds.
FOUR = Attempt(
    download=np.array([1.0, 2.0, 3.0, 4.0]),
    compute=np.array([7.0, 14.0, 21.0, 28.0]),
    upload=np.array([2.0, 4.0, 6.0, 8.0]),
)


def play(times: Attempt = FOUR, before: Any = (), during: Any = (), **options: Any) -> Outcome:
    """Runs an attempt; `before` and `during` are positions in the cohort."""
    flags = np.zeros((2, len(times.total)), bool)
    flags[0, list(before)] = True
    flags[1, list(during)] = True
    settings = {"wanted": len(times.total), "deadline": np.inf, "late": "drop"} | options
    return run_attempt(times, dropped_before=flags[0], dropped_during=flags[1], **settings)


def test_times_by_hand() -> None:
    devices = Devices(
        names=("slow", "fast"),
        tier=np.array([0, 1]),
        memory=np.array([1.0, 1.0]),
        speed=np.array([2.0, 100.0]),
        down=np.array([1000.0, np.inf]),
        up=np.array([500.0, 4000.0]),
        availability=np.array([1.0, 1.0]),
    )
    times = attempt(
        devices,
        np.array([1, 0]),
        bytes_down=np.array([8000, 3000]),
        bytes_up=np.array([8000, 1000]),
        examples=np.array([50, 50]),
    )
    assert times.download.tolist() == [0.0, 3.0]
    assert times.compute.tolist() == [0.5, 25.0]
    assert times.upload.tolist() == [2.0, 2.0]
    assert times.total.tolist() == [2.5, 30.0]


@pytest.mark.parametrize(
    ("options", "work", "seconds"),
    [
        # Nothing goes wrong: the slowest ends the round.
        ({}, [1, 1, 1, 1], 40),
        ({"deadline": 40}, [1, 1, 1, 1], 40),
        # Late ones deliver nothing, and the server waited for them.
        ({"deadline": 25}, [1, 1, 0, 0], 25),
        # 25 - 3 - 6 = 16 of 21 seconds of training; 25 - 4 - 8 = 13 of 28.
        ({"deadline": 25, "late": "partial"}, [1, 1, 16 / 21, 13 / 28], 25),
        # 9 - 3 - 6 = 0: the third has no time to train, the fourth not even to transmit.
        ({"deadline": 9, "late": "partial"}, [6 / 7, 3 / 14, 0, 0], 9),
        # The second delivery ends the round.
        ({"wanted": 2}, [1, 1, 0, 0], 20),
        ({"wanted": 2, "deadline": 15}, [1, 0, 0, 0], 15),
        # The first is gone and the server knows: the next two are accepted.
        ({"wanted": 2, "before": [0]}, [0, 1, 1, 0], 30),
        ({"wanted": 2, "during": [0]}, [0, 1, 1, 0], 30),
        # Three arrive of four wanted: without a deadline the fourth's loss shows at 40 seconds.
        ({"during": [3]}, [1, 1, 1, 0], 40),
        ({"during": [0]}, [0, 1, 1, 1], 40),
        # With one the server cannot know, and waits until then.
        ({"during": [0], "deadline": 50}, [0, 1, 1, 1], 50),
        ({"before": [0], "deadline": 50}, [0, 1, 1, 1], 40),
        ({"before": [2, 3], "deadline": 50}, [1, 1, 0, 0], 20),
        # Partial deliveries all arrive at the deadline: the tie goes by cohort order.
        ({"wanted": 3, "deadline": 25, "late": "partial"}, [1, 1, 16 / 21, 0], 25),
        ({"before": [0, 1, 2, 3], "deadline": 50}, [0, 0, 0, 0], 0),
        ({"during": [0, 1, 2, 3]}, [0, 0, 0, 0], 40),
    ],
)
def test_outcomes_by_hand(options: dict[str, Any], work: list[float], seconds: float) -> None:
    outcome = play(**options)
    assert outcome.work == pytest.approx(np.array(work))
    assert outcome.delivered.tolist() == [share > 0 for share in work]
    assert outcome.seconds == seconds
    assert outcome.reached.tolist() == [i not in options.get("before", ()) for i in range(4)]


def test_a_client_without_examples_delivers_all_its_work() -> None:
    idle = Attempt(np.array([1.0]), np.array([0.0]), np.array([1.0]))
    assert play(idle, deadline=2, late="partial").work.tolist() == [1.0]
    assert play(idle, deadline=1.5, late="partial").work.tolist() == [0.0]


def test_equal_times_are_accepted_in_turn() -> None:
    same = Attempt(*np.ones((3, 4)))
    assert play(same, wanted=2).delivered.tolist() == [True, True, False, False]
    turn = np.array([0.7, 0.1, 0.9, 0.3])
    assert play(same, wanted=2, turn=turn).delivered.tolist() == [False, True, False, True]


SECONDS = st.floats(0, 100)


@st.composite
def rounds(draw: st.DrawFn) -> dict[str, Any]:
    clients = draw(st.integers(1, 8))
    times = draw(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=clients, max_size=clients))
    someone = st.lists(st.sampled_from(range(clients)), unique=True)
    return {
        "times": Attempt(*np.array(times).T),
        "wanted": draw(st.integers(1, 10)),
        "deadline": draw(st.one_of(st.floats(0.1, 300), st.just(np.inf))),
        "late": draw(st.sampled_from(["drop", "partial"])),
        "before": draw(someone),
        "during": draw(someone),
    }


@given(rounds())
def test_what_always_holds(request: dict[str, Any]) -> None:
    outcome = play(**request)
    times, deadline = request["times"], request["deadline"]
    assert ((outcome.work >= 0) & (outcome.work <= 1)).all()
    assert np.array_equal(outcome.delivered, outcome.work > 0)
    assert outcome.delivered.sum() <= request["wanted"]
    assert not outcome.delivered[request["before"] + request["during"]].any()
    assert outcome.seconds <= (times.total.max() if np.isinf(deadline) else deadline)
    on_time = times.total <= deadline
    assert (outcome.work[outcome.delivered & on_time] == 1).all()
    if request["late"] == "drop":
        assert not outcome.delivered[~on_time].any()
    if outcome.delivered.sum() == request["wanted"]:
        assert outcome.seconds == min(times.total[outcome.delivered].max(), deadline)
        # No client whose delivery was rejected had been faster.
        rest = outcome.reached & ~outcome.delivered
        rest[request["during"]] = False
        assert (times.total[rest] >= min(outcome.seconds, deadline)).all()
    if np.array_equal(outcome.delivered, outcome.reached) and on_time.all():
        assert outcome.seconds == times.total[outcome.delivered].max(initial=0.0)


@given(rounds(), st.floats(1, 5))
def test_more_time_never_yields_less(request: dict[str, Any], factor: float) -> None:
    if np.isinf(request["deadline"]):
        request["deadline"] = 60.0
    short = play(**request)
    long = play(**(request | {"deadline": request["deadline"] * factor}))
    assert long.delivered.sum() >= short.delivered.sum()
    assert long.seconds >= short.seconds
    everybody = request | {"wanted": 10}
    short = play(**everybody)
    long = play(**(everybody | {"deadline": request["deadline"] * factor}))
    assert (long.work >= short.work).all()


@given(rounds())
def test_partial_work_is_what_the_deadline_leaves(request: dict[str, Any]) -> None:
    request |= {"late": "partial", "wanted": 10}
    outcome = play(**request)
    times = request["times"]
    needed = times.download + outcome.work * times.compute + times.upload
    assert (needed[outcome.delivered] <= request["deadline"] * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"late": "wait"}, "edge.late=wait: choose one of drop, partial"),
        ({"wanted": 0}, "edge.wanted=0: give at least 1"),
        ({"deadline": 0.0}, "edge.deadline=0.0: give seconds above 0 (inf for none)"),
        ({"deadline": np.nan}, "edge.deadline=nan: give seconds above 0 (inf for none)"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as caught:
        play(**options)
    assert str(caught.value) == line
