"""3×3 convolutions of stride 1 by Winograd's minimal filtering F(2×2, 3×3).

A tile of 2×2 outputs needs 4×4 inputs. In the basis of `_input_basis` the convolution takes 16
multiplications, where the definition takes 36. With channels it is 16 matrix products with 1/2.25
of the arithmetic, on 4 numbers per input pixel, where shifted windows lay out 9 (Lavin and Gray
2016, arXiv 1509.09308). All three transforms are linear: backward runs through their transposes.

Axis legend: `B` images, `h`, `w` pixels, `T` tiles of all images, `i`, `o` channels in and out.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Num

from flexmoe_jax.models.dense import kernel_gradient
from flexmoe_jax.types import Array

Points = list[Array]
"""16 arrays, one for each pair of basis elements: rows first, then columns."""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def winograd_3x3(
    x: Num[Array, "B h w i"], kernel: Num[Array, "3 3 i o"], padding: Literal["SAME", "VALID"]
) -> Num[Array, "B H W o"]:
    """Computes a 2-D convolution of stride 1.

    Args:
      x: (B, h, w, i) images.
      kernel: (3, 3, i, o).
      padding: "SAME" or "VALID".

    Returns:
      (B, h', w', o), equal to `conv_lax` up to rounding (below 1e-6 of the largest, in float32).
    """
    return _forward(x, kernel, padding)[0]


def _input_basis(d: Points) -> Points:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _kernel_basis(g: Array) -> Points:
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _output_basis(m: Points) -> Points:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _tiles(x: Array, padding: str) -> tuple[int, int]:
    """Tiles down and across: half the output's size, rounded up."""
    lost = 0 if padding == "SAME" else 2
    return (x.shape[1] - lost + 1) // 2, (x.shape[2] - lost + 1) // 2


def _transform_input(x: Array, padding: str) -> Points:
    """(B, h, w, i) to 16 of (T, i)."""
    down, across = _tiles(x, padding)
    before = 1 if padding == "SAME" else 0
    pads = [
        (before, 2 * tiles + 2 - size - before)
        for tiles, size in zip((down, across), x.shape[1:3], strict=True)
    ]
    padded = jnp.pad(x, [(0, 0), *pads, (0, 0)])

    def along(x: Array, axis: int, tiles: int) -> Points:
        return _input_basis(
            [lax.slice_in_dim(x, i, i + 2 * tiles - 1, stride=2, axis=axis) for i in range(4)]
        )

    # Without the barrier, XLA recomputes the sums of rows for every column.
    rows = lax.optimization_barrier(along(padded, 1, down))
    return [v.reshape(-1, x.shape[-1]) for row in rows for v in along(row, 2, across)]


def _transform_input_back(points: Points, x: Array, padding: str) -> Array:
    """The transpose of `_transform_input`: 16 of (T, i) to the shape of x, (B, h, w, i).

    Written by hand: JAX's transpose of strided slices is a slower sum of images with gaps.
    """
    tiles = [m.reshape(x.shape[0], *_tiles(x, padding), -1) for m in points]

    def along(m: Points, axis: int) -> Array:
        # Pixels 2 and 3 of a tile are pixels 0 and 1 of the next one.
        d = [m[0], m[1] - m[2] + m[3], m[1] + m[2] - m[0], -m[3]]

        def moved(m: Array, by: int) -> Array:
            pads = [(by, 1 - by) if each == axis else (0, 0) for each in range(m.ndim)]
            return jnp.pad(m, pads)

        pairs = [moved(d[i], 0) + moved(d[i + 2], 1) for i in range(2)]
        shape = (*m[0].shape[:axis], -1, *m[0].shape[axis + 1 :])
        return jnp.stack(pairs, axis=axis + 1).reshape(shape)

    rows = lax.optimization_barrier([along(tiles[4 * i : 4 * i + 4], 2) for i in range(4)])
    before = 1 if padding == "SAME" else 0
    return along(rows, 1)[:, before : before + x.shape[1], before : before + x.shape[2]]


def _transform_kernel(kernel: Array) -> Points:
    """(3, 3, i, o) to 16 of (i, o)."""
    return [u for row in _kernel_basis(kernel) for u in _kernel_basis(row)]


def _transform_output(products: Points, shape: tuple[int, int, int]) -> Array:
    """16 of (T, o) to (B, 2 * tiles down, 2 * tiles across, o); `shape` is (B, down, across)."""
    batch, down, across = shape
    tiles = [m.reshape(*shape, -1) for m in products]
    columns = lax.optimization_barrier([_output_basis(tiles[j::4]) for j in range(4)])
    rows = [jnp.stack(_output_basis([c[i] for c in columns]), axis=3) for i in range(2)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * down, 2 * across, -1)


_Residuals = tuple[Array, Points, Array]


def _forward(x: Array, kernel: Array, padding: str) -> tuple[Array, _Residuals]:
    inputs = _transform_input(x, padding)
    # One product per point: a single batched product would first copy the 16 arrays together.
    products = [v @ u for v, u in zip(inputs, _transform_kernel(kernel), strict=True)]
    y = _transform_output(products, (x.shape[0], *_tiles(x, padding)))
    lost = 0 if padding == "SAME" else 2
    # Only the shape and type of the images are needed; an unused residual costs nothing.
    return y[:, : x.shape[1] - lost, : x.shape[2] - lost], (x, inputs, kernel)


def _backward(padding: str, residuals: _Residuals, dy: Array) -> tuple[Array, Array]:
    x, inputs, kernel = residuals
    down, across = _tiles(x, padding)
    shape = x.shape[0], down, across
    whole = jnp.pad(
        dy, [(0, 0), (0, 2 * down - dy.shape[1]), (0, 2 * across - dy.shape[2]), (0, 0)]
    )
    point = jax.ShapeDtypeStruct((inputs[0].shape[0], dy.shape[-1]), dy.dtype)
    (slopes,) = jax.linear_transpose(partial(_transform_output, shape=shape), [point] * 16)(whole)
    d_points = [kernel_gradient(v, slope) for v, slope in zip(inputs, slopes, strict=True)]
    d_inputs = [s @ u.T for s, u in zip(slopes, _transform_kernel(kernel), strict=True)]
    (d_kernel,) = jax.linear_transpose(_transform_kernel, kernel)(d_points)
    return _transform_input_back(d_inputs, x, padding), d_kernel


winograd_3x3.defvjp(_forward, _backward)
