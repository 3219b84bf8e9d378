from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from flexmoe_jax.checkpoint import Checkpoints
from flexmoe_jax.federated import init_server
from flexmoe_jax.types import State


@pytest.fixture
def state() -> State:
    shared, experts = {"w": jnp.arange(3.0)}, {"w": jnp.ones((2, 3))}
    shared_optimizer, expert_optimizer = init_server(optax.adam(0.1), shared, experts)
    return State(
        key=jax.random.key(7),
        round=jnp.int32(5),
        shared=shared,
        experts=experts,
        gates={"w": jnp.full((4, 2, 3), 0.1)},
        shared_optimizer=shared_optimizer,
        expert_optimizer=expert_optimizer,
        fitness=jnp.full((4, 2), 0.3),
        slots=jnp.array([[0], [1], [2], [2]]),
        held_rounds=jnp.ones((4, 2), jnp.int32),
        usage=jnp.ones((4, 2)),
        load=jnp.array([2.0, 3.0]),
        deficit=jnp.array([0.5, -0.5]),
    )


def test_every_part_comes_back_bit_for_bit(state, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    for step in (3, 4, 5):
        checkpoints.save(state._replace(round=jnp.int32(step)))
    assert checkpoints.latest() == 5
    checkpoints.close()
    reopened = Checkpoints(tmp_path / "checkpoints", keep=2)
    blank = jax.tree.map(jnp.zeros_like, state._replace(key=jax.random.key_data(state.key)))
    blank = blank._replace(key=jax.random.key(0))
    restored = reopened.restore(blank)
    reopened.close()
    assert (jax.random.key_data(restored.key) == jax.random.key_data(state.key)).all()
    unkeyed = [s._replace(key=jnp.zeros(())) for s in (restored, state)]
    chex.assert_trees_all_equal(*unkeyed)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()}
    assert kept == {"4", "5"}
