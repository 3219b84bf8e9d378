from __future__ import annotations

import numpy as np
import pytest
from flexmoe_jax.federated import assignment_slots, make_plan, sample_cohort, slots_assignment
from flexmoe_jax.federated.participation import check_setting, check_solution
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.assignment import Problem, solve
from flexmoe_jax.errors import InputError
from flexmoe_jax.models import MLP, MoEClassifier


@given(st.integers(1, 50), st.data(), st.integers(0, 5), st.integers(0, 9))
def test_cohorts_are_distinct_and_repeatable(clients, data, seed, round_index):
    size = data.draw(st.integers(1, clients))
    cohort = sample_cohort(clients, size, seed=seed, round_index=round_index)
    assert len(set(cohort.tolist())) == size
    assert cohort.min() >= 0
    assert cohort.max() < clients
    assert (cohort == sample_cohort(clients, size, seed=seed, round_index=round_index)).all()


def test_cohorts_change_from_round_to_round():
    cohorts = {tuple(sample_cohort(30, 5, seed=0, round_index=t)) for t in range(10)}
    assert len(cohorts) == 10


@given(st.integers(0, 2**16 - 1), st.integers(1, 4))
def test_slots_and_assignment_are_inverse(bits, rows):
    assignment = (np.arange(16) < 0) | (bits >> np.arange(16) & 1).astype(bool)
    assignment = np.resize(assignment, (rows, 6))
    slots = assignment_slots(assignment, 6)
    assert (np.diff(slots, axis=1) >= 0).all()
    assert (slots_assignment(slots, 6) == assignment).all()


def test_plan_by_hand():
    assignment = np.array([[True, False, True], [False, True, False], [True, True, False]])
    plan = make_plan(
        np.array([4, 7, 9]),
        assignment,
        np.array([2.0, 2.0, 1.0]),
        steps=np.array([5, 8, 8]),
        slots=2,
        clients=10,
        block_size=2,
    )
    # Longest first, equal ones by id, then padding (client 10 = C, slots 3 = E) to a whole block.
    assert plan.clients.tolist() == [7, 9, 4, 10]
    assert plan.slots.tolist() == [[1, 3], [0, 1], [0, 2], [3, 3]]


def test_answers_that_do_not_fit_the_cohort_are_refused():
    cohort, capacity = np.array([1, 4]), np.array([9, 2, 9, 9, 1])
    found = solve(Problem(np.ones((2, 3)), [2, 1], 0, 9), "greedy")
    check_solution(found, cohort, capacity, 3)
    everything = solve(Problem(np.ones((2, 3)), 3, 0, 9), "greedy")
    for answer, line in (
        (found.assignment, "policy=ndarray: return a Solution"),
        (solve(Problem(np.ones((3, 2)), 1, 0, 9), "greedy"), r"policy=\(3, 2\): .* \(2, 3\)"),
        (everything, "policy=3 experts: client 4 has room for 1"),
    ):
        with pytest.raises(InputError, match=line):
            check_solution(answer, cohort, capacity, 3)


@pytest.mark.parametrize(
    ("capacity", "classes", "line"),
    [
        ([1, 2], 10, r"capacity=\[1, 2\]: give a whole number, or one a client: \(7,\)"),
        (1.5, 10, "capacity=1.5: give a whole number"),
        (5, 10, "capacity=5: give 0 to 4"),
        (-1, 10, "capacity=-1: give 0 to 4"),
        (2, 3, "model.classes=3: the clients' labels have 10"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(clients, capacity, classes, line):
    model = MoEClassifier(MLP((4,)), classes=classes, experts=4)
    with pytest.raises(InputError, match=line):
        check_setting(capacity, clients, model)


def test_one_capacity_serves_all(clients):
    model = MoEClassifier(MLP((4,)), classes=10, experts=4)
    assert check_setting(3, clients, model).tolist() == [3] * 7
