from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.assignment.polish import polish
from flexmoe_jax.assignment.problem import Problem, expert_load, load_violation, objective
from flexmoe_jax.assignment.rounding import round_shmoys_tardos


@st.composite
def fractions(draw: st.DrawFn) -> tuple[Problem, np.ndarray]:
    """A problem and any point of its relaxation: a mean of assignments, so far from a vertex."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    clients, experts = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    capacity = rng.integers(0, experts + 1, clients)
    order = rng.random((draw(st.integers(1, 4)), clients, experts)).argsort(axis=2)
    x = (order < capacity[:, None]).mean(axis=0)
    weight = rng.gamma(1.0, 10.0, (clients, experts))
    low, high = np.sort(rng.random((2, experts)) * weight.sum(axis=0), axis=0)
    return Problem(rng.normal(size=(clients, experts)), capacity, low, high, weight), x


@given(fractions())
@settings(max_examples=200, deadline=None)
def test_rounding_keeps_its_three_promises(case: tuple[Problem, np.ndarray]) -> None:
    problem, x = case
    held = round_shmoys_tardos(problem, x)
    assert (held.sum(axis=1) == problem.capacity).all()
    assert objective(problem, held) >= np.sum(problem.fitness * x) - 1e-6
    fractional = (x > 0) & (x < 1)
    heaviest = np.max(problem.weights, axis=0, where=fractional, initial=0.0)
    off = np.abs(expert_load(problem, held) - (problem.weights * x).sum(axis=0))
    assert (off <= heaviest + 1e-6).all()


@given(fractions(), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_polish_never_makes_it_worse(case: tuple[Problem, np.ndarray], budget: float) -> None:
    problem, x = case
    held = round_shmoys_tardos(problem, x)
    value = objective(problem, held)
    before = load_violation(problem, expert_load(problem, held))
    prices = np.zeros(problem.experts)
    for least in (value, value - budget):
        better = polish(problem, held, prices, least)
        after = load_violation(problem, expert_load(problem, better))
        assert (better.sum(axis=1) == problem.capacity).all()
        assert (after <= before + 1e-6).all()
        assert objective(problem, better) >= least - 1e-6


def test_polish_finds_an_exchange_that_no_single_swap_finds() -> None:
    # Bounds of one holder each forbid single swaps; exchanging both experts wins 2.
    problem = Problem([[0.0, 1.0], [1.0, 0.0]], 1, 1, 1)
    held = np.array([[True, False], [False, True]])
    assert polish(problem, held, np.zeros(2), 0.0).tolist() == [[False, True], [True, False]]
