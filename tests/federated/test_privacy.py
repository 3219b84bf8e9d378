from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.federated import Arrival, Sums, Uplink, epsilon, make_compressor, privatise
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


def test_the_secret_is_new_in_every_plan_and_decides_the_noise(make_algorithm, clients):
    algorithm = make_algorithm(uplink=Uplink(clip=1.0, noise_multiplier=1.0))
    cohort = np.arange(7, dtype=np.int32)

    def train(secret: np.ndarray | None = None):
        state = algorithm.init(jax.random.key(0))
        plan = algorithm.plan(cohort, algorithm.assign(state, cohort))
        plan = plan if secret is None else plan._replace(secret=jnp.asarray(secret))
        state, _ = algorithm.round(state, clients, plan)
        return np.asarray(plan.secret), np.asarray(state.shared["head"]["kernel"])

    (one, moved), (other, elsewhere) = train(), train()
    assert algorithm.round._cache_size() == 1
    assert one.dtype == np.uint32
    assert one.shape == (2,)
    assert not np.array_equal(one, other)
    assert not np.allclose(moved, elsewhere, atol=1e-3)
    assert np.array_equal(train(one)[1], moved)


def test_simulated_noise_is_the_same_every_time_and_needs_no_secret(make_algorithm, clients):
    simulated = Uplink(clip=1.0, noise_multiplier=1.0, simulated_noise=True)
    algorithm = make_algorithm(uplink=simulated)
    cohort = np.arange(7, dtype=np.int32)
    kernels = []
    for _ in range(2):
        state = algorithm.init(jax.random.key(0))
        plan = algorithm.plan(cohort, algorithm.assign(state, cohort))
        assert plan.secret is None
        state, _ = algorithm.round(state, clients, plan)
        kernels.append(np.asarray(state.shared["head"]["kernel"]))
    assert np.array_equal(*kernels)


@pytest.mark.parametrize("quarantine", [True, False])
def test_no_client_moves_the_sums_by_more_than_the_clip_norm(make_algorithm, clients, quarantine):
    """One of two neighbours has the client's update in its sums, the other has nothing there."""
    clip, cohort = 0.05, np.arange(7, dtype=np.int32)
    uplink = Uplink(quarantine=quarantine, clip=clip, noise_multiplier=1e-12)
    algorithm = make_algorithm(uplink=uplink)

    def sums(factor: float) -> np.ndarray:
        state = algorithm.init(jax.random.key(0))
        start = jax.device_get((state.shared, state.experts))
        tamper = np.where(cohort == 3, factor, 1.0)
        arrival = Arrival(np.ones(7), np.ones(7, bool), tamper)
        plan = algorithm.plan(cohort, algorithm.assign(state, cohort), arrival)
        state, _ = algorithm.round(state, clients, plan)
        moved = jax.tree.map(np.subtract, jax.device_get((state.shared, state.experts)), start)
        # Means times the public numbers that they were divided by: clients, and holders.
        holders = np.bincount(np.asarray(plan.slots).ravel(), minlength=5)[:4]
        return np.concatenate(
            [7 * leaf.ravel() for leaf in jax.tree.leaves(moved[0])]
            + [(leaf.T * holders).ravel() for leaf in jax.tree.leaves(moved[1])]
        )

    nothing = sums(0.0)
    # What is not a number, or has a length beyond single precision, counts for nothing; all else
    # is as long as it may be.
    for factor, length in ((1.0, clip), (-1e6, clip), (1e30, 0), (np.nan, 0), (np.inf, 0)):
        apart = np.linalg.norm(sums(factor) - nothing)
        assert apart == pytest.approx(length, rel=1e-3, abs=1e-6), factor
