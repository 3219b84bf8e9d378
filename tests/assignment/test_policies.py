from __future__ import annotations

from dataclasses import replace

import cvxpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.assignment import (
    POLICIES,
    Request,
    Solution,
    as_solution,
    load_bounds,
    make_policy,
    update_deficit,
)
from flexmoe_jax.errors import InputError


def favouring_few(seed: int, clients: int = 20, experts: int = 8) -> np.ndarray:
    """Returns a fitness matrix in which most clients prefer the same few experts."""
    rng = np.random.default_rng(seed)
    return 0.5 * rng.random((clients, experts)) + 0.5 * (np.arange(experts) < 2)


def request(seed: int = 0, **fields: object) -> Request:
    rng = np.random.default_rng(seed)
    values = {
        "fitness": favouring_few(seed),
        "capacity": rng.integers(1, 5, 20),
        "clients": rng.permutation(50)[:20],
        "round": 3,
        "seed": 11,
        "usage": rng.integers(0, 9, (20, 8)).astype(float),
        "deficit": rng.permutation(np.arange(8) - 3.5),
    }
    return Request(**{**values, **fields})


def cumulative_cv(name: str, fitness: np.ndarray, capacity: np.ndarray, seed: int) -> float:
    policy = make_policy(name)
    deficit, total = np.zeros(8), np.zeros(8)
    for turn in range(40):
        found = policy(Request(fitness, capacity, np.arange(20), turn, seed, deficit=deficit))
        deficit, total = update_deficit(deficit, found.load), total + found.load
    return float(total.std() / total.mean())


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=15, deadline=None)
def test_flex_evens_out_what_greedy_does_not(seed: int, mixed: bool) -> None:
    capacity = np.random.default_rng(seed).integers(1, 5, 20) if mixed else np.full(20, 2)
    fitness = favouring_few(seed)
    flex = cumulative_cv("flex", fitness, capacity, seed % 1000)
    greedy = cumulative_cv("greedy", fitness, capacity, seed % 1000)
    assert flex <= 0.02
    assert greedy >= 10 * max(flex, 0.02)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_order_of_the_cohort_changes_nothing(name: str) -> None:
    given_order = request()
    order = np.random.default_rng(1).permutation(20)
    shuffled = replace(
        given_order,
        fitness=given_order.fitness[order],
        capacity=given_order.capacity[order],
        clients=given_order.clients[order],
        usage=given_order.usage[order],
    )
    policy = make_policy(name)
    first, second = policy(given_order), policy(shuffled)
    assert (first.assignment[order] == second.assignment).all()
    assert first.load.tolist() == second.load.tolist()
    holds = np.full(20, 8) if name == "full" else given_order.capacity
    assert (first.assignment.sum(axis=1) == holds).all()


def test_flex_breaks_ties_alike_in_any_order() -> None:
    flat = request(fitness=np.full((20, 8), 0.5))
    order = np.arange(20)[::-1]
    turned = replace(flat, capacity=flat.capacity[order], clients=flat.clients[order])
    for solver in ("auto", "relaxation"):
        policy = make_policy("flex", solver=solver)
        assert (policy(flat).assignment[order] == policy(turned).assignment).all()


def test_static_stays_whatever_the_round_and_the_cohort_and_random_does_not() -> None:
    now, later = request(), request(round=4)
    fewer = Request(*(getattr(now, f)[5:] for f in ("fitness", "capacity", "clients")), 9, 11)
    static, random = make_policy("static"), make_policy("random")
    assert (static(now).assignment == static(later).assignment).all()
    assert (static(now).assignment[5:] == static(fewer).assignment).all()
    assert (random(now).assignment != random(later).assignment).any()
    assert (random(now).assignment == random(request()).assignment).all()


def test_round_robin_by_hand() -> None:
    # Client 6 of capacity 3 in round 3 of 8 experts: (6 + 3 + 0, 1, 2) mod 8 = 1, 2, 3.
    found = make_policy("round_robin")(
        Request(np.zeros((1, 8)), np.array([3]), np.array([6]), 3, 0)
    )
    assert np.flatnonzero(found.assignment[0]).tolist() == [1, 2, 3]


def test_greedy_goes_by_fitness_and_greedy_usage_by_use() -> None:
    asked = Request(
        np.array([[0.1, 0.9, 0.5]]),
        np.array([2]),
        np.array([4]),
        0,
        0,
        usage=np.array([[7.0, 1.0, 3.0]]),
        held_rounds=np.array([[7, 1, 2]]),
    )
    assert make_policy("greedy")(asked).assignment.tolist() == [[False, True, True]]
    # 1, 1 and 1.5 examples a round; then 7, 1 and 3.
    assert make_policy("greedy_usage")(asked).assignment[0, 2]
    once = replace(asked, held_rounds=np.ones((1, 3), int))
    assert make_policy("greedy_usage")(once).assignment.tolist() == [[True, False, True]]
    # Experts that were never tried come first.
    untried = replace(asked, held_rounds=np.array([[7, 0, 2]]))
    assert make_policy("greedy_usage")(untried).assignment.tolist() == [[False, True, True]]


def test_a_policy_of_ones_own_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(request: Request) -> Solution:
        return as_solution(request, np.arange(8) < np.asarray(request.capacity)[:, None])

    monkeypatch.setitem(POLICIES, "first", first)
    found = make_policy("first")(request())
    assert (found.load[:1] == 20).all()
    assert found.bound >= found.value


def test_greedy_ties_are_fair() -> None:
    clients = np.arange(4000)
    asked = Request(np.zeros((4000, 4)), np.ones(4000, int), clients, 0, 5)
    # 4000 draws of 1 in 4: 1000 each, give or take 4 standard deviations of 27.
    assert np.abs(make_policy("greedy")(asked).load - 1000).max() < 110


def test_exploration_changes_holders_within_the_bounds() -> None:
    # One expert is worth more to each client than exploration can make up for; the rest are alike.
    rng = np.random.default_rng(0)
    favourite = np.arange(16) % 8
    fitness = 0.1 * rng.random((16, 8)) + 2.0 * (favourite[:, None] == np.arange(8))
    options = {"fitness": fitness, "capacity": np.full(16, 2), "clients": np.arange(16)}
    options |= {"deficit": None, "usage": None}

    def assign(exploration: float, turn: int, rounds: int = 0) -> np.ndarray:
        policy = make_policy("flex", exploration=exploration, exploration_rounds=rounds)
        return policy(request(**options, round=turn)).assignment

    stays, moves = ([assign(width, turn) for turn in range(4)] for width in (0.0, 1.0))
    assert all((held == stays[0]).all() for held in stays)
    assert len({held.tobytes() for held in moves}) == 4
    for held in moves:
        assert (held.sum(axis=1) == 2).all()
        assert (held.sum(axis=0) == 4).all()
        assert held[np.arange(16), favourite].all()
    assert (assign(1.0, 2) == moves[2]).all()
    # Half of 2 is left after 4 of 8 rounds, nothing from the eighth on.
    assert (assign(2.0, 4, rounds=8) == assign(1.0, 4)).all()
    assert (assign(1.0, 0, rounds=8) == moves[0]).all()
    for turn in (8, 9, 100):
        assert (assign(1.0, turn, rounds=8) == stays[0]).all()
    # Nobody moves by chance once it is known who is alike.
    settled = request(**options, round=2, explore=False)
    assert (make_policy("flex", exploration=1.0)(settled).assignment == stays[0]).all()


def test_flex_options_reach_the_problem() -> None:
    share = np.array([2.0, 1, 1, 1, 1, 1, 1, 1])
    asked = request(deficit=None, capacity=np.full(20, 2))
    # 40 holders, of which 2/9 are 8.9 and 1/9 is 4.4.
    load = make_policy("flex", share=share, slack=0.0)(asked).load
    assert load[0] in (8, 9)
    assert set(load[1:]) <= {4, 5}
    floors = make_policy("flex", slack=5.0, holders_min=3)(asked).load
    assert floors.min() >= 3
    labels = np.eye(4)[np.arange(20) % 4]
    mixed = make_policy("flex", diversity=0.2)(replace(asked, descriptor=labels)).assignment
    plain = make_policy("flex")(asked).assignment
    deviation = [np.abs(a.T @ (labels - 0.25)).sum() for a in (mixed, plain)]
    assert deviation[0] < deviation[1]


def test_movement_costs_the_same_for_zeros_and_ones() -> None:
    held = np.random.default_rng(4).random((20, 8)) < 0.5
    policy = make_policy("flex", movement=0.3)
    of_bools = policy(request(held=held))
    for kind in (np.int64, np.uint8, np.float64):
        found = policy(request(held=held.astype(kind)))
        assert (found.assignment == of_bools.assignment).all()
        assert found.value == of_bools.value
    for bad in (held[:, :3], np.where(held, 0.5, 0.0)):
        with pytest.raises(InputError) as error:
            policy(request(held=bad))
        assert error.value.field == "held"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "flexx"}, "assignment.policy"),
        ({"name": "flex", "solver": "magic"}, "assignment.solver"),
        ({"name": "flex", "rounding": "up"}, "assignment.rounding"),
        ({"name": "flex", "backend": "NONE"}, "assignment.backend"),
        ({"name": "flex", "slack": -0.1}, "assignment.slack"),
        ({"name": "flex", "diversity": -1.0}, "assignment.diversity"),
        ({"name": "flex", "time_limit": -1.0}, "assignment.time_limit"),
        ({"name": "flex", "balance": 1e300}, "assignment.balance"),
        ({"name": "flex", "exploration": np.inf}, "assignment.exploration"),
        ({"name": "flex", "movement": np.nan}, "assignment.movement"),
        ({"name": "flex", "share": np.array([1.0, -1.0])}, "assignment.share"),
    ],
)
def test_bad_options_are_refused_before_any_round(fields: dict, field: str) -> None:
    with pytest.raises(InputError) as error:
        make_policy(**fields)
    assert error.value.field == field


def test_bounds_follow_the_deficit_by_hand() -> None:
    # 4 clients of 2 on 4 experts: 2 each. Expert 0 is owed 1: target 3, and 2 ± 0.2 shifted.
    low, high = load_bounds(np.full(4, 2), np.array([1.0, -1.0, 0.0, 0.0]), slack=0.1)
    assert low.tolist() == high.tolist() == [3, 1, 2, 2]
    # Owed more than 4 clients can hold: 4, and the others share the other 4 evenly.
    low, high = load_bounds(np.full(4, 2), np.array([6.0, -2.0, -2.0, -2.0]), slack=0.0)
    assert (low[0], high[0]) == (4, 4)
    assert low[1:].tolist() == [1, 1, 1]
    assert high[1:].tolist() == [2, 2, 2]
    # Samples: 30 · 1 + 10 · 2 = 50 on 2 experts, 10 % either side of 25.
    low, high = load_bounds(np.array([1, 2]), np.zeros(2), load_weight=np.array([30.0, 10.0]))
    np.testing.assert_allclose([low, high], [[22.5, 22.5], [27.5, 27.5]])


def test_bounds_even_out_the_load_of_others_by_hand() -> None:
    # 10 holders there and 2 clients of 3 that come: 4 each, so 2, 4, 0 and 0 are lacking; expert 1
    # can get no more than 2, and the two that are left over go to those that lack least.
    there = np.array([2.0, 0.0, 4.0, 4.0])
    low, high = load_bounds(np.full(2, 3), np.zeros(4), slack=0.0, load=there)
    assert (low[:2].tolist(), high[:2].tolist()) == ([2, 2], [2, 2])
    assert (low[2:] <= 1).all()
    assert (high[2:] >= 1).all()
    # Slack is of the sum: one newcomer is free where 48 holders are even within 10 % of 12.25.
    low, high = load_bounds(np.ones(1, int), np.zeros(4), slack=0.1, load=np.full(4, 12.0))
    assert (low.tolist(), high.tolist()) == ([0] * 4, [1] * 4)
    nobody = load_bounds(np.full(4, 2), np.zeros(4), load=np.zeros(4))
    assert np.array_equal(nobody, load_bounds(np.full(4, 2), np.zeros(4)))


@given(st.integers(0, 2**32 - 1), st.floats(0, 2))
@settings(max_examples=200, deadline=None)
def test_bounds_of_counts_can_be_met(seed: int, slack: float) -> None:
    rng = np.random.default_rng(seed)
    clients, experts = rng.integers(1, 30), rng.integers(1, 10)
    capacity = rng.integers(0, experts + 1, clients)
    deficit = rng.normal(size=experts) * rng.choice([0, 1, 30])
    low, high = load_bounds(capacity, deficit - deficit.mean(), slack=slack)
    assert (low <= high).all()
    assert low.sum() <= capacity.sum() <= high.sum()
    assert (low % 1 == 0).all()
    assert (low >= 0).all()
    assert (high <= (capacity > 0).sum()).all()


HARD = {"slack": 0.0, "time_limit": 1e-6}


@pytest.mark.parametrize("solver", ["auto", "paths", "relaxation", "flow"])
def test_a_solver_out_of_time_leaves_an_even_assignment(solver: str) -> None:
    rng = np.random.default_rng(3)
    # 1001 holders of 40 experts.
    capacity = np.append(np.full(400, 2), np.full(67, 3))
    deficit = np.zeros(40)
    deficit[7] = 1.0
    asked = Request(
        favouring_few(3, 467, 40), capacity, rng.permutation(467), 2, 0, deficit=deficit
    )
    found = make_policy("flex", solver=solver, **HARD)(asked)
    assert found.status == "fallback: time limit exceeded"
    assert (found.assignment.sum(axis=1) == capacity).all()
    # 1001 = 40 · 25 + 1: the one left over goes where it is owed.
    assert found.load.tolist() == [25] * 7 + [26] + [25] * 32
    assert found.value <= found.bound
    patient = make_policy("flex", solver=solver, slack=0.0, time_limit=0.0)(asked)
    assert patient.status == "optimal"
    assert patient.value > found.value


def test_dealt_experts_even_out_samples_and_differ_between_rounds() -> None:
    samples = np.random.default_rng(0).integers(10, 200, 100).astype(float)
    asked = Request(
        favouring_few(0, 100, 5), np.full(100, 2), np.arange(100), 0, 0, load_weight=samples
    )
    policy = make_policy("flex", **HARD)
    now, later = policy(asked), policy(replace(asked, round=1))
    assert now.status == later.status == "fallback: time limit exceeded"
    assert now.load.std() / now.load.mean() < 0.02
    assert (now.assignment != later.assignment).any()


@pytest.mark.parametrize("backend", ["CLARABEL", "HIGHS"])
def test_a_backend_that_fails_leaves_an_even_assignment(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("flex", solver="relaxation", backend=backend)

    def fail(*_: object, **__: object) -> None:
        raise cvxpy.SolverError("no memory")

    chain = cvxpy.reductions.solvers.solving_chain.SolvingChain
    monkeypatch.setattr(chain, "solve_via_data", fail)
    asked = request(load_weight=np.random.default_rng(0).integers(1, 9, 20).astype(float))
    found = policy(asked)
    assert found.status == f"fallback: {backend} failed"
    assert (found.assignment.sum(axis=1) == asked.capacity).all()


@pytest.mark.parametrize(
    ("backend", "terms", "remedy"),
    [
        ("SCS", {"diversity": 1.0}, "too inexact"),
        ("SCS", {"balance": 1.0, "weighted": True}, "too inexact"),
        ("SCS", {"holders_min": 2, "weighted": True}, "too inexact"),
        ("SCIPY", {"balance": 1.0, "solver": "relaxation"}, "Try CLARABEL"),
        ("GUROBI", {}, "give one of"),
    ],
)
def test_a_backend_that_cannot_is_refused_before_any_round(
    backend: str, terms: dict, remedy: str
) -> None:
    with pytest.raises(InputError, match=rf"assignment\.backend={backend}: .*{remedy}"):
        make_policy("flex", backend=backend, **terms)
    # An unsuitable backend is accepted where it is not used, and a suitable one is accepted.
    assert make_policy("greedy", backend="SCS", diversity=1.0).name == "greedy"
    make_policy("flex", backend="CLARABEL", **{**terms, "solver": "relaxation"})


def test_a_backend_that_fails_on_the_least_problem_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise cvxpy.SolverError("no licence")

    chain = cvxpy.reductions.solvers.solving_chain.SolvingChain
    monkeypatch.setattr(chain, "solve_via_data", fail)
    with pytest.raises(InputError, match=r"assignment\.backend=CLARABEL: .*3 clients.*use HIGHS"):
        make_policy("flex", backend="CLARABEL", weighted=True)


def test_what_the_user_got_wrong_is_no_reason_to_fall_back() -> None:
    with pytest.raises(InputError, match=r"assignment\.solver=paths: takes no weights that differ"):
        make_policy("flex", solver="paths", weighted=True)
    with pytest.raises(InputError, match=r"assignment\.solver=dual: takes no balance"):
        make_policy("flex", solver="dual", balance=1.0)
    with pytest.raises(InputError, match="fitness"):
        make_policy("flex")(request(fitness=np.full((20, 8), np.nan)))


def test_deficit_by_hand() -> None:
    # Loads 3 and 1 of 4, equal shares of 2: expert 0 got 1 too much.
    assert update_deficit(np.zeros(2), np.array([3.0, 1.0])).tolist() == [-1, 1]
    # Half forgotten, and shares 3 to 1: 0.5 · (-1, 1) + (3, 1) - (3, 1).
    again = update_deficit(
        np.array([-1.0, 1.0]), np.array([3.0, 1.0]), share=np.array([3.0, 1.0]), decay=0.5
    )
    assert again.tolist() == [-0.5, 0.5]
    with pytest.raises(InputError, match=r"assignment\.decay"):
        update_deficit(np.zeros(2), np.ones(2), decay=1.5)
