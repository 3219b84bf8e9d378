"""Convolutions whose kernels may carry a client axis.

Under `jax.vmap` with one kernel a client, `lax.conv` becomes a grouped convolution, which XLA's CPU
backend runs one to two orders of magnitude below the machine's matrix-product rate. The same
convolution written as shifted slices and one matrix product keeps that rate, and under `vmap` it
becomes a batched product. Both forms are here as plain functions with one signature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Array

Padding = Literal["SAME", "VALID"]
Strides = tuple[int, int]
Convolution = Callable[[Array, Array, Strides, Padding], Array]
"""(images (B, h, w, i), kernel (kh, kw, i, o), strides, padding) -> (B, h', w', o)."""


def conv_matmul(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    """2-D convolution as one matrix product.

    The window under every output pixel is laid out as one row, so the product with the flattened
    kernel is the convolution. Differentiation gives two more such products.

    Args:
      x: (B, h, w, i) images.
      kernel: (kh, kw, i, o).
      strides: vertical and horizontal stride.
      padding: "SAME" or "VALID".

    Returns:
      (B, h', w', o), equal to `conv_lax` up to rounding.
    """
    taps = kernel.shape[:2]
    pads = lax.padtype_to_pads(x.shape[1:3], taps, strides, padding)
    padded = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    spans = [size - tap + 1 for size, tap in zip(padded.shape[1:3], taps, strict=True)]
    columns = jnp.concatenate(
        [
            padded[:, i : i + spans[0] : strides[0], j : j + spans[1] : strides[1], :]
            for i in range(taps[0])
            for j in range(taps[1])
        ],
        axis=-1,
    )  # (B, h', w', kh*kw*i)
    return columns @ kernel.reshape(-1, kernel.shape[-1])


def conv_lax(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    """The same convolution through XLA's own operator; see `conv_matmul` for the shapes."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


CONVOLUTIONS: dict[str, Convolution] = {"matmul": conv_matmul, "lax": conv_lax}


def convolution(name: str) -> Convolution:
    """Looks an implementation up; `auto` takes the matrix product, which suits every client axis.

    Raises:
      InputError: if the name is none of `auto`, `matmul`, `lax`.
    """
    if name == "auto":
        return conv_matmul
    if name not in CONVOLUTIONS:
        raise InputError("model.conv", name, f"choose one of auto, {', '.join(CONVOLUTIONS)}")
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
    conv: Convolution = conv_matmul

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (B, h, w, i) to (B, h', w', features)."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        y = self.conv(x, kernel, (self.stride, self.stride), self.padding)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        return y
