from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.errors import InputError
from flexmoe_jax.models import Dense, MoELayer, Transformer
from flexmoe_jax.models.transformer import rotate

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def value_and_slope(function, dy, *inputs):
    """A function's value, and for each input the gradient of the value's product with dy."""
    value, back = jax.vjp(function, *inputs)
    return value, back(dy)


def test_rotation_turns_pairs_by_angles_that_grow_with_the_position():
    x, dy = draw(2, 5, 3, 4), draw(2, 5, 3, 4)
    turned, slope = jax.jit(value_and_slope, static_argnums=0)(rotate, dy, x)
    angle = np.arange(5)[:, None] * np.array([1.0, 0.01])
    factor = np.exp(1j * angle)[None, :, None]

    def turn(values, by):
        pairs = (np.asarray(values[..., :2]) + 1j * np.asarray(values[..., 2:])) * by
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    chex.assert_trees_all_close(turned, turn(x, factor), atol=1e-5)
    # The gradient is turned back.
    chex.assert_trees_all_close(slope[0], turn(dy, factor.conj()), atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 3, 5), (40, 30, 12), (6, 20), (2, 3, 4, 5)])
@pytest.mark.parametrize("features", [2, 12, 40])
def test_a_dense_layer_has_the_gradients_of_its_product(shape, features):
    x, dy = draw(*shape), draw(*shape[:-1], features)
    kernel = draw(shape[-1], features)
    layer = Dense(features, use_bias=False)

    def apply(kernel, x):
        return layer.apply({"params": {"kernel": kernel}}, x)

    found, expected = (
        jax.jit(value_and_slope, static_argnums=0)(function, dy, kernel, x)
        for function in (apply, lambda kernel, x: jnp.tensordot(x, kernel, 1))
    )
    chex.assert_trees_all_close(found, expected, atol=1e-4, rtol=1e-5)


def test_texts_longer_than_learnt_positions_are_refused():
    module = Transformer(experts=0, depth=1, width=8, heads=1, positions="learnt", length=4)
    with pytest.raises(InputError, match=r"^tokens=5: positions are learnt for up to 4"):
        module.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))


def test_a_whole_example_has_no_tokens_to_see():
    with pytest.raises(InputError, match=r"^context=True: "):
        MoELayer(2, whole=True, context=True).init(jax.random.key(0), jnp.zeros((1, 5, 8)))
