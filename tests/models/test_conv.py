from __future__ import annotations

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest

from flexmoe_jax.errors import InputError
from flexmoe_jax.models import (
    Conv,
    conv_auto,
    conv_direct,
    conv_lax,
    conv_matmul,
    conv_winograd,
    convolution,
)

# Odd and even sizes, with a pixel left over or none; kernels below, at and above the stride.
CASES = [
    ((6, 8), 3, 1, "SAME"),
    ((6, 8), 3, 2, "SAME"),
    ((7, 5), 3, 1, "VALID"),
    ((7, 5), 3, 2, "SAME"),
    ((7, 8), 3, 2, "VALID"),
    ((8, 6), 1, 1, "SAME"),
    ((8, 7), 1, 2, "SAME"),
    ((9, 6), 2, 2, "VALID"),
    ((9, 6), 2, 3, "SAME"),
    ((9, 8), 5, 1, "SAME"),
    ((9, 8), 5, 2, "VALID"),
    ((10, 9), 4, 3, "SAME"),
]


@partial(jax.jit, static_argnums=(0, 3, 4))
def value_and_gradients(conv, x, kernel, stride, padding):
    def loss(x, kernel):
        y = conv(x, kernel, stride, padding)
        # Unequal weights: a gradient in the wrong place shows.
        return jnp.vdot(y, jnp.sin(jnp.arange(y.size).reshape(y.shape))), y

    gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)
    return y, gradients


WINOGRAD_CASES = [
    ((6, 8), 3, 1, "SAME"),
    ((7, 5), 3, 1, "SAME"),
    ((7, 6), 3, 1, "VALID"),
    ((3, 4), 3, 1, "VALID"),
    ((1, 2), 3, 1, "SAME"),
    ((6, 8), 3, 2, "SAME"),  # as the other form does it, and so the next two
    ((6, 8), 2, 1, "SAME"),
]


@pytest.mark.parametrize(
    ("conv", "size", "kernel", "stride", "padding"),
    [(conv, *case) for conv in (conv_matmul, conv_direct) for case in CASES]
    + [(conv_winograd, *case) for case in WINOGRAD_CASES],
)
def test_every_form_equals_lax_in_value_and_gradient(conv, size, kernel, stride, padding):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, *size, 3))
    weights = jax.random.normal(keys[1], (kernel, kernel, 3, 4))
    ours = value_and_gradients(conv, x, weights, (stride, stride), padding)
    theirs = value_and_gradients(conv_lax, x, weights, (stride, stride), padding)
    chex.assert_trees_all_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_automatic_takes_what_pays():
    def program(size, channels, stride=1):
        x, kernel = jnp.zeros((2, size, size, channels)), jnp.zeros((3, 3, channels, 8))
        return str(
            jax.make_jaxpr(conv_auto, static_argnums=(2, 3))(x, kernel, (stride,) * 2, "SAME")
        )

    def products_and_convolutions(*layer):
        return [
            program(*layer).count(f" = {op}[") for op in ("dot_general", "conv_general_dilated")
        ]

    assert products_and_convolutions(8, 32) == [16, 0]  # Winograd's
    assert products_and_convolutions(7, 32) == [0, 1]
    assert products_and_convolutions(8, 16) == [0, 1]
    assert products_and_convolutions(8, 3) == [1, 0]
    assert products_and_convolutions(8, 32, 2) == [1, 0]


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_direct_form_becomes_products_where_there_is_a_client_axis(axes):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (3,) * (axes[0] == 0) + (2, 7, 6, 3))
    kernels = jax.random.normal(keys[1], (3,) * (axes[1] == 0) + (3, 3, 3, 4))

    def train(conv):
        def gradients(x, kernel):
            return value_and_gradients(conv, x, kernel, (2, 1), "SAME")

        return jax.vmap(gradients, axes)

    chex.assert_trees_all_close(
        train(conv_direct)(x, kernels), train(conv_lax)(x, kernels), atol=2e-5, rtol=2e-5
    )
    # Grouped convolutions, one group for each client, must not occur.
    programs = [str(jax.make_jaxpr(train(conv))(x, kernels)) for conv in (conv_direct, conv_lax)]
    grouped = [bool(re.search("group_count=[^1]", program)) for program in programs]
    assert grouped == [False, axes == (0, 0)]


def test_unequal_strides_and_a_kernel_that_is_not_square():
    keys = jax.random.split(jax.random.key(1))
    x, weights = (
        jax.random.normal(keys[0], (1, 7, 9, 2)),
        jax.random.normal(keys[1], (3, 2, 2, 5)),
    )
    ours = value_and_gradients(conv_matmul, x, weights, (2, 1), "SAME")
    chex.assert_trees_all_close(
        ours, value_and_gradients(conv_lax, x, weights, (2, 1), "SAME"), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize(("conv", "stride"), [(conv_matmul, 2), (conv_winograd, 1)])
def test_kernels_may_carry_a_client_axis(conv, stride):
    keys = jax.random.split(jax.random.key(2))
    x = jax.random.normal(keys[0], (3, 2, 6, 6, 2))
    weights = jax.random.normal(keys[1], (3, 3, 3, 2, 4))

    @partial(jax.jit, static_argnums=0)
    def gradients(conv):
        def loss(x, kernel):
            return (conv(x, kernel, (stride, stride), "SAME") ** 2).sum()

        return jax.vmap(jax.grad(loss, argnums=(0, 1)))(x, weights)

    chex.assert_trees_all_close(gradients(conv), gradients(conv_lax), atol=1e-3, rtol=1e-4)


def test_layer_by_hand():
    # 2×2 ones over [[1, 2], [3, 4]], VALID: 1 + 2 + 3 + 4 = 10, plus a bias of 0.5.
    layer = Conv(1, kernel_size=2, padding="VALID", use_bias=True)
    params = {"kernel": jnp.ones((2, 2, 1, 1)), "bias": jnp.array([0.5])}
    image = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    chex.assert_trees_all_close(
        layer.apply({"params": params}, image), jnp.full((1, 1, 1, 1), 10.5)
    )


def test_unknown_implementation_is_refused():
    assert convolution("winograd") is conv_winograd
    with pytest.raises(InputError, match=r"model\.conv=fft: choose one of auto, matmul, direct, w"):
        convolution("fft")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_on_accelerators_a_client_axis_becomes_batched_products(platform):
    def loss(kernel, x):
        return (conv_matmul(x, kernel, (2, 2), "SAME") ** 2).sum()

    clients = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))
    traced = clients.trace(jnp.zeros((7, 3, 3, 4, 5)), jnp.zeros((7, 6, 9, 9, 4)))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    # Forward, kernel gradient, image gradient: products over the clients, and no convolution.
    assert program.count("stablehlo.dot_general") == 3
    assert program.count("batching_dims = [0] x [0]") == 3
    assert "stablehlo.convolution" not in program
