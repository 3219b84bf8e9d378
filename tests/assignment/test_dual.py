from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.assignment import Problem, dual_assign, load_bounds, solve, solve_layers
from flexmoe_jax.assignment.bounds import window_deficit


def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    fitness = rng.random((3, 24, 6)) + rng.random((3, 1, 6))
    capacity = rng.integers(1, 4, 24)
    return fitness, capacity, *load_bounds(capacity, np.zeros(6), slack=0.05)


def test_a_vmapped_batch_is_the_solutions_one_by_one() -> None:
    fitness, capacity, low, high = batch()
    inputs = (jnp.asarray(capacity), jnp.asarray(low), jnp.asarray(high))
    run = jax.jit(jax.vmap(dual_assign, in_axes=(0, None, None, None)))
    together = run(jnp.asarray(fitness, jnp.float32), *inputs)
    for g in range(3):
        exact = solve(Problem(fitness[g], capacity, low, high), "paths")
        held = np.asarray(together.assignment[g])
        assert (held.sum(axis=1) == capacity).all()
        assert (held.sum(axis=0) >= low).all()
        assert (held.sum(axis=0) <= high).all()
        assert together.bound[g] >= exact.value - 1e-5
        assert together.value[g] <= exact.value + 1e-4
        assert exact.value - together.value[g] <= 0.02 * exact.value


def test_layers_lead_the_solution() -> None:
    fitness, capacity, low, high = batch()
    found = solve_layers(fitness, capacity, low, high, solver="auto")
    alone = [solve(Problem(part, capacity, low, high), "auto") for part in fitness]
    assert found.assignment.shape == (3, 24, 6)
    assert found.value == sum(part.value for part in alone)
    assert found.load.tolist() == [part.load.tolist() for part in alone]
    assert "3 layers" in str(found)


def test_a_summary_names_layer_and_expert() -> None:
    # Three clients prefer expert 0 in the first layer and expert 1 in the second; 1 is over.
    fitness = [[[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3]
    text = str(solve_layers(fitness, 1, 0, 1, solver="auto"))
    assert text.endswith("; out of bounds: layer 0 expert 0 by 1, layer 1 expert 1 by 1")


def test_layers_whose_worths_cancel_leave_no_gap_of_rounding() -> None:
    # 0.1 + 0.2 - 0.3 is not 0, and differs with the order of summation.
    fitness = [[[0.1, 0.0], [0.2, 0.0], [-0.3, 0.0]]]
    found = solve_layers(fitness, 1, [3, 0], [3, 0], solver="relaxation")
    assert found.gap == 0.0


def test_layers_share_a_budget_of_bytes() -> None:
    rng = np.random.default_rng(1)
    fitness, size = rng.random((2, 10, 4)), rng.random((2, 4)) + 0.5
    budget = 3.0 * rng.random(10)
    found = solve_layers(fitness, budget, 0, 6, expert_size=size)
    used = np.einsum("gce,ge->c", found.assignment, size)
    assert (used <= budget + 1e-9).all()
    assert (found.assignment.sum(axis=1) <= 6).all()
    assert found.bound >= found.value


def test_a_window_forgets_older_rounds() -> None:
    # Loads (3, 1) and (2, 4) sum to (5, 5): nothing owed; the second alone owes expert 0 one.
    assert window_deficit(np.array([[3.0, 1.0], [2.0, 4.0]])).tolist() == [0, 0]
    assert window_deficit(np.array([[2.0, 4.0]])).tolist() == [1, -1]
