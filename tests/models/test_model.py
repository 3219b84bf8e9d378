"""Linen modules as models: MoE layers are found, masked and cut to slots at any depth."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.errors import InputError
from flexmoe_jax.models import MLP, Marked, MoELayer, from_linen, lay_out
from flexmoe_jax.types import Array

X = jax.random.normal(jax.random.key(1), (5, 6))


class Outer(nn.Module):
    """A layer inside of another module, and one beside it."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x + MoELayer(4, 3, name="within")(x)


class Two(nn.Module):
    """Two MoE layers, the second by a name of the user's own."""

    last: str = "last"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Outer(name="outer")(nn.Dense(6)(x))
        return nn.Dense(3)(h + MoELayer(4, 2, top_k=2, name=self.last)(h))


@pytest.mark.parametrize("last", ["last", "mixture", "expert"])
def test_layers_are_masked_one_by_one_wherever_they_stand(last):
    model = from_linen(Two(last))
    apply, marked = jax.jit(model.apply), jax.jit(model.init)(jax.random.key(0), X)
    layout, params = lay_out(marked), jax.device_get(nn.meta.unbox(marked))
    assert (layout.experts, set(layout.layers)) == (4, {last, "outer/within"})
    held = {last: np.array([0, 1, 1, 0], bool), "outer/within": np.array([1, 0, 0, 0], bool)}
    outputs, routings = jax.device_get(apply(params, X, held))
    assert {name: routing.selected.any(axis=0).tolist() for name, routing in routings.items()} == {
        name: mask.tolist() for name, mask in held.items()
    }
    # The same module on the stacks of a client that holds two in three slots, others in each layer.
    slots = {last: np.array([1, 2, 0]), "outer/within": np.array([0, 3, 3])}
    parts = layout.split(params)
    cut = {
        part: {
            name: jax.tree.map(lambda leaf, s=slots[name]: leaf[s], stack)
            for name, stack in getattr(parts, part).items()
        }
        for part in ("experts", "gate")
    }
    filled = {last: np.array([1, 1, 0], bool), "outer/within": np.array([1, 0, 0], bool)}
    found, _ = apply(layout.merge(parts._replace(**cut)), X, filled)
    chex.assert_trees_all_close(found, outputs, atol=1e-6)


def test_all_experts_may_be_used_where_no_mask_says_otherwise():
    model = from_linen(Two())
    apply, marked = jax.jit(model.apply), jax.jit(model.init)(jax.random.key(0), X)
    everything = {name: np.ones(4, bool) for name in lay_out(marked).layers}
    chex.assert_trees_all_equal(apply(marked, X, {}), apply(marked, X, everything))


class Halves(nn.Module):
    """A trunk and a head."""

    def setup(self) -> None:
        self.first, self.second, self.layer = nn.Dense(6), nn.Dense(3), MoELayer(4, 2)

    def features(self, x: Array) -> Array:
        return self.first(x)

    def outputs(self, h: Array) -> Array:
        return self.second(h + self.layer(h))

    def __call__(self, x: Array) -> Array:
        return self.outputs(self.features(x))


def test_trunk_and_head_are_the_whole_and_inputs_may_go_through_a_function_first():
    whole = from_linen(Halves())
    model = from_linen(Halves(), trunk="features", head="outputs")
    params = model.init(jax.random.key(0), X)
    chex.assert_trees_all_equal(params, whole.init(jax.random.key(0), X))
    expected = whole.apply(params, X, {})
    chex.assert_trees_all_equal(model.apply(params, X, {}), expected)
    chex.assert_trees_all_equal(model.trunk(params, X), X @ params["first"]["kernel"])
    after = model.after(lambda x: x.astype(jnp.float32) / 4)
    integers = jnp.round(4 * X).astype(jnp.int8)
    chex.assert_trees_all_equal(
        after.apply(params, integers, {}), model.apply(params, integers / 4, {})
    )
    chex.assert_trees_all_equal_shapes(after.init(jax.random.key(0), integers), params)


def test_a_model_keeps_parameters_alone():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.BatchNorm(use_running_average=False)(x)

    with pytest.raises(InputError, match=r"^model=Normed with batch_stats: .*parameters alone"):
        from_linen(Normed()).init(jax.random.key(0), X)


def test_a_model_without_experts_is_all_shared():
    model = from_linen(MLP((4,)))
    marked = model.init(jax.random.key(0), X)
    layout = lay_out(marked)
    assert (layout.experts, layout.layers, set(layout.owner)) == (1, (), {"shared"})
    assert model.apply(marked, X, {})[1] == {}


def test_layers_in_a_scan_are_refused():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            scanned = nn.scan(
                lambda layer, h, _: (h + layer(h), None),
                variable_axes={"params": 0, "routing": 0},
                split_rngs={"params": True},
                length=2,
            )
            return scanned(MoELayer(4, 3), x, None)[0]

    with pytest.raises(InputError, match=r"^model=nn\.scan: MoE layers must stand one by one"):
        from_linen(Stack()).init(jax.random.key(0), X)


def test_a_mark_is_a_box_around_the_parameter():
    box = Marked(jnp.ones(2), "expert")
    assert box.replace_boxed(3) == Marked(3, "expert")
    assert jax.tree.leaves(box)[0] is box.unbox()
