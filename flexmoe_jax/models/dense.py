"""Fully connected layers, and gradients of kernels in the form that suits XLA's CPU backend."""

from __future__ import annotations

from functools import partial, reduce
from operator import add
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Num

from flexmoe_jax.types import Array

_OVER_ROWS = (((0,), (0,)), ((), ()))
_FEW_ROWS, _FEW = 64, 32
# Up to so many rows the narrower operand is laid out anew, if it is wider than so much.
_MEDIUM_ROWS, _WIDE = 1024, 64
# Kernels that no core's cache holds, and rows whose outer products take no longer than memory does.
_LARGE, _FEWEST_ROWS = 2**20, 16


def kernel_gradient(x: Num[Array, "T i"], dy: Num[Array, "T o"]) -> Num[Array, "i o"]:
    """xᵀ dy of (T, i) and (T, o): the gradient of a kernel (i, o) that maps rows to rows.

    A sum over the first axis of both its operands is what XLA's CPU backend computes worst, at a
    third of the rate of a plain product. Where dy is much the narrower, it comes first, so that the
    result is (o, i) and turned round. Else xᵀ is laid out if that is little work (few rows), and up
    to a thousand rows the narrower of two wide ones. A large gradient of few rows is not written to
    memory at all: as a sum of outer products it is computed in the loop that applies it.
    """
    if jax.default_backend() != "cpu":
        return lax.dot_general(x, dy, _OVER_ROWS)
    # The barriers keep the compiler from turning the products round again.
    (rows, width), features = x.shape, dy.shape[1]
    if rows <= _FEWEST_ROWS and width * features >= _LARGE and x.dtype == jnp.float32:
        return reduce(add, (x[row, :, None] * dy[row] for row in range(rows)))
    if width > 4 * features and (rows > _FEW_ROWS or features <= _FEW):
        return lax.optimization_barrier(lax.dot_general(dy, x, _OVER_ROWS)).T
    narrower_anew = rows <= _MEDIUM_ROWS and min(width, features) > _WIDE
    if rows <= _FEW_ROWS or (narrower_anew and width <= features):
        return lax.optimization_barrier(x.T) @ dy
    if narrower_anew:
        return lax.optimization_barrier(lax.optimization_barrier(dy.T) @ x).T
    return lax.optimization_barrier(lax.dot_general(x, dy, _OVER_ROWS))


def dot_general(x: Array, kernel: Array, dimensions: Any, *_: Any, **__: Any) -> Array:
    """A dense layer's product of (..., D) and (D, F), for `flax.linen.Dense(dot_general=...)`."""
    if jax.default_backend() != "cpu":
        return lax.dot_general(x, kernel, dimensions)
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def product(x: Num[Array, "T i"], kernel: Num[Array, "i o"]) -> Num[Array, "T o"]:
    """The product x @ kernel, whose backward pass is `kernel_gradient`."""
    return x @ kernel


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    return dy @ kernel.T, kernel_gradient(x, dy)


product.defvjp(_forward, _backward)


def as_inputs(*arrays: Array | None, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """Inputs, which come first, and parameters in the type of the inputs, or in `dtype`, if given.

    For `flax.linen.Dense(promote_dtype=...)`, whose own takes the wider one of both. Inputs that
    are whole numbers become float32.
    """
    given: Any = arrays[0]
    kind = dtype or (given.dtype if jnp.issubdtype(given.dtype, jnp.floating) else jnp.float32)
    return [None if array is None else array.astype(kind) for array in arrays]


Dense = partial(nn.Dense, dot_general=dot_general, promote_dtype=as_inputs)
