from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.server import Admission, Arrived, Verdict, admit
from flexmoe_jax.types import Feedback, Upload

# Of two slots the first holds an expert, of three, and the second is empty.
SLOTS = {"a": jnp.array([1, 3])}


def make_upload(value=2.0, factor=1.0) -> Upload:
    # Norms: ψ 3 and the held expert 4, which make 5; nothing of the empty slot travels.
    return Upload(
        shared={"w": factor * jnp.array([3.0 * value, 0.0])},
        experts={"a": {"w": factor * jnp.array([[4.0 * value], [0.0]])}},
        feedback=Feedback(jnp.array([[10.0, 0]]), jnp.array([[6.0, 0]]), jnp.array([[9.0, 0]])),
        loss=jnp.array(0.9),
        units=jnp.array(10.0),
        examples=jnp.array(10.0),
    )


def judge(admission, upload=None, limits=(np.inf, np.inf), steps=1) -> tuple[Arrived, Verdict]:
    limits = None if limits is None else jnp.asarray(limits)
    return admit(admission, upload or make_upload(), SLOTS, jnp.int32(steps), limits)


def test_an_honest_update_counts_as_it_is():
    update, verdict = judge(Admission())
    assert verdict.accepted
    assert not verdict.refused
    assert verdict.lengths.tolist() == [6, 8]  # ψ, and the expert that was used
    sent = make_upload()
    chex.assert_trees_all_equal((update.shared, update.experts), (sent.shared, sent.experts))
    assert update.weight == 10
    assert update.usage["a"].tolist() == [10, 0]
    assert update.slots["a"].tolist() == [1, 3]
    chex.assert_trees_all_equal(verdict.feedback, sent.feedback)
    assert (verdict.loss, verdict.units, verdict.examples) == (sent.loss, 10, 10)


@pytest.mark.parametrize(
    ("admission", "factor", "limits"),
    [
        (Admission(), np.nan, (np.inf, np.inf)),
        (Admission(), np.inf, (np.inf, np.inf)),
        (Admission(norm_limit=9.9), 1.0, (np.inf, np.inf)),
        (Admission(quarantine=False, norm_limit=9.9), 1.0, (np.inf, np.inf)),
        (Admission(), 1.0, (5.9, 100.0)),
        (Admission(), 1.0, (100.0, 7.9)),
        # What is not a number cannot be cut: without quarantine it counts for nothing, too.
        (Admission(quarantine=False, clip=1.0), np.nan, (np.inf, np.inf)),
        (Admission(quarantine=False, clip=1.0, noise_multiplier=1.0), np.inf, (np.inf, np.inf)),
    ],
)
def test_quarantine_leaves_nothing_of_an_update(admission, factor, limits):
    update, verdict = judge(admission, make_upload(factor=factor), limits)
    assert verdict.refused
    assert not verdict.accepted
    # A refused length is one that the cohort had; what is not a number has none.
    assert verdict.lengths.tolist() == ([6, 8] if factor == 1 else [0, 0])
    counted = update.shared, update.experts, verdict.feedback, verdict[-3:]
    assert not any(leaf.any() for leaf in jax.tree.leaves(counted))
    # Where all weigh the same, so does this one: its update is nothing.
    weight = float(admission.private)
    assert update.weight == weight
    assert update.usage["a"].tolist() == [weight, weight]


def test_each_part_is_judged_by_its_own_limit_where_others_count():
    assert not judge(Admission(), limits=(6.0, 8.0))[1].refused
    assert not judge(Admission(), limits=None)[1].refused
    for admission in (
        Admission(quarantine=False),
        Admission(norm_factor=0.0),
        # A limit learnt from others would tell of them.
        Admission(clip=1.0, noise_multiplier=1.0),
    ):
        assert not admission.compares
        assert not judge(admission, limits=(1.0, 1.0))[1].refused


def test_lengths_are_of_the_root_of_the_steps_that_the_server_asked_for():
    limits = (3.0, 4.0)
    verdict = judge(Admission(), limits=limits, steps=4)[1]
    assert verdict.lengths.tolist() == [3, 4]
    assert not verdict.refused
    assert judge(Admission(), limits=limits, steps=3)[1].refused
    # An absolute limit is of the update as it is.
    assert judge(Admission(norm_limit=9.9), steps=100)[1].refused


def test_the_norm_limit_judges_the_update_and_not_the_loss():
    # The update's norm is 10; with the loss of 0.9 it would be 10.04.
    assert not judge(Admission(norm_limit=10.01))[1].refused


def test_a_loss_that_is_no_number_is_refused():
    # This is how a client reports that its gate or other private parameters are not finite.
    broken = make_upload()._replace(loss=jnp.array(jnp.nan))
    update, verdict = judge(Admission(), broken)
    assert verdict.refused
    assert (verdict.loss, update.weight) == (0, 0)


def test_without_quarantine_everything_passes():
    update, verdict = judge(Admission(quarantine=False), make_upload(factor=np.nan))
    assert not verdict.refused
    assert np.isnan(update.shared["w"]).any()
    assert verdict.examples == 10


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_clipping_keeps_the_direction_and_bounds_the_norm(value, clip):
    update, verdict = judge(Admission(clip=clip), make_upload(value))
    parts = np.array([update.shared["w"][0], update.experts["a"]["w"][0, 0]])
    assert np.allclose(parts / np.linalg.norm(parts), [0.6, 0.8], rtol=1e-4)
    assert np.linalg.norm(parts) == pytest.approx(min(clip, 5 * value), rel=1e-4)
    # Lengths are those before.
    assert np.allclose(verdict.lengths, [3 * value, 4 * value], rtol=1e-5)


@pytest.mark.parametrize("quarantine", [True, False])
@pytest.mark.parametrize("factor", [1.0, np.nan])
def test_who_trained_nothing_sends_nothing(quarantine, factor):
    # Padding, and clients whose work never arrives; compression may have something to add.
    idle = jax.tree.map(jnp.zeros_like, make_upload())._replace(shared=make_upload().shared)
    idle = idle._replace(shared=jax.tree.map(lambda x: factor * x, idle.shared))
    update, verdict = judge(Admission(quarantine=quarantine), idle)
    assert not any(leaf.any() for leaf in jax.tree.leaves((update._replace(slots=()), verdict)))


def test_under_noise_all_weigh_the_same():
    update, verdict = judge(Admission(clip=100.0, noise_multiplier=1.0))
    assert update.weight == 1
    assert update.usage["a"].tolist() == [1, 1]
    # The server's records count all examples that were trained on.
    assert verdict.units == 10
    assert verdict.feedback.usage.tolist() == [[10, 0]]


def test_usage_counts_for_the_layer_that_it_is_of():
    # Two layers with experts of their own, each by what went through it.
    upload = make_upload()
    both = upload._replace(
        experts=upload.experts | {"b": {"v": jnp.ones((2, 3))}},
        feedback=jax.tree.map(lambda x: jnp.concatenate([x, x[:, ::-1] + 1]), upload.feedback),
    )
    slots = SLOTS | {"b": jnp.array([0, 2])}
    update, _ = admit(Admission(), both, slots, jnp.int32(1), None)
    assert update.usage["a"].tolist() == [10, 0]
    assert update.usage["b"].tolist() == [1, 11]


def test_experts_that_stay_with_their_clients_are_told_of_alone():
    update, verdict = judge(Admission(), make_upload()._replace(experts={}))
    assert (update.experts, update.slots, update.usage) == ({}, {}, {})
    assert update.weight == 10
    assert verdict.feedback.usage.tolist() == [[10, 0]]
    assert verdict.lengths.tolist() == [6, 0]
