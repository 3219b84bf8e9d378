from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.errors import InputError
from flexmoe_jax.server import Due, Sums, draw_secret, epsilon, noise_key, private
from flexmoe_jax.types import Plan

PLAN = Plan(
    clients=jnp.array([0, 1, 9]),
    slots=jnp.array([[[0, 1]], [[1, 3]], [[3, 3]]]),
    load=jnp.zeros((1, 3)),
    steps=jnp.array([4, 2, 0]),
    tamper=jnp.ones(3),
)


def test_noise_has_the_deviation_and_weights_no_secret():
    zeros = Sums(
        {"w": jnp.zeros(40_000)},
        jnp.array(123.0),
        {"a": {"w": jnp.zeros((3, 9))}},
        {"a": jnp.ones(3)},
    )
    # Two clients were to deliver: one expert 0, both expert 1, none expert 2.
    due = Due(jnp.array(2.0), {"a": jnp.array([1.0, 2.0, 0.0])}, jax.random.key(0))
    noisy = private(2.0).mean(zeros, due)
    assert float(noisy.shared["w"].std()) == pytest.approx(2.0, rel=0.02)
    assert abs(float(noisy.shared["w"].mean())) < 0.05
    assert noisy.shared_weight == 2
    assert noisy.expert_weight["a"].tolist() == [1, 2, 0]
    assert noisy.experts["a"]["w"].std() == pytest.approx(2.0, rel=0.5)
    other = private(2.0).mean(zeros, due._replace(key=jax.random.key(1)))
    assert not np.array_equal(noisy.shared["w"], other.shared["w"])


def test_epsilon_by_hand():
    # z = 10, T = 50: ρ = 0.25; ln(1/δ) = 16 gives 0.25 + 2 √4 = 4.25.
    assert epsilon(10.0, 50, math.exp(-16)) == pytest.approx(4.25)


def test_noise_comes_from_the_plans_secret_or_from_the_runs_key():
    own = jax.random.key(3)
    assert noise_key(PLAN, own, True, 3) is own
    with pytest.raises(InputError, match="simulated_noise=False: this plan has no secret"):
        noise_key(PLAN, own, False, 3)
    one, other = draw_secret(), draw_secret()
    assert not np.array_equal(one, other)
    keys = [noise_key(PLAN._replace(secret=s), own, False, 3) for s in (one, one, other)]
    drawn = [float(jax.random.normal(key)) for key in keys]
    assert drawn[0] == drawn[1] != drawn[2]
