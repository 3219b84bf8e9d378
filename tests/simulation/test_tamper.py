"""How a faulty client alters its update on the way to the server."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.simulation import Tampering
from flexmoe_jax.simulation.rounds import tamper

# Of the two slots, the second is empty, and nothing is sent of it.
SENT = {"w": jnp.full(3000, 0.1)}, {"moe": {"w": jnp.array([[8.0] * 4, [0.0] * 4])}}


def flat(tree):
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("factor", [1.0, -1.0, 1e6, np.nan])
def test_an_update_is_so_many_times_as_long(factor):
    changed = tamper(SENT, Tampering(jnp.asarray(factor), None), jax.random.key(0))
    assert np.allclose(flat(changed), factor * flat(SENT), equal_nan=True)


def test_noise_is_so_many_times_as_long_as_the_update_and_drawn_from_its_key():
    def drown(key: int, factor: float = 1.0, noise: float = 10.0):
        tampering = Tampering(jnp.asarray(factor), jnp.asarray(noise))
        return tamper(SENT, tampering, jax.random.key(key))

    noisy = drown(0)
    # The empty slot stays empty.
    assert noisy[1]["moe"]["w"][1].tolist() == [0] * 4
    noise = flat(noisy) - flat(SENT)
    length = np.sqrt(3000 * 0.1**2 + 4 * 8**2)
    assert np.linalg.norm(noise) == pytest.approx(10 * length, rel=1e-5)
    assert abs(noise.mean()) < 0.1 * noise.std()
    assert np.array_equal(flat(noisy), flat(drown(0)))
    assert not np.array_equal(flat(noisy), flat(drown(1)))
    # Turned around, it is drowned in the same noise.
    assert np.allclose(flat(drown(0, -1.0)) + flat(SENT), noise, atol=1e-4)
    # Without a noise factor, or with a zero update, there is no noise.
    assert np.array_equal(flat(drown(0, noise=0.0)), flat(SENT))
    nothing = jax.tree.map(jnp.zeros_like, SENT)
    drowned = tamper(nothing, Tampering(jnp.asarray(1.0), jnp.asarray(10.0)), jax.random.key(0))
    assert not flat(drowned).any()
