from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexmoe_jax.errors import InputError
from flexmoe_jax.models import (
    MLP,
    MoEClassifier,
    MoELayer,
    Ownership,
    PersonalMixture,
    balance_loss,
    check_ownership,
    expert_mlp,
    merge_params,
    route,
    router_z_loss,
    split_params,
)


def test_top_1_by_hand():
    # Held: experts 0 and 2, logits ln 3 and ln 1: probabilities 3/4 and 1/4. Expert 1 has the
    # greatest logit and may not be chosen.
    logits = jnp.log(jnp.array([[3.0, 9.0, 1.0]]))
    routing = route(logits, jnp.array([True, False, True]))
    chex.assert_trees_all_close(routing.probability, jnp.array([[0.75, 0.0, 0.25]]))
    chex.assert_trees_all_close(routing.combine, jnp.array([[0.75, 0.0, 0.0]]))
    assert routing.selected.tolist() == [[True, False, False]]


def test_top_2_weights_sum_to_one():
    # Probabilities 3/6, 2/6, 1/6: the first two are chosen, and 3/5 and 2/5 remain.
    logits = jnp.log(jnp.array([[3.0, 2.0, 1.0]]))
    routing = route(logits, jnp.ones(3, bool), top_k=2)
    chex.assert_trees_all_close(routing.combine, jnp.array([[0.6, 0.4, 0.0]]), atol=1e-6)


@given(
    logits=hnp.arrays(np.float32, (4, 5), elements=st.floats(-50, 50, width=32)),
    held=hnp.arrays(bool, 5),
    top_k=st.integers(1, 5),
)
def test_masked_experts_are_never_used(logits, held, top_k):
    routing = route(jnp.asarray(logits), jnp.asarray(held), top_k)
    for part in (routing.probability, routing.combine, routing.selected):
        assert not np.asarray(part)[:, ~held].any()
    assert (np.asarray(routing.selected).sum(axis=1) == min(top_k, held.sum())).all()
    assert np.allclose(np.asarray(routing.probability).sum(axis=1), float(held.any()), atol=1e-5)


def test_a_masked_expert_gets_no_gradient():
    model = MoEClassifier(MLP((6,)), classes=3, experts=4, hidden=5)
    x, held = jnp.ones((2, 2, 2, 1)), jnp.array([True, False, True, False])
    params = jax.jit(model.init)(jax.random.key(0), x, held)["params"]
    loss = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, x, held)[0] ** 2).sum()))
    gradient = loss(params)
    for leaf in jax.tree.leaves((gradient["expert"], gradient["gate"])):
        assert not leaf[jnp.array([1, 3])].any()
    assert jnp.abs(gradient["gate"]["kernel"]).max() > 0  # top-1 still teaches the gate


def test_balance_loss_by_hand():
    # Two of three experts held; four examples, the last is padding. Of the three that count, two
    # go to expert 0, one to expert 1: f = (2/3, 1/3). Probabilities 0.75, 0.75, 0.25 for expert 0:
    # p = (7/12, 5/12). 2 · (2/3 · 7/12 + 1/3 · 5/12) = 2 · 19/36 = 19/18.
    probability = jnp.array([0.75, 0.75, 0.25, 0.9])
    logits = jnp.stack([jnp.log(probability), jnp.log(1 - probability), jnp.full(4, 7.0)], axis=1)
    held, valid = jnp.array([True, True, False]), jnp.array([1.0, 1.0, 1.0, 0.0])
    routing = route(logits, held)
    assert balance_loss(routing, held, valid) == pytest.approx(19 / 18, rel=1e-5)
    # The two held probabilities sum to 1, so log z = 0 for all that count.
    assert router_z_loss(routing, held, valid) == pytest.approx(0.0, abs=1e-9)
    # Adding 2 to each logit moves log z to 2, and its square to 4.
    assert router_z_loss(route(logits + 2, held), held, valid) == pytest.approx(4.0, rel=1e-5)


def test_experts_by_hand():
    # Expert 0 doubles what is positive; expert 1 gives its bias.
    experts = {
        "w_in": jnp.array([[[1.0]], [[0.0]]]),
        "b_in": jnp.zeros((2, 1)),
        "w_out": jnp.array([[[2.0]], [[1.0]]]),
        "b_out": jnp.array([[0.0], [5.0]]),
    }
    out = expert_mlp(experts, jnp.array([[3.0], [-1.0]]))
    assert out.tolist() == [[[6.0], [5.0]], [[0.0], [5.0]]]


def test_slots_compute_what_the_whole_model_computes():
    # A client with 2 of 4 experts in K = 3 slots: the same numbers as all 4 experts under a mask.
    model = MoEClassifier(MLP((6,)), classes=3, experts=4, hidden=5, top_k=2)
    x = jax.random.normal(jax.random.key(1), (7, 2, 2, 1))
    params = jax.jit(model.init)(jax.random.key(0), x, jnp.ones(4, bool))["params"]
    expected, _ = model.apply({"params": params}, x, jnp.array([False, True, False, True]))
    parts = split_params(params)
    slots = jnp.array([1, 3, 0])
    cut = parts._replace(
        experts=jax.tree.map(lambda leaf: leaf[slots], parts.experts),
        gate=jax.tree.map(lambda leaf: leaf[slots], parts.gate),
    )
    held = jnp.array([True, True, False])
    actual, _ = model.clone(experts=3).apply({"params": merge_params(cut)}, x, held)
    chex.assert_trees_all_close(actual, expected, atol=1e-6)


def test_shared_experts_work_on_every_example_and_belong_to_everybody():
    model = MoEClassifier(MLP((6,)), classes=3, experts=4, hidden=5, shared_experts=2)
    x = jax.random.normal(jax.random.key(1), (7, 2, 2, 1))
    params = jax.jit(model.init)(jax.random.key(0), x, jnp.ones(4, bool))["params"]
    parts = split_params(params)
    assert set(parts.shared) == {"backbone", "head", "shared_expert"}
    # Without an expert of its own a client still has the shared ones.
    logits, routing = model.apply({"params": params}, x, jnp.zeros(4, bool))
    features = model.apply({"params": params}, x, method="features")
    added = features + expert_mlp(params["shared_expert"], features).sum(axis=1)
    expected = added @ params["head"]["kernel"] + params["head"]["bias"]
    chex.assert_trees_all_close(logits, expected, atol=1e-5)
    assert not routing.selected.any()


def test_a_layer_takes_tokens_of_any_shape():
    layer = MoELayer(experts=4, hidden=5, top_k=2)
    x = jax.random.normal(jax.random.key(1), (3, 7, 6))
    params = layer.init(jax.random.key(0), x)
    y, routing = layer.apply(params, x)
    flat, _ = layer.apply(params, x.reshape(21, 6), jnp.ones(4, bool))
    chex.assert_trees_all_close(y, flat.reshape(3, 7, 6))
    assert routing.combine.shape == (3, 7, 4)
    assert set(params["params"]) == {"expert", "gate"}


def test_split_and_merge_are_inverse():
    model = MoEClassifier(MLP((6,)), classes=3, experts=4)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2, 2, 1)), jnp.ones(4, bool))[
        "params"
    ]
    parts = split_params(params)
    assert set(parts.shared) == {"backbone", "head"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves((parts.experts, parts.gate))} == {4}
    chex.assert_trees_all_equal(merge_params(parts), params)


@pytest.mark.parametrize(
    ("ownership", "parts"),
    [
        (Ownership(), [{"backbone", "head"}, {"expert"}, {"gate"}, set()]),
        (Ownership(shared_gate=True), [{"backbone", "head"}, {"expert", "gate"}, set(), set()]),
        (Ownership(("head",)), [{"backbone"}, {"expert"}, {"gate"}, {"head"}]),
        (
            Ownership(("backbone/local", "backbone/mixture", "head")),
            [{"backbone"}, {"expert"}, {"gate"}, {"backbone", "head"}],
        ),
        (
            Ownership(("backbone", "expert", "head")),
            [set(), set(), {"gate"}, {"backbone", "expert", "head"}],
        ),
    ],
)
def test_owners(ownership, parts):
    backbone = PersonalMixture(MLP((6,)), MLP((6,)))
    model = MoEClassifier(backbone, classes=3, experts=4)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2, 2, 1)), jnp.ones(4, bool))
    params = params["params"]
    split = split_params(params, ownership)
    assert [set(part) for part in split] == parts
    chex.assert_trees_all_equal(merge_params(split), params)
    check_ownership(params, ownership, [4, 4])


def test_owners_that_cannot_be_are_refused():
    model = MoEClassifier(MLP((6,)), classes=3, experts=4)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2, 2, 1)), jnp.ones(4, bool))
    for private, line in (("hed", "model.private=hed: .*head"), ("expert", "give all clients all")):
        with pytest.raises(InputError, match=line):
            check_ownership(params["params"], Ownership((private,)), [4, 2])


def test_a_personal_mixture_by_hand():
    model = PersonalMixture(MLP((2,)), MLP((2,)))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    variables = model.init(jax.random.key(0), x)
    params = variables["params"]
    shared, local = (MLP((2,)).apply({"params": params[part]}, x) for part in ("shared", "local"))
    logits = shared @ params["mixture"]["kernel"] + params["mixture"]["bias"]
    weight = jax.nn.softmax(logits)
    expected = weight[:, :1] * shared + weight[:, 1:] * local
    assert jnp.allclose(model.apply(variables, x), expected, atol=1e-6)
