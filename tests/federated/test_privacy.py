from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.federated import Sums, Uplink, epsilon, make_compressor, privatise
from flexmoe_jax.types import Plan

PLAN = Plan(
    clients=jnp.array([0, 1, 9]),
    slots=jnp.array([[0, 1], [1, 3], [3, 3]]),
    load=jnp.zeros(3),
    steps=jnp.array([4, 2, 0]),
    tamper=jnp.ones(3),
)


def test_noise_has_the_deviation_and_weights_no_secret():
    zeros = Sums({"w": jnp.zeros(40_000)}, jnp.array(123.0), {"w": jnp.zeros((3, 9))}, jnp.ones(3))
    noisy = privatise(zeros, PLAN, jax.random.key(0), deviation=2.0)
    assert float(noisy.shared["w"].std()) == pytest.approx(2.0, rel=0.02)
    assert abs(float(noisy.shared["w"].mean())) < 0.05
    # Two clients were to deliver: one expert 0, both expert 1, none expert 2.
    assert noisy.shared_weight == 2
    assert noisy.expert_weight.tolist() == [1, 2, 0]
    other = privatise(zeros, PLAN, jax.random.key(1), deviation=2.0)
    assert not np.array_equal(noisy.shared["w"], other.shared["w"])


def test_epsilon_by_hand():
    # z = 10, T = 50: ρ = 0.25; ln(1/δ) = 16 gives 0.25 + 2 √4 = 4.25.
    assert epsilon(10.0, 50, math.exp(-16)) == pytest.approx(4.25)


def test_a_private_round_weighs_every_client_alike(make_algorithm, clients):
    # Told apart from the plain mean by one number alone: with hardly any noise the clients' cut
    # updates are averaged with equal weight, whatever they hold.
    from tests.federated.test_algorithm import run

    almost = Uplink(clip=1e-3, noise_multiplier=1e-6)
    before = make_algorithm().init(jax.random.key(0)).shared
    after = run(make_algorithm(uplink=almost), clients, rounds=1)[0].shared
    moved = np.sqrt(
        sum(
            float(((a - b) ** 2).sum())
            for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True)
        )
    )
    assert 0 < moved <= 1e-3


def test_who_is_not_in_the_cohort_leaves_no_trace(make_algorithm, clients):
    # Where all weigh the same, and what compression kept back is sent too: neither padding, which
    # fills the block, nor a client whose work never arrives.
    uplink = Uplink(make_compressor("int8"), clip=1.0, noise_multiplier=1e-9)
    algorithm = make_algorithm(uplink=uplink, block_size=4)

    def train(absent: float) -> np.ndarray:
        state = algorithm.init(jax.random.key(0))
        held_back = jax.tree.map(lambda x: x.at[1:].set(absent), state.residual)
        cohort = np.array([0, 1])
        plan = algorithm.plan(cohort, algorithm.assign(state, cohort))
        plan = plan._replace(steps=jnp.where(plan.clients == 0, plan.steps, 0))
        state, _ = algorithm.round(state._replace(residual=held_back), clients, plan)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(state.shared)])

    assert np.allclose(train(0.0), train(3.0), atol=1e-6)
