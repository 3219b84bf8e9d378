from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.assignment import Problem, columns, load_bounds, solve
from flexmoe_jax.assignment.problem import expert_load, load_violation
from flexmoe_jax.assignment.rebalance import rebalance


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_no_violation_grows_and_every_client_holds_as_much(seed: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    clients, experts = int(rng.integers(0, 30)), int(rng.integers(1, 6))
    capacity = rng.integers(0, experts + 1, clients)
    weight = rng.gamma(1.0, 5.0, (clients, experts)) if weighted else 1.0
    low, high = np.sort(rng.random((2, experts)) * clients * 3, axis=0)
    problem = Problem(rng.normal(size=(clients, experts)), capacity, low, high, weight)
    held = np.argsort(rng.random((clients, experts)), axis=1) < capacity[:, None]
    found = rebalance(problem, problem.fitness, held, low, high)
    assert (found.sum(axis=1) == capacity).all()
    before, after = (load_violation(problem, expert_load(problem, h)) for h in (held, found))
    assert (after <= before + 1e-9).all()


def test_a_crowd_spreads_by_the_cheapest_swaps() -> None:
    # Five on expert 0, which takes two; expert 1 has room for three, expert 2 for one. Moving to 1
    # costs clients 0 to 4 as much as their number, moving to 2 ten times that.
    costs = np.arange(5.0)
    worth = np.stack([np.zeros(5), -costs, -10 * costs], axis=1)
    problem = Problem(worth, 1, [0, 0, 0], [2, 3, 1])
    held = np.arange(3) == np.zeros((5, 1))
    found = rebalance(problem, worth, held, problem.load_min, problem.load_max)
    assert found.argmax(axis=1).tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("slack", [0.02, 0.1])
def test_even_where_nobody_cares_weighted_bounds_are_met_with_few_pairs(
    slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def counted(client: np.ndarray, *numbers: object) -> object:
        sizes.append(client.size)
        return direct(client, *numbers)

    direct = columns.solve_directly
    monkeypatch.setattr(columns, "solve_directly", counted)
    rng = np.random.default_rng(0)
    capacity, weight = rng.integers(1, 5, 3000), rng.integers(20, 200, 3000).astype(float)
    low, high = load_bounds(capacity, np.zeros(12), load_weight=weight, slack=slack)
    found = solve(Problem(np.ones((3000, 12)), capacity, low, high, weight), "auto")
    assert found.status == "optimal"
    assert max(sizes) < 3_000


def test_the_relaxation_is_exact_where_ties_are_many() -> None:
    rng = np.random.default_rng(0)
    capacity = rng.integers(1, 4, 3000)
    low, high = load_bounds(capacity, np.zeros(12), slack=0.0)
    for fitness in (
        np.round(4 * rng.random((3000, 12))),
        np.tile(rng.random(12), (3000, 1)),
        rng.random((5, 12))[rng.integers(0, 5, 3000)],
    ):
        problem = Problem(fitness, capacity, low, high)
        relaxed, exact = (solve(problem, name) for name in ("relaxation", "paths"))
        assert relaxed.status == exact.status == "optimal"
        assert relaxed.value == pytest.approx(exact.value, rel=1e-12)
