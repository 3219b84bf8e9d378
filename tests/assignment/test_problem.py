from __future__ import annotations

import numpy as np
import pytest

from flexmoe_jax.assignment import Problem, solve
from flexmoe_jax.assignment.problem import load_violation
from flexmoe_jax.assignment.solution import relative_gap
from flexmoe_jax.errors import InputError

GOOD = {
    "fitness": np.full((3, 2), 0.5),
    "capacity": [1, 1, 2],
    "load_min": 0,
    "load_max": [3, 3],
}


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("fitness", [[np.nan, 1.0]] * 3, "finite"),
        ("fitness", [[np.inf, 1.0]] * 3, "finite"),
        ("fitness", [1.0, 2.0], "(C, E)"),
        ("fitness", np.zeros((3, 0)), "at least 1 expert"),
        ("fitness", "high", "numbers"),
        ("capacity", [1, 1, 3], "from 0 to 2"),
        ("capacity", [1, 1, -1], "from 0 to 2"),
        ("capacity", [1, 1, 1.5], "from 0 to 2"),
        ("capacity", [1, 1], "(3,)"),
        ("load_min", [0, 0, 0], "(2,)"),
        ("load_min", np.nan, "below infinity"),
        ("load_max", np.nan, "above minus infinity"),
        ("load_weight", -1.0, "at least 0"),
        ("load_weight", [1.0, 2.0], "(3,) or (3, 2)"),
        ("load_weight", np.inf, "finite"),
        ("violation_weight", 0.0, "above 0"),
        ("holders_min", -1, "at least 0"),
        ("balance", -1.0, "at least 0"),
        ("diversity", 1.0, "descriptor"),
        ("descriptor", np.zeros((2, 4)), "(3, F)"),
        ("expert_size", [1.0, 0.0], "above 0"),
        ("target", [np.nan, 1.0], "finite"),
    ],
)
def test_a_bad_field_is_refused_by_name(field: str, value: object, remedy: str) -> None:
    with pytest.raises(InputError) as error:
        Problem(**{**GOOD, field: value})
    assert error.value.field == field
    assert remedy in error.value.remedy
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["violation_weight", "holders_min", "expert_size"])
def test_the_number_that_is_refused_is_the_one_shown(field: str) -> None:
    for bad in (np.inf, -1.0):
        with pytest.raises(InputError) as error:
            Problem(**{**GOOD, field: [1.0, bad]})
        assert error.value.value == bad


@pytest.mark.parametrize("weight", [1.0, [1.0, 2.0]])
@pytest.mark.parametrize("solver", ["auto", "relaxation"])
def test_holders_are_whole(weight: object, solver: str) -> None:
    # Rounding errors ask for no further holder, other fractions do.
    for least, status in ((2 + 1e-10, "optimal"), (1.5, "optimal"), (2.5, "relaxed")):
        problem = Problem(np.zeros((2, 2)), 2, 0, 9, weight, holders_min=least)
        assert solve(problem, solver).status == status


def test_the_default_target_is_a_load_that_can_be_held() -> None:
    def target(capacity: list[float], **fields: object) -> list[float]:
        problem = Problem(np.zeros((2, 2)), capacity, 0, np.inf, **fields)
        return problem.load_target.tolist()

    assert target([1, 2]) == [1.5, 1.5]
    # In bytes: the clients have room for half of both experts, and for more than both.
    assert target([50.0, 1000.0], expert_size=[30.0, 70.0]) == [1.5, 1.5]
    assert target([50.0, 1000.0], expert_size=[30.0, 70.0], load_weight=[4.0, 2.0]) == [4.0, 4.0]


def test_contradicting_bounds_name_the_expert() -> None:
    with pytest.raises(InputError, match="expert 1"):
        Problem(**{**GOOD, "load_min": [0, 4]})


def test_summary_says_what_gave_way() -> None:
    # Three clients of one expert each put 3 on two experts that may hold 1 each: 1 is over.
    found = solve(Problem(np.array([[1.0, 0.0]] * 3), 1, 0, 1))
    text = str(found)
    assert found.status == "relaxed"
    assert text.startswith("relaxed: 3 clients x 2 experts, value 2,")
    assert "out of bounds: expert 0 by 1" in text


@pytest.mark.parametrize("solver", ["relaxation", "dual", "auto"])
def test_no_clients_have_no_mean_descriptor(solver: str) -> None:
    none = Problem(np.zeros((0, 2)), np.zeros(0), 0, 1, descriptor=np.zeros((0, 3)), diversity=2.0)
    assert solve(none, solver).assignment.shape == (0, 2)


@pytest.mark.parametrize("solver", ["relaxation", "paths", "flow", "dual", "auto", "greedy"])
class TestDegenerate:
    def test_no_clients(self, solver: str) -> None:
        found = solve(Problem(np.zeros((0, 2)), np.zeros(0), 0, 1), solver)
        assert found.assignment.shape == (0, 2)
        assert (found.value, found.gap) == (0.0, 0.0)

    def test_one_expert(self, solver: str) -> None:
        found = solve(Problem(np.array([[0.3], [-0.2]]), 1, 0, 2), solver)
        assert found.assignment.all()
        assert found.value == pytest.approx(0.1)

    def test_everyone_holds_everything(self, solver: str) -> None:
        found = solve(Problem(np.array([[0.3, 0.1], [0.2, 0.4]]), 2, 0, 2), solver)
        assert found.assignment.all()
        assert found.status == "optimal" or found.gap < 1e-5

    def test_nobody_holds_anything(self, solver: str) -> None:
        found = solve(Problem(np.ones((3, 2)), 0, 0, 2), solver)
        assert not found.assignment.any()


@pytest.mark.parametrize("solver", ["relaxation", "paths", "flow", "dual", "auto"])
class TestHostile:
    def test_all_equal_fitness(self, solver: str) -> None:
        # 6 holders over 3 experts with room for 2 each: any balanced answer, worth 6 · 0.5.
        found = solve(Problem(np.full((6, 3), 0.5), 1, 2, 2), solver)
        assert found.load.tolist() == [2, 2, 2]
        assert found.value == pytest.approx(3.0)

    def test_negative_fitness(self, solver: str) -> None:
        # Both prefer expert 0 at -1; only one may: the one that loses least by moving is client 1.
        found = solve(Problem([[-1.0, -9.0], [-1.0, -3.0]], 1, 0, 1), solver)
        assert found.assignment.tolist() == [[True, False], [False, True]]
        assert found.value == pytest.approx(-4.0)
        assert found.bound >= -4.0 - 1e-9

    def test_bounds_beyond_reach_give_way_least(self, solver: str) -> None:
        # 4 holders in all, yet each of 2 experts should have at least 3: 2 are missing, not more.
        rng = np.random.default_rng(0)
        found = solve(Problem(rng.random((4, 2)), 1, 3, 9), solver)
        assert found.violation.sum() == pytest.approx(2.0)
        assert found.status == "relaxed"

    def test_a_bound_that_one_expert_cannot_meet(self, solver: str) -> None:
        # Expert 0 should have 5 holders of the 3 clients: all 3 hold it, and 2 stay missing.
        found = solve(Problem([[0.0, 1.0, 1.0]] * 3, 2, [5, 0, 0], [9, 3, 3]), solver)
        assert found.load[0] == 3
        assert found.violation.tolist() == [2, 0, 0]

    def test_huge_and_tiny_fitness(self, solver: str) -> None:
        rng = np.random.default_rng(1)
        fitness = rng.random((6, 3))
        plain = solve(Problem(fitness, 1, 2, 2), solver).value
        for scale in (1e9, 1e-9):
            scaled = solve(Problem(fitness * scale, 1, 2, 2), solver).value
            assert scaled / scale == pytest.approx(plain, rel=1e-3)


def test_bounds_between_two_whole_numbers_are_said_to_give_way() -> None:
    # Five holders, and a load of 2.5 asked of each of two experts.
    problem = Problem(np.random.default_rng(0).random((5, 2)), 1, 2.5, 2.5)
    for solver in ("paths", "relaxation", "dual"):
        found = solve(problem, solver)
        assert sorted(found.load) == [2, 3]
        assert found.status == "relaxed"


def test_worths_that_cancel_leave_no_gap_of_rounding() -> None:
    # 0.1 + 0.2 - 0.3 is 5.6e-17, or 2.8e-17 in another order.
    found = solve(Problem([[0.1, 0.0], [0.2, 0.0], [-0.3, 0.0]], 1, [3, 0], [3, 0]))
    assert abs(found.value) < 1e-15
    assert (found.status, found.gap) == ("optimal", 0.0)
    # A gap of a tenth of the terms remains a gap, even if the terms cancel to zero.
    assert relative_gap(-0.1, 0.0, 1.0) > 1.0
    assert relative_gap(0.9, 1.0, 0.9) == pytest.approx(0.1)


def test_more_holders_than_are_allowed_are_told_however_many_there_are() -> None:
    # One of three million is less than a millionth of them.
    clients = 3_000_000
    problem = Problem(np.zeros((clients, 1)), 1, 0, clients - 1)
    load = np.array([float(clients)])
    assert load_violation(problem, load).tolist() == [1.0]
    assert load_violation(problem, load - 1).tolist() == [0.0]
