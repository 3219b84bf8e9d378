"""Fully connected layers, with kernel gradients in the form that XLA's CPU backend runs fastest.

`unless_vmapped` serves all layers that are computed otherwise for a client alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Num

from flexmoe_jax.types import Array

_OVER_ROWS = (((0,), (0,)), ((), ()))
_FEW_ROWS, _FEW = 64, 32
# Up to this many rows, the narrower operand is transposed in memory if it is wider than this.
_MEDIUM_ROWS, _WIDE = 1024, 64
# Kernel size that exceeds a core's cache, and the most rows whose outer products take no longer
# than the memory accesses.
_LARGE, _FEWEST_ROWS = 2**20, 16


def kernel_gradient(x: Num[Array, "T i"], dy: Num[Array, "T o"]) -> Num[Array, "i o"]:
    """Computes xᵀ dy of (T, i) and (T, o): the gradient of a kernel (i, o) that maps rows to rows.

    XLA's CPU backend is slowest at a sum over the first axis of both operands: it reaches a third
    of the rate of a plain product. If dy is much narrower than x, dy comes first, and the result
    (o, i) is transposed. Otherwise xᵀ is laid out in memory if that is little work (few rows). Up
    to a thousand rows, the narrower of two wide operands is laid out. A large gradient of few rows
    is never written to memory: it is a sum of outer products, computed in the loop that applies it.
    """
    if jax.default_backend() != "cpu":
        return lax.dot_general(x, dy, _OVER_ROWS)
    # The barriers keep the compiler from undoing these transpositions.
    (rows, width), features = x.shape, dy.shape[1]
    if rows <= _FEWEST_ROWS and width * features >= _LARGE and x.dtype == jnp.float32:
        return reduce(add, (x[row, :, None] * dy[row, None] for row in range(rows)))
    if width > 4 * features and (rows > _FEW_ROWS or features <= _FEW):
        return lax.optimization_barrier(lax.dot_general(dy, x, _OVER_ROWS)).T
    narrower_anew = rows <= _MEDIUM_ROWS and min(width, features) > _WIDE
    if rows <= _FEW_ROWS or (narrower_anew and width <= features):
        return lax.optimization_barrier(x.T) @ dy
    if narrower_anew:
        return lax.optimization_barrier(lax.optimization_barrier(dy.T) @ x).T
    return lax.optimization_barrier(lax.dot_general(x, dy, _OVER_ROWS))


def unless_vmapped(alone: Callable[..., Any], vmapped: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that runs `alone`, or `vmapped` in its place under `jax.vmap`."""
    function = custom_vmap(alone)

    @function.def_vmap
    def _(_size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda each: 0 if each else None, tuple(batched))
        made = jax.vmap(vmapped, axes)(*args)
        return made, jax.tree.map(lambda _: True, made)

    return function


def dot_general(x: Array, kernel: Array, dimensions: Any, *_: Any, **__: Any) -> Array:
    """Computes a dense layer's product (..., D) by (D, F), for `flax.linen.Dense(dot_general=)`."""
    if jax.default_backend() != "cpu":
        return lax.dot_general(x, kernel, dimensions)
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def product(x: Num[Array, "T i"], kernel: Num[Array, "i o"]) -> Num[Array, "T o"]:
    """Computes x @ kernel, with `kernel_gradient` in the backward pass."""
    return x @ kernel


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    return dy @ kernel.T, kernel_gradient(x, dy)


product.defvjp(_forward, _backward)


def as_inputs(*arrays: Array | None, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """Casts inputs (the first array) and parameters to the type of the inputs, or to `dtype`.

    For `flax.linen.Dense(promote_dtype=...)`, whose default promotes to the wider of the two types.
    Integer inputs become float32.
    """
    given: Any = arrays[0]
    kind = dtype or (given.dtype if jnp.issubdtype(given.dtype, jnp.floating) else jnp.float32)
    return [None if array is None else array.astype(kind) for array in arrays]


Dense = partial(nn.Dense, dot_general=dot_general, promote_dtype=as_inputs)
