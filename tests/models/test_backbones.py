from __future__ import annotations

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.errors import InputError
from flexmoe_jax.models import Dense, conv_lax, make_backbone, max_pool
from flexmoe_jax.models.backbones import GroupNorm


@pytest.mark.parametrize(
    ("name", "options", "features"),
    [
        ("mlp", {}, 64),
        ("mlp", {"widths": (16,)}, 16),
        ("convnet", {}, 64),
        ("convnet", {"widths": (8, 12), "groups": 4}, 12),
        ("cnn", {}, 64),
        ("cnn", {"widths": (4, 8, 12), "groups": 4}, 12),
        ("resnet", {}, 64),
        ("resnet", {"depth": 14, "widths": (4,)}, 16),
    ],
)
@pytest.mark.parametrize("image", [(8, 8, 1), (9, 7, 3)])
def test_features_have_the_stated_width(name, options, features, image):
    backbone = make_backbone(name, **options)
    x = jnp.zeros((2, *image))
    y, _ = jax.eval_shape(backbone.init_with_output, jax.random.key(1), x)
    assert y.shape == (2, features)


@pytest.mark.parametrize("name", ["mlp", "convnet", "cnn", "resnet"])
def test_features_differ_from_image_to_image_and_are_numbers(name):
    options = {"depth": 8, "widths": (4,)} if name == "resnet" else {"widths": (4, 8)}
    backbone = make_backbone(name, **options)
    x = 100 * jax.random.normal(jax.random.key(0), (2, 9, 7, 3))
    y, _ = jax.jit(backbone.init_with_output)(jax.random.key(1), x)
    assert jnp.isfinite(y).all()
    assert not jnp.allclose(y[0], y[1])


def test_resnet_depth_counts_its_layers():
    backbone = make_backbone("resnet", depth=20)
    params = jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    # Depth 20: one stem, 3 stages × 3 blocks × 2 convolutions, and the head that is not here.
    assert sum(name.startswith("ResidualBlock") for name in params) == 9


def test_both_convolutions_give_the_same_network():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    ours, theirs = (make_backbone("resnet", depth=8, **own) for own in ({}, {"conv": conv_lax}))
    params = jax.jit(ours.init)(jax.random.key(1), x)
    actual, expected = jax.jit(ours.apply)(params, x), jax.jit(theirs.apply)(params, x)
    assert jnp.allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("renset", {}, r"model\.backbone=renset: did you mean resnet\?"),
        ("resnet", {"depth": 9}, r"model\.depth=9: choose 6n\+2"),
        ("convnet", {"groups": 5}, r"model\.groups=5: choose a divisor"),
        ("mlp", {"widths": (0,)}, r"model\.widths=\(0,\): choose whole numbers of 1 or more"),
    ],
)
def test_bad_options_are_refused(name, options, line):
    with pytest.raises(InputError, match=line):
        make_backbone(name, **options)


def test_an_image_too_small_to_be_halved_is_refused():
    backbone = make_backbone("cnn", widths=(4, 4, 4, 4, 8))
    line = r"model\.widths=\(4, 4, 4, 4, 8\): 4 halvings leave nothing of an image of \(8, 8\)"
    with pytest.raises(InputError, match=line):
        jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(("width", "features"), [(17, 10), (17, 40), (2**15 + 1, 32)])
def test_dense_is_that_of_flax(width, features):
    x = jax.random.normal(jax.random.key(0), (5, width))

    @partial(jax.jit, static_argnums=0)
    def value_and_slopes(layer, params, x):
        def loss(params, x):
            return (layer.apply(params, x) ** 3).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    ours, theirs = Dense(features), nn.Dense(features)
    params = jax.jit(theirs.init)(jax.random.key(1), x)
    chex.assert_trees_all_equal_structs(jax.eval_shape(ours.init, jax.random.key(1), x), params)
    chex.assert_trees_all_close(
        value_and_slopes(ours, params, x), value_and_slopes(theirs, params, x), rtol=1e-4, atol=1e-4
    )


def test_max_pool_is_that_of_flax():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    flax_pool = partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    np.testing.assert_array_equal(jax.jit(max_pool)(x), jax.jit(flax_pool)(x))
    gradient = jax.jit(jax.grad(lambda x: (max_pool(x) ** 2).sum()))(x)
    expected = jax.jit(jax.grad(lambda x: (flax_pool(x) ** 2).sum()))(x)
    assert (gradient == expected).all()


def test_max_pool_shares_its_gradient_among_equals():
    # Windows with 2 and with 4 greatest numbers; the last row fills no window.
    x = np.array([[3.0, 3, 5, 5], [1, 2, 5, 5], [9, 9, 9, 9]], np.float32).reshape(1, 3, 4, 1)
    gradient = np.asarray(jax.jit(jax.grad(lambda x: (max_pool(x) ** 2).sum()))(x))[0, :, :, 0]
    expected = [[3, 3, 2.5, 2.5], [0, 0, 2.5, 2.5], [0, 0, 0, 0]]
    assert gradient.tolist() == expected


def test_group_norm_is_that_of_flax():
    rng = np.random.default_rng(0)
    x = 2 + rng.standard_normal((3, 5, 4, 12), np.float32)
    ours, flax = GroupNorm(4), nn.GroupNorm(4)
    weights = rng.standard_normal((2, 12), np.float32)
    params = {"params": {"scale": weights[0], "bias": weights[1]}}
    made = jax.eval_shape(ours.init, jax.random.key(0), x)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)

    @partial(jax.jit, static_argnums=0)
    def normalised_and_slopes(model, x, params):
        def loss(x, params):
            y = model.apply(params, x)
            return (y**3).sum(), y

        slopes, y = jax.grad(loss, (0, 1), has_aux=True)(x, params)
        return y, slopes

    chex.assert_trees_all_close(
        *(normalised_and_slopes(model, x, params) for model in (ours, flax)), rtol=1e-4, atol=1e-4
    )
