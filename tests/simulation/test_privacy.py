"""Rounds under central differential privacy."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from flexmoe_jax.client import Codec, make_compressor
from flexmoe_jax.server import Admission
from flexmoe_jax.simulation import Arrival
from tests.simulation.conftest import EXPERTS

EVERYBODY = np.arange(7, dtype=np.int32)
CLIP = 0.05
ALMOST_QUIET = Admission(clip=CLIP, noise_multiplier=1e-12)


def averaged(state):
    return jax.device_get((state.server.shared, state.server.experts))


def test_a_private_round_weighs_every_client_alike(make_simulation, clients):
    # Told apart from the plain mean by one number alone: with hardly any noise the clients' cut
    # updates are averaged with equal weight, whatever they hold.
    simulated = make_simulation(admission=ALMOST_QUIET)
    state = simulated.init(jax.random.key(0))
    before = averaged(state)
    plan = simulated.plan(EVERYBODY, simulated.assign(state, EVERYBODY))
    after = averaged(simulated.round(state, clients, plan)[0])
    moved = jax.tree.leaves(jax.tree.map(np.subtract, after[0], before[0]))
    assert 0 < np.linalg.norm(np.concatenate([leaf.ravel() for leaf in moved])) <= CLIP


def test_who_is_not_in_the_cohort_leaves_no_trace(make_simulation, clients):
    # Where all weigh the same, and what compression kept back is sent too: neither padding, which
    # fills the block, nor a client whose work never arrives.
    simulated = make_simulation(
        codec=Codec(make_compressor("int8")),
        admission=Admission(clip=1.0, noise_multiplier=1e-9),
        block_size=4,
    )

    def train(absent: float) -> np.ndarray:
        state = simulated.init(jax.random.key(0))
        rest = (np.arange(7) > 0) * absent
        held_back = jax.tree.map(
            lambda x: np.asarray(x) + rest.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype),
            state.clients.residual,
        )
        state = state._replace(clients=state.clients._replace(residual=held_back))
        cohort = np.array([0, 1])
        plan = simulated.plan(cohort, simulated.assign(state, cohort))
        plan = plan._replace(steps=np.where(np.asarray(plan.clients) == 0, plan.steps, 0))
        state, _ = simulated.round(state, clients, plan)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(averaged(state))])

    assert np.allclose(train(0.0), train(3.0), atol=1e-6)


def test_the_secret_is_new_in_every_plan_and_decides_the_noise(make_simulation, clients):
    simulated = make_simulation(admission=Admission(clip=1.0, noise_multiplier=1.0), own=True)

    def train(secret: np.ndarray | None = None):
        state = simulated.init(jax.random.key(0))
        plan = simulated.plan(EVERYBODY, simulated.assign(state, EVERYBODY))
        plan = plan if secret is None else plan._replace(secret=secret)
        state, _ = simulated.round(state, clients, plan)
        return np.asarray(plan.secret), np.asarray(state.server.shared["head"]["kernel"])

    (one, moved), (other, elsewhere) = train(), train()
    assert simulated.round._cache_size() == 1
    assert one.dtype == np.uint32
    assert one.shape == (2,)
    assert not np.array_equal(one, other)
    assert not np.allclose(moved, elsewhere, atol=1e-3)
    assert np.array_equal(train(one)[1], moved)


def test_simulated_noise_is_the_same_every_time_and_needs_no_secret(make_simulation, clients):
    simulated_noise = Admission(clip=1.0, noise_multiplier=1.0, noise="simulated")
    simulated = make_simulation(admission=simulated_noise)
    kernels = []
    for _ in range(2):
        state = simulated.init(jax.random.key(0))
        plan = simulated.plan(EVERYBODY, simulated.assign(state, EVERYBODY))
        assert plan.secret is None
        state, _ = simulated.round(state, clients, plan)
        kernels.append(np.asarray(state.server.shared["head"]["kernel"]))
    assert np.array_equal(*kernels)


@pytest.mark.parametrize("quarantine", [True, False])
def test_no_client_moves_the_sums_by_more_than_the_clip_norm(make_simulation, clients, quarantine):
    """One of two neighbours has the client's update in its sums, the other has nothing there."""
    simulated = make_simulation(admission=replace(ALMOST_QUIET, quarantine=quarantine))

    def sums(factor: float) -> np.ndarray:
        state = simulated.init(jax.random.key(0))
        start = averaged(state)
        tamper = np.where(EVERYBODY == 3, factor, 1.0)
        arrival = Arrival(np.ones(7), np.ones(7, bool), tamper)
        plan = simulated.plan(EVERYBODY, simulated.assign(state, EVERYBODY), arrival)
        state, _ = simulated.round(state, clients, plan)
        moved = jax.tree.map(np.subtract, averaged(state), start)
        # Means times the public numbers that they were divided by: clients, and holders.
        holders = np.bincount(np.asarray(plan.slots).ravel(), minlength=EXPERTS + 1)[:EXPERTS]
        return np.concatenate(
            [7 * leaf.ravel() for leaf in jax.tree.leaves(moved[0])]
            + [(leaf.T * holders).ravel() for leaf in jax.tree.leaves(moved[1])]
        )

    nothing = sums(0.0)
    # What is not a number, or has a length beyond single precision, counts for nothing; all else
    # is as long as it may be.
    for factor, length in ((1.0, CLIP), (-1e6, CLIP), (1e30, 0), (np.nan, 0), (np.inf, 0)):
        apart = np.linalg.norm(sums(factor) - nothing)
        assert apart == pytest.approx(length, rel=1e-3, abs=1e-6), factor
