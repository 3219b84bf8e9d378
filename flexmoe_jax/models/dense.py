"""Fully connected layers whose backward pass suits XLA's CPU backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax import lax

from flexmoe_jax.types import Array

_FEW = 32


def dot_general(x: Array, kernel: Array, dimensions: Any, *_: Any, **__: Any) -> Array:
    """The product of a dense layer on (B, D) and (D, F), for `flax.linen.Dense(dot_general=...)`.

    XLA's CPU backend computes the kernel's gradient, which sums over the first axis of both its
    operands, at a third of the rate of a plain product. Here one of them is turned round first: the
    kernel's gradient is, for many features, (xᵀ) dy with xᵀ laid out, and for few (dyᵀ x)ᵀ.
    """
    if x.ndim != 2 or jax.default_backend() != "cpu":
        return lax.dot_general(x, kernel, dimensions)
    return _product(x, kernel)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    # The barriers keep the compiler from turning the products round again.
    if kernel.shape[1] <= _FEW:
        d_kernel = lax.optimization_barrier(lax.dot_general(dy, x, (((0,), (0,)), ((), ())))).T
    else:
        d_kernel = lax.optimization_barrier(x.T) @ dy
    return dy @ kernel.T, d_kernel


_product.defvjp(_forward, _backward)

Dense = partial(nn.Dense, dot_general=dot_general)
