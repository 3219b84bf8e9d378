from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexmoe_jax.errors import InputError
from flexmoe_jax.server import (
    FitnessOptions,
    accuracy_score,
    loss_score,
    make_score,
    update_fitness,
)
from flexmoe_jax.types import Feedback


def feedback(usage, correct, loss):
    return Feedback(*(jnp.asarray(x, jnp.float32) for x in (usage, correct, loss)))


def test_scores_by_hand():
    seen = feedback([[8, 0]], [[6, 0]], [[4.0, 0.0]])
    assert accuracy_score(seen)[0, 0] == 0.75  # 6 of 8
    # Mean loss 4 / 8 = 0.5 nats; exp(-2 · 0.5) = exp(-1).
    assert loss_score(2.0)(seen)[0, 0] == pytest.approx(np.exp(-1.0))
    # Parts of units: half a unit, all of it right, at 0.5 nats a unit.
    part = feedback([[0.5]], [[0.5]], [[0.25]])
    assert accuracy_score(part)[0, 0] == 1
    assert loss_score(2.0)(part)[0, 0] == pytest.approx(np.exp(-1.0))


def test_update_by_hand():
    fitness = jnp.array([[0.5, 0.1, 0.2], [0.3, 0.3, 0.3]])
    # Client 0 holds experts 0 and 2 and routes nothing to 2; row 2 is padding (C = 2).
    new = update_fitness(
        fitness,
        jnp.array([0, 2]),
        jnp.array([[0, 2], [1, 3]]),
        feedback([[4, 0], [9, 9]], [[4, 0], [9, 9]], [[0, 0], [0, 0]]),
        FitnessOptions(accuracy_score, beta=0.25),
    )
    # 0.75 · 0.5 + 0.25 · 1 = 0.625; everything else keeps its value.
    assert new.tolist() == jnp.array([[0.625, 0.1, 0.2], [0.3, 0.3, 0.3]]).tolist()


@given(
    usage=hnp.arrays(np.int32, (3, 2), elements=st.integers(0, 9)),
    clients=st.permutations(range(5)),
    beta=st.floats(0.01, 1.0),
)
def test_only_held_pairs_with_feedback_change(usage, clients, beta):
    slots = np.array([[0, 1], [2, 4], [3, 4]], np.int32)  # 4 = E: empty
    cohort = np.array(clients[:3], np.int32)
    fitness = jnp.full((5, 4), 2.0)  # above any score, so that every learnt pair changes
    options = FitnessOptions(accuracy_score, beta=beta)
    seen = feedback(usage, 0 * usage, usage)
    new = np.asarray(update_fitness(fitness, cohort, slots, seen, options))
    expected = np.zeros((5, 4), bool)
    for client, row, used in zip(cohort, slots, usage, strict=True):
        for expert, count in zip(row, used, strict=True):
            if expert < 4 and count:
                expected[client, expert] = True
    assert ((new != 2.0) == expected).all()


def test_unknown_score_is_refused():
    with pytest.raises(InputError, match=r"fitness\.score=entropy: choose one of accuracy, loss"):
        FitnessOptions("entropy")
    with pytest.raises(InputError, match=r"fitness\.alpha=0"):
        FitnessOptions("loss", alpha=0.0)


def test_a_score_is_named_or_ones_own():
    assert {make_score(FitnessOptions(name)) for name in ("accuracy", accuracy_score)} == {
        accuracy_score
    }
    seen = feedback([[8]], [[6]], [[4.0]])
    assert make_score(FitnessOptions("loss", alpha=2.0))(seen)[0, 0] == pytest.approx(np.exp(-1))
