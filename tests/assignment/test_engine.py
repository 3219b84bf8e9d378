from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize

from flexmoe_jax.assignment import Problem, Solution, load_bounds, solve
from flexmoe_jax.errors import InputError

# Few shapes, so that the device solver compiles few times; all instances have C ≤ 12, E ≤ 6, and
# every sixth is of the largest, for which branch and bound takes long.
SHAPES = [(5, 3), (8, 4), (5, 3), (8, 4), (8, 4), (12, 6)]
LOADS = ["clients", "samples", "usage"]


def draw(index: int) -> tuple[str, Problem]:
    rng = np.random.default_rng([7, index])
    load = LOADS[index % 3]
    clients, experts = SHAPES[(index // 3) % 6]
    capacity = rng.integers(1, min(4, experts) + 1, clients)
    fitness = rng.random((clients, experts))
    if index % 5 == 0:
        fitness = np.round(fitness * 4) / 4
    weight: float | np.ndarray = 1.0
    if load == "samples":
        weight = rng.integers(10, 100, clients).astype(float)
    elif load == "usage":
        weight = rng.gamma(2.0, 20.0, (clients, experts))
    slack = (0.0, 0.1, 0.3, 1.0)[index % 4]
    low, high = load_bounds(capacity, np.zeros(experts), slack=slack, load_weight=weight)
    return load, Problem(fitness, capacity, low, high, weight)


def true_optimum(problem: Problem) -> float | None:
    """Value of the best assignment within the bounds, by branch and bound; None without one."""
    clients, experts = problem.fitness.shape
    rows = np.kron(np.eye(clients), np.ones((1, experts)))
    loads = np.zeros((experts, clients * experts))
    for e in range(experts):
        loads[e, e::experts] = problem.weights[:, e]
    found = scipy.optimize.milp(
        -problem.fitness.ravel(),
        constraints=[
            scipy.optimize.LinearConstraint(rows, problem.capacity, problem.capacity),
            scipy.optimize.LinearConstraint(
                loads, problem.load_min - 1e-9, problem.load_max + 1e-9
            ),
        ],
        integrality=np.ones(clients * experts),
        bounds=scipy.optimize.Bounds(0, 1),
    )
    return None if found.x is None else float(-found.fun)


def check(problem: Problem, found: Solution, best: float | None) -> None:
    assert (found.assignment.sum(axis=1) == problem.capacity).all()
    np.testing.assert_allclose(
        found.load, (problem.weights * found.assignment).sum(axis=0), atol=1e-9
    )
    assert found.value == pytest.approx(np.sum(problem.fitness, where=found.assignment))
    assert (found.violation <= problem.weights.max(axis=0) + 1e-9).all()
    assert found.gap >= 0
    if best is not None:
        assert found.bound >= best - 1e-7
    if not found.violation.any():
        assert found.value <= found.bound + 1e-7


def test_every_solver_against_the_true_optimum() -> None:
    gaps: dict[str, list[float]] = {}
    for index in range(36):  # Two of each load and shape.
        load, problem = draw(index)
        best = true_optimum(problem)
        exact = ["flow", "paths"] if load == "clients" else []
        for solver in ("relaxation", "auto", "dual", *exact):
            found = solve(problem, solver)
            check(problem, found, best)
            if best is not None:
                gap = max(best - found.value, 0.0) / abs(best)
                gaps.setdefault(f"{load} {solver}", []).append(gap)
            if load == "clients":
                assert not found.violation.any()
                assert best is not None
    for solver in ("relaxation", "flow", "paths", "auto"):
        assert max(gaps[f"clients {solver}"]) <= 1e-6
    for load in ("samples", "usage"):
        for solver in ("relaxation", "auto", "dual"):
            assert np.median(gaps[f"{load} {solver}"]) <= 0.005
            assert max(gaps[f"{load} {solver}"]) <= 0.05


def test_three_exact_solvers_agree_where_bounds_give_way() -> None:
    for index in range(20):
        rng = np.random.default_rng([8, index])
        fitness, capacity = rng.random((8, 4)), rng.integers(1, 4, 8)
        low = rng.integers(0, 9, 4)
        problem = Problem(fitness, capacity, low, low + rng.integers(0, 2, 4))
        answers = [solve(problem, name) for name in ("relaxation", "paths", "flow")]
        assert len({round(float(a.violation.sum()), 6) for a in answers}) == 1
        values = [a.value for a in answers]
        assert max(values) - min(values) < 1e-6
        assert all(a.bound >= a.value - 1e-6 for a in answers)


def test_large_relaxation_equals_exact_optimum() -> None:
    # More pairs than the full linear program accepts: the one over the undecided pairs is used.
    rng = np.random.default_rng(3)
    fitness = 0.5 * rng.random((3000, 8)) + 0.5 * rng.random(8) ** 2
    capacity = rng.integers(1, 5, 3000)
    low, high = load_bounds(capacity, np.zeros(8), slack=0.05)
    problem = Problem(fitness, capacity, low, high)
    exact, relaxed = solve(problem, "paths"), solve(problem, "relaxation")
    assert relaxed.value == pytest.approx(exact.value, rel=1e-7)
    assert exact.status == relaxed.status == "optimal"
    device = solve(problem, "dual")
    assert device.gap <= 1e-3
    assert not device.violation.any()


def test_large_weighted_problem_is_certified_and_within_bounds() -> None:
    rng = np.random.default_rng(4)
    fitness = 0.5 * rng.random((3000, 8)) + 0.5 * rng.random(8) ** 2
    capacity, weight = rng.integers(1, 5, 3000), rng.integers(20, 200, 3000).astype(float)
    low, high = load_bounds(capacity, np.zeros(8), slack=0.05, load_weight=weight)
    found = solve(Problem(fitness, capacity, low, high, weight), "auto")
    assert found.gap <= 0.01
    assert not found.violation.any()


def test_violation_weights_choose_what_gives_way() -> None:
    # 3 holders, room for 1 on each of 2 experts: the excess goes where it weighs less.
    for solver in ("relaxation", "paths", "flow"):
        for cheap in (0, 1):
            weight = np.where(np.arange(2) == cheap, 1.0, 5.0)
            problem = Problem(np.zeros((3, 2)), 1, 0, 1, violation_weight=weight)
            assert solve(problem, solver).violation.tolist() == [1 - cheap, cheap]


def test_floors_hold_under_every_load() -> None:
    rng = np.random.default_rng(5)
    fitness = rng.random((10, 4)) + np.array([2.0, 1.0, 0.0, 0.0])
    for weight in (1.0, rng.integers(10, 99, 10).astype(float)):
        for solver in ("relaxation", "auto"):
            found = solve(Problem(fitness, 1, 0, np.inf, weight, holders_min=2), solver)
            assert found.assignment.sum(axis=0).min() >= 2
            assert found.gap < 1e-6


def test_balance_trades_fitness_for_even_loads() -> None:
    # Worth of loads (n, 4 - n) on fitness (1, 0): n - μ((n - 2)² + (2 - n)²) = n - 2μ(n - 2)².
    # μ = 0.25: n = 2, 3, 4 give 2, 2.5, 2. So three clients take expert 0.
    for solver in ("relaxation", "paths", "auto"):
        problem = Problem([[1.0, 0.0]] * 4, 1, 0, np.inf, target=[2.0, 2.0], balance=0.25)
        found = solve(problem, solver)
        assert found.load.tolist() == [3, 1]
        assert found.value == pytest.approx(2.5)
        assert found.bound >= 2.5 - 1e-6


def test_diversity_mixes_the_holders() -> None:
    # Two kinds of clients, each slightly fitter for its own expert. Kinds apart, the deviations
    # of 2 holders sum to 2 · 0.5 in each of 2 features and experts: 4 in all; mixed, to nothing.
    kind = np.array([0, 0, 1, 1])
    fitness = 1.0 + 0.1 * np.eye(2)[kind]
    descriptor = np.eye(2)[kind]
    for solver in ("relaxation", "dual", "auto"):
        apart = solve(Problem(fitness, 1, 2, 2, descriptor=descriptor, diversity=0.0), solver)
        mixed = solve(Problem(fitness, 1, 2, 2, descriptor=descriptor, diversity=0.2), solver)
        assert apart.value == pytest.approx(4.4)
        assert np.abs(mixed.assignment.T @ (descriptor - 0.5)).sum() == 0
        assert mixed.value == pytest.approx(4.2)
        assert mixed.bound >= 4.2 - 1e-6


def test_sizes_make_a_knapsack_of_every_client() -> None:
    # Sizes 2, 3, 4 in room for 5: experts 0 and 1 (worth 5.3), not the dearer 2 (worth 4) alone.
    problem = Problem([[2.2, 3.1, 4.0]], [5.0], 0, np.inf, expert_size=[2.0, 3.0, 4.0])
    found = solve(problem)
    assert found.assignment.tolist() == [[True, True, False]]
    rng = np.random.default_rng(6)
    size, room = rng.random(6) + 0.5, 3 * rng.random(12) + 0.5
    found = solve(Problem(rng.random((12, 6)), room, 0, 5, expert_size=size), "auto")
    assert (found.assignment @ size <= room + 1e-9).all()
    assert not found.violation.any()
    assert found.bound >= found.value


@pytest.mark.parametrize(
    ("fitness", "fields", "held"),
    [
        # The first holder of each expert costs 1, and is worth 0.1.
        ([[0.1, 0.1]], {"balance": 1.0, "target": 0.0}, [[0, 0]]),
        # The second client makes up for the deviation of the first, 0.5, but is worth -1.
        ([[0.1], [-1.0]], {"diversity": 1.0, "descriptor": [[1.0], [0.0]]}, [[0], [0]]),
        # The optimum of the relaxation holds one half of each pair.
        ([[-1.0], [-1.0]], {"balance": 1e-3, "holders_min": 1}, [[1], [0]]),
    ],
)
def test_free_capacity_is_filled_only_where_it_helps(
    fitness: list, fields: dict, held: list
) -> None:
    experts = len(fitness[0])
    problem = Problem(fitness, experts, 0, np.inf, expert_size=np.ones(experts), **fields)
    found = solve(problem)
    assert found.assignment.tolist() == held
    assert found.status == "optimal"


@pytest.mark.parametrize(
    ("capacity", "size"),
    [
        # Each time, the most valuable expert is larger than the capacity: by far less than the
        # largest expert, by less than the smallest fraction, and by most of the capacity.
        (1e-6, [1.0, 1e-6, 1.0005e-6]),
        (1.0, [1.0, 1.0, 1.0000001]),
        (1e-13, [1.0, 1e-13, 5e-13]),
    ],
)
def test_an_expert_that_is_slightly_too_large_is_not_held(
    capacity: float, size: list[float]
) -> None:
    found = solve(Problem([[0.0, 1.0, 2.0]], [capacity], 0, np.inf, expert_size=size))
    assert found.assignment.tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("name", "field", "near"),
    [("relaxtion", "assignment.solver", "relaxation"), ("dua", "assignment.solver", "dual")],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, field: str, near: str) -> None:
    with pytest.raises(InputError, match=f"did you mean {near}") as error:
        solve(Problem(np.zeros((1, 1)), 1, 0, 1), name)
    assert error.value.field == field
    with pytest.raises(InputError, match="shmoys_tardos"):
        solve(Problem(np.zeros((1, 1)), 1, 0, 1), rounding="up")


def test_solvers_refuse_what_they_cannot_take() -> None:
    weighted = Problem(np.ones((2, 2)), 1, 0, 9, [1.0, 2.0])
    for solver in ("paths", "flow"):
        with pytest.raises(InputError, match="takes no weights that differ; use auto"):
            solve(weighted, solver)
    sized = Problem(np.ones((2, 2)), [1.0, 1.0], 0, 9, expert_size=[1.0, 1.0])
    for solver in ("paths", "flow", "dual", "greedy", "random", "round_robin"):
        with pytest.raises(InputError, match="sizes"):
            solve(sized, solver)


@pytest.mark.parametrize("backend", ["CLARABEL", "SCIPY", "SCS"])
def test_any_cvxpy_solver_answers_the_same(backend: str) -> None:
    problem = weighted_problem()
    best, other = solve(problem, "relaxation"), solve(problem, "relaxation", backend=backend)
    assert other.bound == pytest.approx(best.bound, rel=1e-3)
    assert other.bound >= best.value
    assert other.gap <= best.gap + 0.01


def test_a_backend_that_cannot_is_refused() -> None:
    problem = weighted_problem()
    curved = replace(problem, balance=0.01)
    for given, backend, remedy in (
        (problem, "HIGH", "give one of"),
        (curved, "SCS", "too inexact"),
        (curved, "SCIPY", "Try CLARABEL"),
    ):
        with pytest.raises(InputError, match=f"assignment.backend={backend}: .*{remedy}"):
            solve(given, "relaxation", backend=backend)


def test_flow_without_or_tools_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"assignment\.solver=flow: .*flexmoe_jax\[flow\]"):
        solve(Problem(np.eye(3), np.ones(3, int), np.zeros(3), np.ones(3)), "flow")


def weighted_problem() -> Problem:
    rng = np.random.default_rng(3)
    fitness, capacity = rng.random((20, 5)), rng.integers(1, 4, 20)
    weight = rng.integers(5, 50, 20).astype(float)
    return Problem(
        fitness, capacity, *load_bounds(capacity, np.zeros(5), load_weight=weight), weight
    )
