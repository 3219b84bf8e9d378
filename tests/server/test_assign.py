from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax.assignment import Problem, Request, as_solution, solve
from flexmoe_jax.errors import InputError
from flexmoe_jax.server import (
    Admission,
    Desk,
    FitnessOptions,
    check_solution,
    enrol,
    init,
    make_assign,
    make_load_model,
)
from flexmoe_jax.server.assign import _wish

CAPACITY, EXAMPLES = np.array([1, 2, 1, 2]), np.array([10, 20, 30, 40])
DESK = Desk(
    experts=3,
    group={"a": 0, "b": 1},
    optimizer=optax.sgd(1.0),
    admission=Admission(),
    fitness=FitnessOptions(initial=0.25, optimism=0.5),
    load=make_load_model("samples", EXAMPLES, CAPACITY),
)


def test_answers_that_do_not_fit_the_cohort_are_refused():
    cohort, capacity = np.array([1, 4]), np.array([9, 2, 9, 9, 1])
    found = solve(Problem(np.ones((2, 3)), [2, 1], 0, 9), "greedy")
    check_solution(found, cohort, capacity, 3)
    everything = solve(Problem(np.ones((2, 3)), 3, 0, 9), "greedy")
    for answer, line in (
        (found.assignment, "policy=ndarray: return a Solution"),
        (replace(found, use=np.ones((2, 3))), "policy=a Solution with use: leave out use"),
        (solve(Problem(np.ones((3, 2)), 1, 0, 9), "greedy"), r"policy=\(3, 2\): .* \(2, 3\)"),
        (everything, "policy=3 experts: client 4 has room for 1"),
    ):
        with pytest.raises(InputError, match=line):
            check_solution(answer, cohort, capacity, 3)


def test_a_policy_is_asked_for_each_group_with_what_the_server_knows_of_the_cohort():
    asked: list[Request] = []

    def first_ones(request: Request):
        asked.append(request)
        chosen = np.arange(3) < request.capacity[:, None]
        return as_solution(request, chosen)

    server = init(DESK, jax.random.key(0), {}, {}, clients=4)
    ledger = server.ledger._replace(
        held_rounds=server.ledger.held_rounds.at[1, 3, 2].set(4),
        usage=server.ledger.usage.at[1, 3, 2].set(36.0),
        current=server.ledger.current.at[0, 1, 0].set(True),
        deficit=server.ledger.deficit.at[1, 0].set(2.0),
    )
    descriptor = np.arange(8.0).reshape(4, 2)
    assign = make_assign(DESK, first_ones, CAPACITY, descriptor, seed=7)
    cohort = np.array([1, 3])
    solutions = assign(server._replace(ledger=ledger, round=jnp.int32(5)), cohort)
    assert [s.assignment.tolist() for s in solutions] == [[[True, True, False]] * 2] * 2

    one, other = asked
    for request in asked:
        assert request.clients.tolist() == [1, 3]
        assert request.capacity.tolist() == [2, 2]
        assert request.round == 5
        assert request.descriptor.tolist() == [[2, 3], [6, 7]]
        assert request.load_weight.tolist() == [20, 40]
    # Untried pairs are worth 0.5 more; one is not untried, in the second group.
    assert one.fitness.tolist() == [[0.75] * 3] * 2
    assert other.fitness.tolist() == [[0.75] * 3, [0.75, 0.75, 0.25]]
    assert other.usage.tolist() == [[0, 0, 0], [0, 0, 36]]
    assert other.held_rounds.tolist() == [[0, 0, 0], [0, 0, 4]]
    assert one.held.tolist() == [[True, False, False], [False] * 3]
    assert (one.deficit.tolist(), other.deficit.tolist()) == ([0, 0, 0], [2, 0, 0])
    # Groups of layers draw apart, and a single one as the run's seed has it.
    assert one.seed == 7
    assert other.seed != 7


def test_newcomers_get_the_fittest_experts_that_they_have_room_for():
    fitness = np.array([[[0.1, 0.9, 0.5]] * 2, [[0.3, 0.2, 0.1]] * 2])
    one, other = enrol(fitness, np.array([1, 2]), seed=7)
    assert one.assignment.tolist() == [[False, True, False], [False, True, True]]
    assert other.assignment.tolist() == [[True, False, False], [True, True, False]]
    assert one.load.tolist() == [0, 2, 1]


def test_who_lacks_the_expert_of_a_kind_uses_another_for_it():
    like = np.array(
        [
            [1.0, 1.0, 0, 0],  # Two kinds, whose experts are 0 and 1: it holds both.
            [1.0, 1.0, 0, 0],  # It lacks expert 1: expert 2 stands in.
            [1.0, 1.0, 0.5, 0],  # It lacks both; expert 2 is another one of its kinds.
            [1.0, 0, 0, 0],  # One kind: it needs one of its two experts.
            [0.5, 0, 0, 0],  # The same, half as sure.
            [0, 0, 0, 0],  # Nothing is known.
        ]
    )
    held = np.array(
        [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]], bool
    )
    wish = _wish(like, held)
    ratio = np.exp([row[mask][0] - row[mask][1] for row, mask in zip(wish, held, strict=True)])
    assert ratio == pytest.approx([1, 1, 0.501 / 0.001, 2e4, 2e4**0.5, 1])
