from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.federated import (
    ClientUpdate,
    Delivery,
    Tampering,
    Uplink,
    deliver,
    make_compressor,
)
from flexmoe_jax.types import Feedback, Params

HELD = jnp.array([True, False])
GATE = {"kernel": jnp.array([[5.0], [6.0]])}
START = Params({}, {}, GATE, {"own": jnp.array([1.0])})


def make_update(value=2.0):
    # Norm of what counts: ψ (3) and the held expert (4) make 5; the empty slot must not count.
    return ClientUpdate(
        shared={"w": jnp.array([3.0 * value, 0.0])},
        experts={"w": jnp.array([[4.0 * value], [1e9]])},
        gate={"kernel": jnp.array([[7.0], [8.0]])},
        private={"own": jnp.array([2.0])},
        feedback=Feedback(jnp.array([10.0, 0.0]), jnp.array([6.0, 0.0]), jnp.array([9.0, 0.0])),
        loss=jnp.array(0.9),
        examples=jnp.array(10.0),
    )


def send(uplink, update=None, tamper=1.0, residual=(), limits=(np.inf, np.inf)) -> Delivery:
    tampering = Tampering(jnp.asarray(tamper))
    update = update or make_update()
    return deliver(uplink, update, HELD, START, residual, tampering, jnp.asarray(limits))


def test_an_honest_update_arrives_as_it_is():
    update, _, refused, norms = send(Uplink())
    assert not refused
    assert norms.tolist() == [6, 8]  # ψ, and the expert that was used
    expected = make_update()._replace(experts={"w": jnp.array([[8.0], [0.0]])})
    chex.assert_trees_all_equal(update, expected)


@pytest.mark.parametrize(
    ("uplink", "tamper", "limits"),
    [
        (Uplink(), np.nan, (np.inf, np.inf)),
        (Uplink(), np.inf, (np.inf, np.inf)),
        (Uplink(norm_limit=9.9), 1.0, (np.inf, np.inf)),
        (Uplink(), 1.0, (5.9, 100.0)),
        (Uplink(), 1.0, (100.0, 7.9)),
        # What is not a number cannot be cut: without quarantine it counts for nothing, too.
        (Uplink(quarantine=False, clip=1.0), np.nan, (np.inf, np.inf)),
        (Uplink(quarantine=False, clip=1.0, noise_multiplier=1.0), np.inf, (np.inf, np.inf)),
    ],
)
def test_quarantine_leaves_nothing_of_an_update(uplink, tamper, limits):
    update, _, refused, norms = send(uplink, tamper=tamper, limits=limits)
    assert refused
    # A refused length is one that the cohort had; what is not a number has none.
    assert norms.tolist() == ([6, 8] if tamper == 1 else [0, 0])
    chex.assert_trees_all_equal((update.gate, update.private), (START.gate, START.private))
    others = {"gate": (), "private": ()}
    chex.assert_trees_all_equal(
        update._replace(**others), jax.tree.map(jnp.zeros_like, make_update()._replace(**others))
    )


def test_each_part_is_judged_by_its_own_limit_where_others_count():
    assert not send(Uplink(), limits=(6.0, 8.0)).quarantined
    for uplink in (
        Uplink(quarantine=False),
        Uplink(norm_factor=0.0),
        # A limit learnt from others would tell of them.
        Uplink(clip=1.0, noise_multiplier=1.0),
    ):
        assert not uplink.compares
        assert not send(uplink, limits=(1.0, 1.0)).quarantined


def test_the_norm_limit_judges_the_update_and_not_the_loss():
    # The update's norm is 10; with the loss of 0.9 it would be 10.04.
    assert not send(Uplink(norm_limit=10.01)).quarantined
    assert send(Uplink(), make_update()._replace(loss=jnp.array(jnp.nan))).quarantined


def test_a_gate_that_is_no_number_is_quarantined_too():
    broken = make_update()._replace(gate={"kernel": jnp.array([[jnp.nan], [0.0]])})
    assert send(Uplink(), broken).quarantined


def test_without_quarantine_everything_passes():
    update, _, refused, _ = send(Uplink(quarantine=False), tamper=np.nan)
    assert not refused
    assert np.isnan(update.shared["w"]).any()
    assert update.examples == 10


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_clipping_keeps_the_direction_and_bounds_the_norm(value, clip):
    update = send(Uplink(clip=clip), make_update(value)).update
    parts = np.array([update.shared["w"][0], update.experts["w"][0, 0]])
    assert np.allclose(parts / np.linalg.norm(parts), [0.6, 0.8], rtol=1e-4)
    assert np.linalg.norm(parts) == pytest.approx(min(clip, 5 * value), rel=1e-4)


def test_who_trained_nothing_sends_nothing_and_keeps_its_residual():
    # Padding, and clients whose work never arrives.
    idle = jax.tree.map(jnp.zeros_like, make_update())._replace(gate=GATE, private=START.private)
    residual = ({"w": jnp.array([0.5, 0.5])}, {"w": jnp.array([[0.5], [0.5]])})
    for uplink in (Uplink(make_compressor("int8")), Uplink(make_compressor("int8"), True, False)):
        for tamper in (1.0, np.nan):
            update, kept, refused, norms = send(uplink, idle, tamper, residual)
            chex.assert_trees_all_equal((update, kept), (idle, residual))
            assert not refused
            assert norms.tolist() == [0, 0]


def test_an_expert_that_was_not_used_keeps_its_residual():
    update = make_update()
    unused = update._replace(feedback=update.feedback._replace(usage=jnp.zeros(2)))
    residual = ({"w": jnp.zeros(2)}, {"w": jnp.array([[0.5], [0.5]])})
    arrived, kept, *_ = send(Uplink(make_compressor("top_k", 0.5)), unused, residual=residual)
    assert not arrived.experts["w"].any()
    chex.assert_trees_all_equal(kept[1], residual[1])
    # Under the noise of privacy it counts as much as any other, so there it is sent.
    private = Uplink(make_compressor("top_k", 0.5), clip=1e3, noise_multiplier=1.0)
    arrived, kept, *_ = send(private, unused, residual=residual)
    assert arrived.experts["w"].tolist() == [[8.5], [0.0]]
    assert kept[1]["w"].tolist() == [[0.0], [0.5]]


def test_experts_of_the_clients_own_need_no_compression():
    update = make_update()._replace(experts={})
    residual = ({"w": jnp.zeros(2)}, {})
    assert send(Uplink(make_compressor("int8")), update, residual=residual).update.experts == {}


def test_a_quarantined_client_keeps_its_residual():
    uplink = Uplink(make_compressor("int8"))
    residual = ({"w": jnp.array([0.5, 0.5])}, {"w": jnp.array([[0.5], [0.0]])})
    chex.assert_trees_all_equal(send(uplink, tamper=np.nan, residual=residual).residual, residual)
    changed = send(uplink, residual=residual).residual
    assert not np.allclose(changed[0]["w"], 0.5)


def test_noise_is_so_many_times_as_long_as_the_update_and_drawn_from_its_key():
    update = make_update()._replace(shared={"w": jnp.full(3000, 0.1)})

    def drown(key: int, factor: float = 1.0) -> Delivery:
        tampering = Tampering(jnp.asarray(factor), jnp.asarray(10.0), jax.random.key(key))
        return deliver(Uplink(), update, HELD, START, (), tampering, jnp.full(2, jnp.inf))

    noisy = drown(0).update
    added = jax.tree.map(
        jnp.subtract, (noisy.shared, noisy.experts), (update.shared, update.experts)
    )
    # The empty slot stays empty: its 1e9 is no part of the update, and no noise is sent of it.
    assert noisy.experts["w"][1] == 0
    noise = np.concatenate([added[0]["w"], added[1]["w"][0]])
    length = np.sqrt(3000 * 0.1**2 + 8**2)
    assert np.linalg.norm(noise) == pytest.approx(10 * length, rel=1e-5)
    assert abs(noise.mean()) < 0.1 * noise.std()
    assert np.array_equal(noisy.shared["w"], drown(0).update.shared["w"])
    assert not np.array_equal(noisy.shared["w"], drown(1).update.shared["w"])
    # Turned around, it is drowned in the same noise.
    turned = drown(0, -1.0).update.shared["w"]
    assert np.allclose(turned + update.shared["w"], added[0]["w"], atol=1e-4)
