from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.assignment import Problem, SolverError, engine, solve
from flexmoe_jax.assignment.certificate import (
    Prices,
    effective_bounds,
    gave_way,
    price_bound,
    require_capacities,
)
from flexmoe_jax.assignment.engine import _Answer
from flexmoe_jax.assignment.problem import expert_load, objective


def choices(problem: Problem) -> list[np.ndarray]:
    """Enumerates all assignments within the capacities, for tiny problems."""
    rows = np.array(list(itertools.product([False, True], repeat=problem.experts)))
    if problem.expert_size is None:
        of_client = [rows[rows.sum(axis=1) == k] for k in problem.capacity]
    else:
        of_client = [rows[rows @ problem.expert_size <= k] for k in problem.capacity]
    return [np.array(held) for held in itertools.product(*of_client)]


def is_within(problem: Problem, held: np.ndarray) -> bool:
    load, slip = expert_load(problem, held), 1e-9 * max(1.0, float(np.max(problem.load_weight)))
    return bool(
        (load >= problem.load_min - slip).all()
        and (load <= problem.load_max + slip).all()
        and (held.sum(axis=0) >= problem.holders_min).all()
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Tiny problems of every kind, whose bounds may contradict each other."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    clients, experts = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    fitness = rng.normal(size=(clients, experts))
    if draw(st.booleans()):
        fitness = np.round(fitness)
    fields: dict = {}
    kind = draw(st.sampled_from(["unit", "halves", "client", "pair", "nil"]))
    weight: float | np.ndarray = {"unit": 1.0, "halves": 0.5, "nil": 0.0}.get(kind, 1.0)
    if kind in ("client", "pair"):
        weight = rng.integers(1, 9, clients if kind == "client" else (clients, experts)) / 2
    low = rng.integers(-1, 3, experts) * 0.9
    high = low + rng.integers(0, 4, experts)
    for term in sorted(draw(st.sets(st.sampled_from(["balance", "diversity", "floors", "size"])))):
        fields |= {
            "balance": {"balance": rng.random()},
            "diversity": {"diversity": rng.random(), "descriptor": rng.random((clients, 2))},
            "floors": {"holders_min": rng.integers(0, 3, experts)},
            "size": {"expert_size": rng.random(experts) + 0.5},
        }[term]
    capacity = rng.integers(0, experts + 1, clients)
    return Problem(fitness, capacity, low, high, weight, **fields)


@given(problems(), st.integers(0, 2**32 - 1))
@settings(max_examples=300)
def test_any_prices_bound_every_assignment_within_the_bounds(problem: Problem, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = problem.deviation.shape[1]
    prices = Prices(
        3 * rng.normal(size=problem.experts),
        3 * rng.normal(size=(problem.experts, features)),
        rng.normal(size=problem.experts),
    )
    low, high = effective_bounds(problem)
    values = [objective(problem, held) for held in choices(problem) if is_within(problem, held)]
    for of in (prices, Prices(np.zeros(problem.experts)), Prices(np.full(problem.experts, np.nan))):
        bound = price_bound(problem, of, low, high)
        assert np.isfinite(bound)
        assert all(bound >= value - 1e-9 for value in values)


@given(problems())
@settings(max_examples=150)
def test_every_solution_is_what_it_says(problem: Problem) -> None:
    found = solve(problem, "auto")
    within = [held for held in choices(problem) if is_within(problem, held)]
    best = max((objective(problem, held) for held in within), default=None)
    assert found.value == pytest.approx(objective(problem, found.assignment))
    if found.status in ("optimal", "feasible"):
        assert best is not None
        assert found.bound >= best - 1e-7
        if found.status == "optimal":
            assert found.value >= best - 1e-5
    if found.status == "relaxed":
        assert best is None
    if best is not None:
        assert found.bound >= best - 1e-7


@given(problems(), st.integers(0, 2**32 - 1))
@settings(max_examples=150)
def test_no_solver_is_believed(problem: Problem, seed: int) -> None:
    # Any assignment and prices that a solver may return.
    rng = np.random.default_rng(seed)
    answers = choices(problem)
    held = answers[rng.integers(len(answers))]
    prices = Prices(np.exp(9 * rng.normal(size=problem.experts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine, "SOLVERS", {"auto": lambda *_: _Answer(held.copy(), (prices,), prices)}
        )
        found = solve(problem, "auto")
    within = [objective(problem, other) for other in answers if is_within(problem, other)]
    if found.status == "optimal":
        assert found.value >= max(within) - 1e-5
    if found.status == "relaxed":
        assert not within
    if within:
        assert found.bound >= max(within) - 1e-7


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_bounds_give_way_by_the_least_that_is_counted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clients, experts = rng.integers(1, 6), rng.integers(1, 4)
    low = rng.integers(0, 5, experts)
    problem = Problem(
        rng.random((clients, experts)),
        rng.integers(0, experts + 1, clients),
        low,
        low + rng.integers(0, 2, experts),
    )
    missed = [
        np.maximum(np.maximum(low - load, load - problem.load_max), 0.0).sum()
        for load in (held.sum(axis=0) for held in choices(problem))
    ]
    for held, miss in zip(choices(problem), missed, strict=True):
        assert gave_way(problem, held, None) == (miss == min(missed) > 0)
    assert solve(problem, "auto").violation.sum() == pytest.approx(min(missed))


def test_prices_of_weighted_bounds_prove_that_they_cannot_hold() -> None:
    # 3 holders who weigh 1, 2 and 3 must put 6 on two experts that take 2 each.
    problem = Problem(np.eye(3, 2), 1, 0, 2, np.array([1.0, 2.0, 3.0]))
    held = np.array([[True, False], [False, True], [True, False]])
    # At prices (1, 1) the clients pay 6 and the bounds take 4.
    assert gave_way(problem, held, Prices(np.ones(2)))
    assert not gave_way(problem, held, None)
    assert not gave_way(replace(problem, load_max=np.full(2, 3.0)), held, Prices(np.ones(2)))
    found = solve(problem, "relaxation")
    assert found.status == "relaxed"
    assert found.violation.sum() == pytest.approx(2.0)


def test_no_bound_is_above_what_is_best_without_load_bounds() -> None:
    rng = np.random.default_rng(0)
    fitness, capacity = rng.random((60, 10)), rng.integers(1, 4, 60)
    weight = 100 * rng.lognormal(0, 1, (60, 1)) * rng.random((60, 10))
    fair = (weight.mean(axis=1) * capacity).sum() / 10
    found = solve(Problem(fitness, capacity, 1.8 * fair, 2.0 * fair, weight))
    best = sum(np.sort(row)[-k:].sum() for row, k in zip(fitness, capacity, strict=True))
    assert found.status == "relaxed"
    assert found.value <= found.bound <= best * (1 + 1e-12)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (np.zeros((3, 2), bool), "capacity of client 0"),
        (np.array([[True, False], [True, True], [True, False]]), "capacity of client 1"),
        (np.ones((2, 2), bool), "wrong shape"),
        (np.eye(3, 2), "wrong shape"),
    ],
)
def test_an_answer_that_breaks_a_capacity_is_an_error(held: np.ndarray, message: str) -> None:
    with pytest.raises(SolverError, match=message):
        require_capacities(Problem(np.eye(3, 2), 1, 0, 3), held)


def test_an_answer_that_breaks_a_size_is_an_error() -> None:
    problem = Problem(np.ones((1, 3)), [1.0], 0, 3, expert_size=[0.1] * 3)
    require_capacities(replace(problem, capacity=[0.1 * 3]), np.ones((1, 3), bool))
    with pytest.raises(SolverError, match="capacity of client 0"):
        require_capacities(replace(problem, capacity=[0.25]), np.ones((1, 3), bool))
