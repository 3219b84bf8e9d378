"""A client's round, with a training function that changes its parameters as the tests specify."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import tasks
from flexmoe_jax.client import (
    Batches,
    Codec,
    Learner,
    LocalTraining,
    Site,
    appraise,
    decode,
    init_residual,
    keep_if_accepted,
    log_shares,
    make_compressor,
    model_of,
    receive,
    train_and_answer,
)
from flexmoe_jax.types import Download, Own, Params, Routing, Upload

E = 3
# A client of one layer with two slots, of which the first holds expert 1 and the second is empty.
SLOTS = jnp.array([[1, E]])
START = Params(
    shared={"w": jnp.zeros(2)},
    experts={"a": {"w": jnp.zeros((2, 1))}},
    gate={"a": {"kernel": jnp.array([[4.0], [5.0], [6.0]])}},
    private={"own": jnp.array([1.0])},
)
# The change by training; the part of the empty slot must never count.
CHANGE = Params(
    shared={"w": jnp.array([6.0, 0.0])},
    experts={"a": {"w": jnp.array([[8.0], [1e9]])}},
    gate={"a": {"kernel": jnp.array([[2.0], [1e9]])}},
    private={"own": jnp.array([1.0])},
)
# Ten examples, all of which the gate sends to slot 0; six are right, and the losses' sum is 9.
EXAMPLES = {
    "right": jnp.repeat(jnp.array([1.0, 0.0]), jnp.array([6, 4])),
    "loss": jnp.full(10, 0.9),
}
BATCHES = Batches(jnp.arange(10)[None])


def make_site(codec=None, change=CHANGE, used=(True, False), **options) -> Site:
    def apply(params, inputs, held):
        inner = jax.tree.map(lambda c, p: (c * p).sum(), change, params)
        total = sum(jax.tree.leaves(inner), jnp.zeros(()))
        selected = jnp.broadcast_to(jnp.asarray(used) & held["a"], (10, 2))
        ones = selected.astype(jnp.float32)
        return jnp.full(10, total), {"a": Routing(ones, ones, selected, ones)}

    task = tasks.Task(
        name="as wanted",
        inputs=lambda batch: batch["loss"],
        # A loss of this value, with a gradient that moves the parameters by the specified change.
        loss=lambda out, batch: batch["loss"] + (jax.lax.stop_gradient(out) - out),
        hits=lambda out, batch: batch["right"],
        weight=lambda batch: jnp.ones(batch["loss"].shape),
        mean=(lambda out: out, lambda out: out),
        labels=None,
        adjust=None,
        check=lambda arrays, outputs: None,
    )
    learner = Learner(
        apply, task, LocalTraining(optax.sgd(1.0), balance=0.0, batch_size=10), ("a",)
    )
    return Site(learner, codec or Codec(), {"a": 0}, E, **options)


def owned(residual=()) -> Own:
    return Own(START.gate, START.private, SLOTS, residual)


def down(steps=1) -> Download:
    return Download(START.shared, START.experts, SLOTS, jnp.int32(steps), jnp.int32(0))


def some_kept():
    return {"w": jnp.array([0.5, 0.5])}, {"a": {"w": jnp.array([[0.5], [0.5]])}}


def answer(site: Site, own: Own, steps=1) -> tuple[Own, Upload]:
    return train_and_answer(site, own, down(steps), EXAMPLES, BATCHES)


def test_a_clients_model_is_what_it_was_sent_and_the_gate_rows_of_that():
    params, held = model_of(make_site(), owned(), down())
    assert held["a"].tolist() == [True, False]
    assert params.gate["a"]["kernel"][0] == 5
    assert params.shared is START.shared
    assert params.private is START.private


def test_what_a_client_says_of_experts_by_hand():
    usage, correct, loss = appraise(make_site(), owned(), down(0), EXAMPLES, BATCHES.rows[0])
    assert (usage.tolist(), correct.tolist()) == ([[10, 0]], [[6, 0]])
    assert np.allclose(loss, [[9, 0]])
    # Of rows 0, 1 and 9, the first two are right; the rest is padding.
    rows = jnp.array([0, 1, 9, *[-1] * 7])
    usage, correct, loss = appraise(make_site(), owned(), down(0), EXAMPLES, rows)
    assert (usage.tolist(), correct.tolist()) == ([[3, 0]], [[2, 0]])
    assert np.allclose(loss, [[2.7, 0]])


def test_an_answer_by_hand():
    after, upload = answer(make_site(), owned())
    assert np.allclose(upload.shared["w"], [6, 0])
    # The empty slot is not sent.
    assert np.allclose(upload.experts["a"]["w"], [[8], [0]])
    assert (upload.units, upload.examples) == (10, 10)
    assert upload.loss == pytest.approx(0.9)
    usage, correct, loss = upload.feedback
    assert (usage.tolist(), correct.tolist()) == ([[10, 0]], [[6, 0]])
    assert np.allclose(loss, [[9, 0]])
    # The gate's row of expert 1 and the client's other private parameters changed; no other row.
    assert np.allclose(after.gates["a"]["kernel"], [[4], [7], [6]])
    assert after.gates["a"]["kernel"][::2].tolist() == [[4], [6]]
    assert np.allclose(after.private["own"], [2])


def test_who_is_refused_goes_back_to_what_it_was():
    own = owned(some_kept())
    after, _ = answer(make_site(Codec(make_compressor("int8"))), own)
    chex.assert_trees_all_equal(keep_if_accepted(own, after, jnp.array(False)), own)
    chex.assert_trees_all_equal(keep_if_accepted(own, after, jnp.array(True)), after)
    # The residual of the compression has changed, if the answer counts.
    assert not np.allclose(after.residual[0]["w"], 0.5)


@pytest.mark.parametrize("part", ["gate", "private"])
def test_the_client_alone_can_tell_that_what_it_keeps_is_no_number(part):
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), getattr(CHANGE, part))
    _, upload = answer(make_site(change=CHANGE._replace(**{part: broken})), owned())
    assert np.isfinite(upload.shared["w"]).all()
    # Its loss shows this, and the server refuses the update for it.
    assert np.isnan(upload.loss)


@pytest.mark.parametrize("error_feedback", [True, False])
@pytest.mark.parametrize("name", ["none", "int8"])
def test_who_trained_nothing_keeps_all_it_has(name, error_feedback):
    # Padding, and clients whose work never arrives.
    codec = Codec(make_compressor(name), error_feedback)
    own = owned(some_kept() if codec.keeps else ())
    after, upload = answer(make_site(codec), own, steps=0)
    chex.assert_trees_all_equal(after, own)
    assert (upload.units, upload.examples, upload.loss) == (0, 0, 0)
    assert not any(leaf.any() for leaf in upload.feedback)


def test_an_expert_that_was_not_used_keeps_its_residual():
    own, codec = owned(some_kept()), Codec(make_compressor("top_k", 0.5))
    after, upload = answer(make_site(codec, used=(False, False)), own)
    assert not upload.experts["a"]["w"][0].any()
    chex.assert_trees_all_equal(after.residual[1], own.residual[1])
    # With the noise of differential privacy it counts like any other, so there it is sent.
    site = make_site(codec, used=(False, False), send_all=True)
    after, upload = answer(site, own)
    _, arrived = decode(codec, (upload.shared, upload.experts), START[:2])
    assert np.allclose(arrived["a"]["w"], [[8.5], [0]])
    assert after.residual[1]["a"]["w"].tolist() == [[0.0], [0.5]]


def test_what_is_kept_back_arrives_in_the_end():
    wanted = (
        {"w": jnp.array([[0.5, -4.0, 0.25], [0.0, 1.0, -0.125]]), "b": jnp.ones(1)},
        {"a": {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}},
    )
    zeros = jax.tree.map(jnp.zeros_like, wanted)
    codec = Codec(make_compressor("top_k", 0.4))
    change = CHANGE._replace(shared=wanted[0], experts=wanted[1])
    site = make_site(codec, change, used=(True, True))
    slots = jnp.array([[0, 1]])
    own = owned(init_residual(codec, *zeros, slots=2))._replace(slots=slots)
    sent = Download(*zeros, slots, jnp.int32(1), jnp.int32(0))

    @jax.jit
    def again(own):
        own, upload = train_and_answer(site, own, sent, EXAMPLES, BATCHES)
        return own, decode(codec, (upload.shared, upload.experts), wanted)

    arrived = zeros
    for _ in range(12):
        own, once = again(own)
        arrived = jax.tree.map(jnp.add, arrived, once)
    for total, kept, each in zip(
        *map(jax.tree.leaves, (arrived, own.residual, wanted)), strict=True
    ):
        assert np.allclose(total + kept, 12 * each, atol=1e-4)
        assert np.abs(total - 12 * each).max() <= 5 * np.abs(each).max()


def test_without_error_feedback_it_is_lost():
    after, _ = answer(make_site(Codec(make_compressor("int8"), error_feedback=False)), owned())
    assert after.residual == ()


def test_experts_of_the_clients_own_need_no_compression():
    codec = Codec(make_compressor("int8"))
    change = CHANGE._replace(experts={})
    own = owned(({"w": jnp.zeros(2)}, {}))
    sent = down()._replace(experts={})
    _, upload = train_and_answer(make_site(codec, change), own, sent, EXAMPLES, BATCHES)
    assert upload.experts == {}


def test_what_is_kept_back_of_an_expert_goes_with_it():
    # Two groups of layers, and other experts in each. Two slots, four experts.
    kept = {
        "a": {"w": jnp.array([[10.0, 1.0], [12.0, 2.0]])},
        "b": {"w": jnp.array([21.0, 23.0])},
    }
    shared = {"w": jnp.array([1.0, 2.0, 3.0])}
    site = make_site()._replace(group={"a": 0, "b": 1}, experts=4)
    own = Own({}, {}, jnp.array([[0, 2], [1, 3]]), (shared, kept))
    new = jnp.array([[2, 4], [0, 1]])
    found = receive(site, own, new)
    # Of expert 2 it has what was in the second slot, in layer b that of expert 1; that of experts 0
    # and 3 is lost.
    assert found.residual[1]["a"]["w"].tolist() == [[12, 2], [0, 0]]
    assert found.residual[1]["b"]["w"].tolist() == [0, 21]
    assert found.residual[0] is shared
    assert found.slots is new
    assert receive(site, own._replace(residual=()), new).residual == ()


def test_an_empty_slot_keeps_nothing_back():
    # Empty slots have the same number: the residual of one must not accumulate in another.
    site, kept = make_site(), {"a": {"w": jnp.array([[1.0], [0.0]])}}
    own = Own({}, {}, jnp.array([[1, E]]), ({}, kept))
    assert not receive(site, own, jnp.array([[E, E]])).residual[1]["a"]["w"].any()


def test_label_shares_are_smoothed_by_hand():
    # (1 + 0.001) / 1.002, and 0.001 / 1.002.
    found = np.exp(log_shares(jnp.array([1.0, 0.0])))
    assert np.allclose(found, [1.001 / 1.002, 0.001 / 1.002], rtol=1e-6)
    assert found.sum() == pytest.approx(1)
