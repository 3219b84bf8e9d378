from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.assignment import Problem, Request, Solution, load_bounds, make_policy, solve
from flexmoe_jax.assignment.scaling import rescale
from flexmoe_jax.errors import InputError

SOLVERS = ("auto", "relaxation", "flow", "dual")
# One shape, so that the device's solver compiles once for each kind of weights.
CLIENTS, EXPERTS = 15, 4


def draw(seed: int, kind: str) -> Problem:
    rng = np.random.default_rng(seed)
    capacity = rng.integers(1, 4, CLIENTS)
    fitness = rng.random((CLIENTS, EXPERTS))
    weight: float | np.ndarray = 1.0
    if kind == "weighted":
        weight = rng.gamma(2.0, 20.0, (CLIENTS, EXPERTS))
    low, high = load_bounds(capacity, np.zeros(EXPERTS), load_weight=weight)
    fields: dict = {}
    if kind == "diverse":
        fields = {"descriptor": rng.dirichlet(np.ones(3), CLIENTS), "diversity": 0.05}
    if kind == "balanced":
        low, high = np.zeros(EXPERTS), np.full(EXPERTS, np.inf)
        fields = {"balance": 0.02}
    return Problem(fitness, capacity, low, high, weight, **fields)


def times_worth(problem: Problem, factor: float) -> Problem:
    return replace(
        problem,
        fitness=problem.fitness * factor,
        balance=problem.balance * factor,
        diversity=problem.diversity * factor,
    )


def times_load(problem: Problem, factor: float) -> Problem:
    return replace(
        problem,
        load_weight=np.asarray(problem.load_weight) * factor,
        load_min=problem.load_min * factor,
        load_max=problem.load_max * factor,
        balance=problem.balance / factor**2,
    )


def assert_alike(found: Solution, plain: Solution) -> None:
    assert (found.assignment == plain.assignment).all()
    assert found.status == plain.status
    assert found.gap == pytest.approx(plain.gap, rel=1e-5, abs=1e-9)


KINDS = ("equal", "weighted", "balanced", "diverse")
TAKEN = [
    (solver, kind)
    for solver in SOLVERS
    for kind in KINDS
    if (solver != "flow" or kind == "equal") and (solver, kind) != ("dual", "balanced")
]
FACTORS = st.one_of(
    st.sampled_from([1e-300, 1e-19, 1e150, 1e304, 2.0**-70, 3.0]),
    st.floats(-280, 280).map(lambda power: 10.0**power),
)


@pytest.mark.parametrize(("solver", "kind"), TAKEN)
def test_the_unit_of_fitness_changes_nothing(solver: str, kind: str) -> None:
    @given(st.integers(0, 2**32 - 1), FACTORS)
    @settings(max_examples=15)
    def check(seed: int, factor: float) -> None:
        problem = draw(seed, kind)
        plain, scaled = solve(problem, solver), solve(times_worth(problem, factor), solver)
        assert_alike(scaled, plain)
        assert scaled.value == pytest.approx(plain.value * factor, rel=1e-12)

    check()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_unit_of_load_changes_nothing(solver: str) -> None:
    @given(st.integers(0, 2**32 - 1), st.floats(-100, 100).map(lambda power: 10.0**power))
    @settings(max_examples=10)
    def check(seed: int, factor: float) -> None:
        problem = draw(seed, "equal" if solver == "flow" else "weighted")
        assert_alike(solve(times_load(problem, factor), solver), solve(problem, solver))

    check()


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(KINDS),
    st.integers(-(2**30), 2**30),
)
@settings(max_examples=30)
def test_constants_in_rows_change_no_assignment(seed: int, kind: str, constant: int) -> None:
    problem = draw(seed, kind)
    # Numbers whose sums with the constants are exact.
    problem = replace(problem, fitness=np.rint(problem.fitness * 2**20) / 2**20)
    rows = constant * np.random.default_rng(seed).integers(0, 2, (CLIENTS, 1))
    for solver in ("auto", "relaxation"):
        plain = solve(problem, solver)
        shifted = solve(replace(problem, fitness=problem.fitness + rows), solver)
        assert (shifted.assignment == plain.assignment).all()
        assert shifted.bound - shifted.value == pytest.approx(
            plain.bound - plain.value, abs=1e-15 * abs(shifted.value) + 1e-12
        )


@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
@settings(max_examples=20)
def test_the_order_of_clients_changes_nothing(seed: int, kind: str) -> None:
    problem = draw(seed, kind)
    order = np.random.default_rng(seed).permutation(CLIENTS)
    weight, descriptor = np.asarray(problem.load_weight), problem.descriptor
    turned = replace(
        problem,
        fitness=problem.fitness[order],
        capacity=problem.capacity[order],
        load_weight=weight[order] if weight.ndim else weight,
        descriptor=None if descriptor is None else descriptor[order],
    )
    plain, found = solve(problem, "auto"), solve(turned, "auto")
    assert (found.assignment == plain.assignment[order]).all()
    assert found.gap == pytest.approx(plain.gap, abs=1e-12)


def test_scaled_numbers_are_near_one_and_differ_by_powers_of_two() -> None:
    scaled, exponent = rescale(times_load(times_worth(draw(0, "balanced"), 2.0**300), 2.0**-40))
    again, plain = rescale(draw(0, "balanced"))
    assert exponent == plain + 300
    assert 0.5 <= np.abs(scaled.fitness).max() < 1
    assert (scaled.fitness == again.fitness).all()
    assert scaled.balance == again.balance
    assert scaled.load_weight == again.load_weight == 1.0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"fitness": np.full((3, 2), 1e308)}, "fitness"),
        ({"fitness": np.array([[1.7e308, -1.7e308]] * 3)}, "fitness"),
        ({"load_weight": 1e308}, "load_weight"),
        ({"balance": 1e308}, "balance"),
        ({"balance": 1.0, "target": 1e308}, "target"),
        ({"descriptor": np.full((3, 2), 1e308), "diversity": 1.0}, "descriptor"),
        ({"descriptor": np.eye(3), "diversity": 1e308}, "diversity"),
    ],
)
def test_numbers_whose_sums_overflow_are_refused(fields: dict, field: str) -> None:
    good = {"fitness": np.eye(3, 2), "capacity": 1, "load_min": 0, "load_max": 2}
    with pytest.raises(InputError, match="overflow") as error:
        Problem(**{**good, **fields})
    assert error.value.field == field
    assert "\n" not in str(error.value)


def test_one_huge_number_costs_the_others_no_digits() -> None:
    rng = np.random.default_rng(0)
    fitness = rng.random((40, 6))
    fitness[0, 0] = 1e9
    problem = Problem(fitness, 1, 6, 7)
    found = solve(problem, "auto")
    # The huge value is won in any case; the rest is solved as well as without it.
    rest = solve(replace(problem, fitness=np.where(fitness > 1, 1e3, fitness)), "auto")
    assert (found.assignment == rest.assignment).all()


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_ties_fall_alike_in_any_unit(factor: float) -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 3, (20, 6)) / 4
    policy = make_policy("flex")
    found = [
        policy(Request(worth, np.full(20, 2), np.arange(20), 0, 0))
        for worth in (levels, levels * factor, np.ones((20, 6)), np.full((20, 6), factor))
    ]
    assert (found[0].assignment == found[1].assignment).all()
    assert (found[2].assignment == found[3].assignment).all()
    # No tie-breaker outweighs a difference: as much is won as without any.
    low, high = load_bounds(np.full(20, 2), np.zeros(6))
    exact = solve(Problem(levels * factor, 2, low, high), "paths")
    assert found[1].value == pytest.approx(exact.value, rel=1e-12)
