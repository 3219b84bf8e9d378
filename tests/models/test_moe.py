from __future__ import annotations

from functools import cache, partial

import chex
import flax.linen as nn
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
    Model,
    MoEClassifier,
    MoELayer,
    Ownership,
    PersonalMixture,
    check_capacity,
    classifier,
    expert_mlp,
    lay_out,
    route,
)
from flexmoe_jax.models.moe import mean_so_far
from flexmoe_jax.types import PyTree

IMAGES = np.ones((1, 2, 2, 1), np.float32)
X = jax.random.normal(jax.random.key(1), (7, 2, 2, 1))
routed = jax.jit(route, static_argnums=2)


@cache
def made(**options: int) -> tuple[Model, PyTree]:
    """A small classifier of 4 experts, and its parameters with their marks."""
    model = classifier(MoEClassifier(MLP((6,)), classes=3, experts=4, hidden=5, **options))
    return model, jax.jit(model.init)(jax.random.key(0), IMAGES)


def test_top_1_by_hand():
    # Held: experts 0 and 2, logits ln 3 and ln 1: probabilities 3/4 and 1/4. Expert 1 has the
    # greatest logit and may not be chosen.
    logits = np.log(np.array([[3.0, 9.0, 1.0]], np.float32))
    routing = routed(logits, np.array([True, False, True]))
    np.testing.assert_allclose(routing.probability, [[0.75, 0.0, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(routing.combine, [[0.75, 0.0, 0.0]], rtol=1e-6)
    assert routing.selected.tolist() == [[True, False, False]]


def test_top_2_weights_sum_to_one():
    # Probabilities 3/6, 2/6, 1/6: the first two are chosen, and 3/5 and 2/5 remain.
    logits = np.log(np.array([[3.0, 2.0, 1.0]], np.float32))
    routing = routed(logits, np.ones(3, bool), 2)
    np.testing.assert_allclose(routing.combine, [[0.6, 0.4, 0.0]], atol=1e-6)


@given(
    logits=hnp.arrays(np.float32, (4, 5), elements=st.floats(-50, 50, width=32)),
    held=hnp.arrays(bool, 5),
    top_k=st.integers(1, 5),
)
def test_masked_experts_are_never_used(logits, held, top_k):
    routing = routed(logits, held, top_k)
    for part in (routing.probability, routing.combine, routing.selected):
        assert not np.asarray(part)[:, ~held].any()
    assert (np.asarray(routing.selected).sum(axis=1) == min(top_k, held.sum())).all()
    assert np.allclose(np.asarray(routing.probability).sum(axis=1), float(held.any()), atol=1e-5)


def test_a_masked_expert_gets_no_gradient():
    x, held = np.ones((2, 2, 2, 1), np.float32), np.array([True, False, True, False])
    model, marked = made()
    loss = jax.grad(lambda p: (model.apply(p, x, {"mixture": held})[0] ** 2).sum())
    gradient = jax.jit(loss)(nn.meta.unbox(marked))
    for leaf in jax.tree.leaves((gradient["expert"], gradient["gate"])):
        assert not np.asarray(leaf)[[1, 3]].any()
    assert np.abs(gradient["gate"]["kernel"]).max() > 0  # top-1 still teaches the gate


def test_experts_by_hand():
    # Expert 0 doubles what is positive; expert 1 gives its bias.
    experts = {
        "w_in": jnp.array([[[1.0]], [[0.0]]]),
        "b_in": jnp.zeros((2, 1)),
        "w_out": jnp.array([[[2.0]], [[1.0]]]),
        "b_out": jnp.array([[0.0], [5.0]]),
    }
    x = jnp.array([[3.0], [-1.0], [3.0]])
    out = jax.jit(expert_mlp)(experts, x, jnp.array([[1.0, 0.0], [0.5, 1.0], [0.5, 0.2]]))
    assert out.tolist() == [[6.0], [5.0], [4.0]]


def test_slots_compute_what_the_whole_model_computes():
    # A client with 2 of 4 experts in K = 3 slots: the same numbers as all 4 experts under a mask,
    # by the same module, which takes the size of its stacks from the parameters.
    model, marked = made(top_k=2)
    layout, params = lay_out(marked), nn.meta.unbox(marked)
    apply = jax.jit(model.apply)
    expected, all_of_them = apply(params, X, {"mixture": np.array([False, True, False, True])})
    parts = jax.device_get(layout.split(params))
    slots = np.array([1, 3, 0])
    cut = parts._replace(
        experts=jax.tree.map(lambda leaf: leaf[slots], parts.experts),
        gate=jax.tree.map(lambda leaf: leaf[slots], parts.gate),
    )
    held = {"mixture": np.array([True, True, False])}
    actual, routings = apply(layout.merge(cut), X, held)
    chex.assert_trees_all_close(actual, expected, atol=1e-6)
    mine, theirs = (np.asarray(each["mixture"].combine) for each in (routings, all_of_them))
    np.testing.assert_allclose(mine[:, :2], theirs[:, slots[:2]], atol=1e-6)


def test_shared_experts_work_on_every_example_and_belong_to_everybody():
    model, marked = made(shared_experts=2)
    layout, params = lay_out(marked), nn.meta.unbox(marked)
    assert set(layout.split(params).shared) == {"backbone", "head", "shared_expert"}
    # Without an expert of its own a client still has the shared ones.
    logits, routings = jax.jit(model.apply)(params, X, {"mixture": np.zeros(4, bool)})

    @jax.jit
    def by_hand(params):
        features = model.trunk(params, X)
        added = features + expert_mlp(params["shared_expert"], features, jnp.ones((7, 2)))
        return added @ params["head"]["kernel"] + params["head"]["bias"][None]

    expected = by_hand(params)
    chex.assert_trees_all_close(logits, expected, atol=1e-5)
    assert not routings["mixture"].selected.any()


def test_a_layer_takes_tokens_of_any_shape():
    layer = MoELayer(experts=4, hidden=5, top_k=2)
    x = jax.random.normal(jax.random.key(1), (3, 7, 6))
    params = {"params": jax.jit(layer.init)(jax.random.key(0), x)["params"]}
    y, left = jax.jit(partial(layer.apply, mutable=["routing"]))(params, x)
    held = {"held": {"mask": np.ones(4, bool)}}
    flat = jax.jit(layer.apply)(params | held, np.reshape(x, (21, 6)))
    chex.assert_trees_all_close(y, np.reshape(flat, (3, 7, 6)))
    assert left["routing"]["at"][0].combine.shape == (3, 7, 4)
    assert set(params["params"]) == {"expert", "gate"}


def test_split_and_merge_are_inverse():
    _, marked = made()
    layout, params = lay_out(marked), nn.meta.unbox(marked)
    parts = layout.split(params)
    assert set(parts.shared) == {"backbone", "head"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves((parts.experts, parts.gate))} == {4}
    chex.assert_trees_all_equal(layout.merge(parts), params)


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
    model = classifier(MoEClassifier(backbone, classes=3, experts=4))
    marked = jax.jit(model.init)(jax.random.key(0), IMAGES)
    layout, params = lay_out(marked, ownership), nn.meta.unbox(marked)
    split = layout.split(params)
    # What belongs to a MoE layer is told by layer.
    of_layer = [set(part.get("mixture", {})) for part in (split.experts, split.gate)]
    assert [set(split.shared), *of_layer, set(split.private)] == parts
    chex.assert_trees_all_equal(layout.merge(split), params)
    check_capacity(layout, [4, 4])


def test_owners_that_cannot_be_are_refused():
    _, marked = made()
    with pytest.raises(InputError, match=r"^model\.private=hed: .*head"):
        lay_out(marked, Ownership(("hed",)))
    layout = lay_out(marked, Ownership(("expert",)))
    with pytest.raises(InputError, match=r"^model\.private=expert: .* 2 of 4 .*capacity=4"):
        check_capacity(layout, [4, 2])
    with pytest.raises(InputError, match=r"^model\.private=gate: .*: .*model\.gate=private$"):
        check_capacity(lay_out(marked, Ownership(("gate",))), [4, 2])


def test_a_personal_mixture_by_hand():
    model = PersonalMixture(MLP((2,)), MLP((2,)))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def by_hand(params):
        shared, local = (MLP((2,)).apply({"params": params[p]}, x) for p in ("shared", "local"))
        logits = shared @ params["mixture"]["kernel"] + params["mixture"]["bias"][None]
        weight = jax.nn.softmax(logits)
        return weight[:, :1] * shared + weight[:, 1:] * local

    expected = by_hand(variables["params"])
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), expected, atol=1e-6)


def test_gates_see_the_mean_so_far_by_hand():
    x = np.array([[[3.0, 0.0], [1.0, 4.0], [-1.0, 2.0]]], np.float32)
    # Means (3, 0), (2, 2), (1, 2); mean squares 4.5, 4, 2.5.
    expected = [[3 / 4.5**0.5, 0], [1, 1], [1 / 2.5**0.5, 2 / 2.5**0.5]]
    np.testing.assert_allclose(jax.jit(mean_so_far)(x)[0], expected, rtol=1e-5)


def test_a_gate_with_context_does_not_look_ahead():
    layer = MoELayer(3, hidden=4, context=True)
    x = jax.random.normal(jax.random.key(0), (1, 6, 5))
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]
    run = jax.jit(lambda x: layer.apply({"params": params}, x, mutable=["routing"]))
    later = np.concatenate([x[:, :4], x[:, 4:] + 1.0], axis=1)
    both = (jax.tree.leaves(jax.device_get(run(x))) for x in (x, later))
    for before, after in zip(*both, strict=True):
        np.testing.assert_allclose(before[:, :4], after[:, :4], rtol=1e-6)
