"""Convolutions whose kernels may carry a client axis.

Under `jax.vmap` with one kernel a client, `lax.conv` becomes a grouped convolution, which XLA's CPU
backend runs one to two orders of magnitude below the machine's matrix-product rate. The same
convolution written as shifted slices and one matrix product keeps that rate, and under `vmap` it
becomes a batched product. Both forms are here as plain functions with one signature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flexmoe_jax.types import Array, InputError

Padding = Literal["SAME", "VALID"]
Strides = tuple[int, int]
Convolution = Callable[[Array, Array, Strides, Padding], Array]
"""(images (B, h, w, i), kernel (kh, kw, i, o), strides, padding) -> (B, h', w', o)."""


def _columns(x: Array, taps: tuple[int, int], strides: Strides, out: tuple[int, int]) -> Array:
    """Lays the window under every output pixel out as one row: (B, h', w', kh*kw*i)."""
    span_h, span_w = ((n - 1) * s + 1 for n, s in zip(out, strides, strict=True))
    shifted = [
        x[:, i : i + span_h : strides[0], j : j + span_w : strides[1], :]
        for i in range(taps[0])
        for j in range(taps[1])
    ]
    return jnp.concatenate(shifted, axis=-1)


def _pads(x: Array, kernel: Array, strides: Strides, padding: Padding) -> list[tuple[int, int]]:
    """Rows and columns to add before and after the image: [(top, bottom), (left, right)]."""
    pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return [(int(low), int(high)) for low, high in pads]


def _pad(x: Array, pads: list[tuple[int, int]]) -> Array:
    """Pads (or, where negative, crops) the two image axes with zeros."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _forward(x: Array, kernel: Array, strides: Strides, padding: Padding) -> tuple[Array, Array]:
    """Returns the convolution and the columns it was computed from."""
    kh, kw, channels, features = kernel.shape
    padded = _pad(x, _pads(x, kernel, strides, padding))
    out_h, out_w = (
        (size - k) // s + 1 for size, k, s in zip(padded.shape[1:3], (kh, kw), strides, strict=True)
    )
    columns = _columns(padded, (kh, kw), strides, (out_h, out_w))
    return columns @ kernel.reshape(kh * kw * channels, features), columns


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_matmul(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    """2-D convolution as one matrix product.

    Args:
      x: (B, h, w, i) images.
      kernel: (kh, kw, i, o).
      strides: vertical and horizontal stride.
      padding: "SAME" or "VALID".

    Returns:
      (B, h', w', o), equal to `lax.conv_general_dilated` up to rounding.
    """
    return _forward(x, kernel, strides, padding)[0]


def _conv_fwd(
    x: Array, kernel: Array, strides: Strides, padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _forward(x, kernel, strides, padding)[0], (x, kernel)


def _conv_bwd(
    strides: Strides, padding: Padding, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    _, columns = _forward(x, kernel, strides, padding)
    rows = columns.reshape(-1, columns.shape[-1])
    d_kernel = (rows.T @ dy.reshape(rows.shape[0], -1)).reshape(kernel.shape)
    return _input_gradient(x, kernel, dy, strides, padding), d_kernel


def _input_gradient(
    x: Array, kernel: Array, dy: Array, strides: Strides, padding: Padding
) -> Array:
    """Gradient of the padded image, one sub-pixel phase at a time, then cropped.

    Padded pixel h = q*s + a only meets the taps i = a + m*s, at output pixel q - m: every phase `a`
    is a stride-1 convolution of `dy` with those taps in reverse, so it takes the same matrix
    product as the forward pass, with no zeros stuffed between the pixels of `dy`.
    """
    batch, height, width, channels = x.shape
    pads = _pads(x, kernel, strides, padding)
    padded = [size + sum(pad) for size, pad in zip((height, width), pads, strict=True)]
    pixels = [-(-size // s) for size, s in zip(padded, strides, strict=True)]

    def phase(a: int, b: int) -> Array:
        sub = kernel[a :: strides[0], b :: strides[1]]
        taps = sub.shape[0], sub.shape[1]
        if 0 in taps:  # a stride above the kernel size leaves pixels that no output sees
            return jnp.zeros((batch, *pixels, channels), x.dtype)
        reach = [(m - 1, q - n) for m, q, n in zip(taps, pixels, dy.shape[1:3], strict=True)]
        columns = _columns(_pad(dy, reach), taps, (1, 1), (pixels[0], pixels[1]))
        flipped = jnp.swapaxes(sub[::-1, ::-1], 2, 3)
        return columns @ flipped.reshape(-1, channels)

    rows = [
        jnp.stack([phase(a, b) for b in range(strides[1])], axis=3) for a in range(strides[0])
    ]  # each (B, q, r, stride, i)
    image = jnp.stack(rows, axis=2).reshape(
        batch, pixels[0] * strides[0], pixels[1] * strides[1], channels
    )
    return image[:, pads[0][0] : pads[0][0] + height, pads[1][0] : pads[1][0] + width]


conv_matmul.defvjp(_conv_fwd, _conv_bwd)


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
