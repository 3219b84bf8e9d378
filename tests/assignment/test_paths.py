from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.assignment import Problem, columns, equal, load_bounds, solve
from flexmoe_jax.assignment.paths import LoadCost, Optimum, augment, best_choices
from flexmoe_jax.assignment.tiles import gram, solve_symmetric


def costs(
    low: np.ndarray, high: np.ndarray, base: np.ndarray | float = 0.0, curve: float = 0.0
) -> LoadCost:
    experts = low.size
    base = np.broadcast_to(np.asarray(base, np.float64), experts)
    target = 0.5 * (low + high)
    return LoadCost(
        low.astype(float), high.astype(float), np.full(experts, 1e9), base, curve, target
    )


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.0, 0.3, 5.0, 1e-7]), st.floats(-50.0, 50.0)
)
@settings(max_examples=200)
def test_a_start_is_where_prices_are_slopes(seed: int, curve: float, price: float) -> None:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 9, 4)
    cost = costs(low, low + rng.integers(0, 9, 4), rng.integers(-3, 4, 4), curve)
    prices, load = np.full(4, np.rint(price)), rng.integers(0, 30, 4).astype(float)
    start = cost.start(prices, load)
    assert (cost.rise(start) >= prices).all()
    assert (cost.rise(start - 1) <= prices).all()
    # As many units as there is room for cost the same.
    for e in range(4):
        for sign in (1, -1):
            if sign > 0 or load[e] > 0:
                room = min(cost.room(load, e, sign), 40.0)
                first = [cost.rise(load + (0 if sign > 0 else -1))[e]]
                unit = np.eye(4)[e]
                steps = np.arange(0, room) if sign > 0 else -np.arange(1, room + 1)
                assert [cost.rise(load + step * unit)[e] for step in steps] == first * len(steps)


def test_clients_who_are_indifferent_choose_evenly() -> None:
    held = best_choices(np.zeros((1000, 8)), np.zeros(8), np.full(1000, 3))
    assert (held.sum(axis=1) == 3).all()
    assert np.abs(held.sum(axis=0) - 375).max() <= 4
    # A difference of one outweighs any turn.
    better = best_choices(np.arange(8.0) * np.ones((1000, 1)), np.zeros(8), np.full(1000, 3))
    assert better[:, 5:].all()


def start(fitness: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prices of zero, and what clients choose then."""
    prices = np.zeros(fitness.shape[1])
    return prices, best_choices(fitness, prices, capacity)


def test_ties_take_few_paths() -> None:
    # 3000 clients without preference, all alike, or of 6 kinds: thousands of holders move.
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 1000, (6, 12))[rng.integers(0, 6, 3000)].astype(float)
    alike = np.tile(rng.integers(0, 1000, 12).astype(float), (3000, 1))
    cost = costs(np.full(12, 490), np.full(12, 510))
    for fitness in (np.zeros((3000, 12)), alike, kinds):
        capacity = np.full(3000, 2)
        found = augment(fitness, capacity, cost, start(fitness, capacity))
        assert found is not None
        count = found.assignment.sum(axis=0)
        assert count.min() >= 490
        assert count.max() <= 510
        assert found.paths <= 200
        problem = Problem(fitness, 2, 490, 510)
        assert solve(problem, "auto").status == "optimal"
        relaxed = solve(problem, "relaxation")
        assert relaxed.status == "optimal"
        value = np.sum(fitness, where=found.assignment)
        assert value == pytest.approx(relaxed.value, rel=1e-9)


def test_paths_are_given_up_when_there_are_too_many() -> None:
    rng = np.random.default_rng(0)
    fitness = np.rint(1e6 * (rng.random((300, 4)) + np.array([1.0, 0.0, 0.0, 0.0])))
    cost = costs(np.full(4, 75), np.full(4, 75))
    capacity = np.ones(300, np.int64)
    begun = start(fitness, capacity)
    assert augment(fitness, capacity, cost, begun, most=20) is None
    assert isinstance(augment(fitness, capacity, cost, begun), Optimum)


@pytest.mark.parametrize("name", ["columns", "tiny", "rows", "outlier"])
def test_prices_are_found_on_any_scale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    fitness = rng.random((2000, 12))
    if name == "columns":
        fitness *= 10.0 ** np.linspace(-4, 4, 12)
    elif name == "tiny":
        fitness = rng.random((5, 12))[rng.integers(0, 5, 2000)] + 1e-8 * fitness
    elif name == "rows":
        fitness *= 10.0 ** rng.uniform(-8, 8, (2000, 1))
    else:
        fitness[0, 0] = 1e9
    capacity = rng.integers(1, 4, 2000)
    problem = Problem(fitness, capacity, *load_bounds(capacity, np.zeros(12), slack=0.0))
    paths = []

    def counted(*numbers: object) -> Optimum | None:
        found = augment(*numbers)
        paths.append(np.inf if found is None else found.paths)
        return found

    monkeypatch.setattr(equal, "augment", counted)
    found = solve(problem, "auto")
    assert found.status == "optimal"
    assert found.gap < 1e-9
    # Of 4000 holders; from the first prices there would be one for most of them.
    assert paths[-1] < 1000


@pytest.mark.parametrize("bounds", ["balanced", "wide", "beyond reach"])
@pytest.mark.parametrize("seed", range(3))
def test_a_search_among_few_clients_ends_at_the_optimum_of_all(
    bounds: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    fitness = rng.random((5, 12))[rng.integers(0, 5, 1500)] + 0.01 * rng.random((1500, 12))
    capacity = rng.integers(0, 5, 1500)
    low, high = {
        "balanced": load_bounds(capacity, np.zeros(12), slack=0.0),
        "wide": (np.zeros(12), np.full(12, 600.0)),
        "beyond reach": (np.full(12, 900.0), np.full(12, np.inf)),
    }[bounds]
    problem = Problem(fitness, capacity, low, high)
    whole = solve(problem, "paths")
    searched = []

    def counted(fitness: np.ndarray, *numbers: object) -> Optimum | None:
        searched.append(fitness.shape[0])
        return augment(fitness, *numbers)

    monkeypatch.setattr(equal, "augment", counted)
    # So few that they are not enough, and others have to come in.
    for name in ("_A_MOVE", "_FEW_CLIENTS"):
        monkeypatch.setattr(equal, name, 1)
    monkeypatch.setattr(equal, "_OF_CLIENTS", 1500)
    few = solve(problem, "paths")
    assert few.value == pytest.approx(whole.value, rel=1e-12)
    assert (few.status, few.gap < 1e-9) == (whole.status, True)
    assert few.violation.sum() == whole.violation.sum()
    if bounds == "balanced":
        assert searched[0] < searched[-1] < 1500


@pytest.mark.parametrize("name", ["equal", "levels", "dominating"])
def test_few_pairs_are_in_doubt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def counted(client: np.ndarray, *numbers: object) -> object:
        sizes.append(client.size)
        return direct(client, *numbers)

    direct = columns.solve_directly
    monkeypatch.setattr(columns, "solve_directly", counted)
    rng = np.random.default_rng(0)
    weight = rng.integers(20, 200, 3000).astype(float)
    low, high = load_bounds(np.full(3000, 2), np.zeros(12), load_weight=weight)
    fitness = {
        "equal": np.ones((3000, 12)),
        "levels": np.round(3 * rng.random((3000, 12))),
        # The clients with the least weight determine who holds the most valuable expert.
        "dominating": rng.random((3000, 12)) + 1e6 * (np.arange(12) == 0),
    }[name]
    found = solve(Problem(fitness, 2, low, high, weight), "auto")
    assert found.gap < 1e-3
    assert not found.violation.any()
    # Of 36,000 pairs.
    assert max(sizes) < 6_000


@pytest.mark.parametrize("distance", [1e3, 1e9])
def test_no_target_outweighs_bounds_that_can_be_met(distance: float) -> None:
    for sign, load in ((1, [5, 5]), (-1, [2, 8])):
        target = [sign * distance, 0.0]
        problem = Problem(np.zeros((10, 2)), 1, [2, 0], [5, 10], balance=1.0, target=target)
        found = solve(problem, "paths")
        assert found.load.tolist() == load
        assert found.status == "optimal"


@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(1, 150), st.integers(1, 70))
@settings(max_examples=60)
def test_products_and_systems_by_tiles_are_what_they_are(
    seed: int, rows: int, left: int, right: int
) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rows, left)), rng.normal(size=(rows, right))
    np.testing.assert_allclose(gram(a, b), a.T @ b, atol=1e-10)
    matrix = a.T @ a + np.eye(left)
    vector = rng.normal(size=left)
    np.testing.assert_allclose(
        solve_symmetric(matrix, vector), np.linalg.solve(matrix, vector), atol=1e-8
    )
