"""Convolutions whose kernels may carry a client axis.

Under `jax.vmap` with one kernel a client, `lax.conv` becomes a grouped convolution, which XLA's CPU
backend runs one to two orders of magnitude below the machine's matrix-product rate. The same
convolution written as shifted slices and one matrix product keeps that rate, and under `vmap` it
becomes a batched product. All forms are here as plain functions with one signature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flexmoe_jax.errors import InputError
from flexmoe_jax.models.winograd import winograd_3x3
from flexmoe_jax.types import Array

Padding = Literal["SAME", "VALID"]
Strides = tuple[int, int]
Convolution = Callable[[Array, Array, Strides, Padding], Array]
"""(images (B, h, w, i), kernel (kh, kw, i, o), strides, padding) -> (B, h', w', o)."""


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_matmul(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    """2-D convolution as one matrix product.

    The window under every output pixel is laid out as one row, so the product with the flattened
    kernel is the convolution. The backward pass is two more such products: of the rows with the
    output's gradient, and of the latter with the kernel.

    Args:
      x: (B, h, w, i) images.
      kernel: (kh, kw, i, o).
      strides: vertical and horizontal stride.
      padding: "SAME" or "VALID".

    Returns:
      (B, h', w', o), equal to `conv_lax` up to rounding.
    """
    rows = _windows(x, (kernel.shape[0], kernel.shape[1]), strides, padding)
    return rows @ kernel.reshape(-1, kernel.shape[-1])


def _windows(x: Array, taps: tuple[int, int], strides: Strides, padding: Padding) -> Array:
    """The window under every output pixel as one row, (B, h', w', kh*kw*i)."""
    pads = lax.padtype_to_pads(x.shape[1:3], taps, strides, padding)
    padded = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    spans = [size - tap + 1 for size, tap in zip(padded.shape[1:3], taps, strict=True)]
    return jnp.concatenate(
        [
            padded[:, i : i + spans[0] : strides[0], j : j + spans[1] : strides[1], :]
            for i in range(taps[0])
            for j in range(taps[1])
        ],
        axis=-1,
    )


_Residuals = tuple[Array, Array, Array]


def _conv_forward(
    x: Array, kernel: Array, strides: Strides, padding: Padding
) -> tuple[Array, _Residuals]:
    rows = _windows(x, (kernel.shape[0], kernel.shape[1]), strides, padding)
    # Of the images only shape and type are needed; an unused residual costs nothing.
    return rows @ kernel.reshape(-1, kernel.shape[-1]), (x, rows, kernel)


def _conv_backward(
    strides: Strides, padding: Padding, residuals: _Residuals, dy: Array
) -> tuple[Array, Array]:
    x, rows, kernel = residuals
    features, width = kernel.shape[-1], rows.shape[-1]
    dy_rows = dy.reshape(-1, features)
    # As (o, kh*kw*i), the small side first, XLA's CPU backend runs this product 1.4 times as fast.
    # The barrier keeps the compiler from turning it round.
    contract = (((0,), (0,)), ((), ()))
    product = lax.dot_general(dy_rows, rows.reshape(-1, width), contract)
    d_kernel: Array = lax.optimization_barrier(product)
    d_rows = (dy_rows @ kernel.reshape(width, features).T).reshape(rows.shape)
    windows = partial(
        _windows, taps=(kernel.shape[0], kernel.shape[1]), strides=strides, padding=padding
    )
    (dx,) = jax.linear_transpose(windows, x)(d_rows)
    return dx, d_kernel.T.reshape(kernel.shape)


conv_matmul.defvjp(_conv_forward, _conv_backward)


def conv_lax(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    """The same convolution through XLA's own operator; see `conv_matmul` for the shapes."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv_winograd(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    """The same for 3×3 kernels of stride 1 by `winograd_3x3`; `conv_matmul` for all others."""
    if kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1):
        return winograd_3x3(x, kernel, padding)
    return conv_matmul(x, kernel, strides, padding)


def conv_auto(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    """The fastest for a client axis: `conv_winograd` on CPU where it pays, else `conv_matmul`.

    It pays from 32 channels on and for images of 8×8 and more; elsewhere the sums before and after
    the products cost more than they save (docs/performance.md).
    """
    pays = kernel.shape[2] >= 32 and min(x.shape[1:3]) >= 8 and x.dtype == jnp.float32
    if pays and jax.default_backend() == "cpu":
        return conv_winograd(x, kernel, strides, padding)
    return conv_matmul(x, kernel, strides, padding)


CONVOLUTIONS: dict[str, Convolution] = {
    "auto": conv_auto,
    "matmul": conv_matmul,
    "winograd": conv_winograd,
    "lax": conv_lax,
}


def convolution(name: str) -> Convolution:
    """Looks an implementation up.

    Raises:
      InputError: if the name is not in `CONVOLUTIONS`.
    """
    if name not in CONVOLUTIONS:
        raise InputError("model.conv", name, f"choose one of {', '.join(CONVOLUTIONS)}")
    return CONVOLUTIONS[name]


class Conv(nn.Module):
    """Convolution layer without bias: normalisation or `use_bias` adds it.

    Attributes:
      features: output channels.
      kernel_size: side of the square window.
      stride: the same in both directions.
      padding: "SAME" or "VALID".
      use_bias: adds a bias per output channel.
      conv: the implementation, see `convolution`.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding = "SAME"
    use_bias: bool = False
    conv: Convolution = conv_auto

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (B, h, w, i) to (B, h', w', features)."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        y = self.conv(x, kernel, (self.stride, self.stride), self.padding)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        return y
