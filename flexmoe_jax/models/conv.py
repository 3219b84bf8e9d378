"""Convolutions whose kernels may have a client axis.

Under `jax.vmap` with one kernel per client, `lax.conv` becomes a grouped convolution. XLA's CPU
backend runs it one to two orders of magnitude below the machine's matrix-product rate. The same
convolution, written as shifted slices and one matrix product, reaches that rate, and under `vmap`
it becomes a batched product. All forms here are plain functions with the same signature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Num

from flexmoe_jax.models.dense import as_inputs, kernel_gradient, unless_vmapped
from flexmoe_jax.models.winograd import winograd_3x3
from flexmoe_jax.options.models import ModelOptions
from flexmoe_jax.types import Array

Padding = Literal["SAME", "VALID"]
Strides = tuple[int, int]
Convolution = Callable[[Array, Array, Strides, Padding], Array]
"""(images (B, h, w, i), kernel (kh, kw, i, o), strides, padding) -> (B, h', w', o)."""


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_matmul(
    x: Num[Array, "B h w i"], kernel: Num[Array, "kh kw i o"], strides: Strides, padding: Padding
) -> Num[Array, "B H W o"]:
    """Computes a 2-D convolution as one matrix product.

    The window under every output pixel is laid out as one row, so the product with the flattened
    kernel is the convolution. The backward pass has two more such products: rows by the output's
    gradient, and the output's gradient by the kernel.

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
    """Lays out the window under every output pixel as one row, (B, h', w', kh*kw*i)."""
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
    # Only the shape and type of the images are needed; an unused residual costs nothing.
    return rows @ kernel.reshape(-1, kernel.shape[-1]), (x, rows, kernel)


def _conv_backward(
    strides: Strides, padding: Padding, residuals: _Residuals, dy: Array
) -> tuple[Array, Array]:
    x, rows, kernel = residuals
    d_kernel = _kernel_gradient_by_product(rows, dy).reshape(kernel.shape)
    return _image_gradient_by_product(dy, kernel, x.shape, strides, padding), d_kernel


def _kernel_gradient_by_product(rows: Array, dy: Array) -> Array:
    """Maps rows of windows and dy (B, h', w', o) to the kernel's gradient (kh*kw*i, o)."""
    return kernel_gradient(rows.reshape(-1, rows.shape[-1]), dy.reshape(-1, dy.shape[-1]))


def _image_gradient_by_product(
    dy: Array, kernel: Array, shape: tuple[int, ...], strides: Strides, padding: Padding
) -> Array:
    """Maps dy (B, h', w', o) and the kernel to the gradient of the images."""
    taps, features = (kernel.shape[0], kernel.shape[1]), kernel.shape[-1]
    d_rows = dy @ kernel.reshape(-1, features).T
    windows = partial(_windows, taps=taps, strides=strides, padding=padding)
    (dx,) = jax.linear_transpose(windows, jax.ShapeDtypeStruct(shape, dy.dtype))(d_rows)
    return dx


conv_matmul.defvjp(_conv_forward, _conv_backward)


def conv_lax(
    x: Num[Array, "B h w i"], kernel: Num[Array, "kh kw i o"], strides: Strides, padding: Padding
) -> Num[Array, "B H W o"]:
    """Computes the same convolution by XLA's own operator; see `conv_matmul` for the shapes."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_direct(
    x: Num[Array, "B h w i"], kernel: Num[Array, "kh kw i o"], strides: Strides, padding: Padding
) -> Num[Array, "B H W o"]:
    """Computes the same by XLA's own operator, for clients in a loop, with equally fast gradients.

    Without a client axis, XLA's CPU backend lays out as many windows at a time as fit in the cache,
    if images are (B, h, w, i), kernels are (kh, kw, i, o) and no axis is swapped or reversed. All
    other cases fall back to loops that are up to a hundred times slower. Both gradients are
    therefore written as such convolutions. If kernels do have a client axis, `conv_matmul` is used.
    """
    products = partial(conv_matmul, strides=strides, padding=padding)
    return unless_vmapped(lambda x, k: conv_lax(x, k, strides, padding), products)(x, kernel)


def _direct_forward(
    x: Array, kernel: Array, strides: Strides, padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return conv_direct(x, kernel, strides, padding), (x, kernel)


def _direct_backward(
    strides: Strides, padding: Padding, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    sides, taps = x.shape[1:3], kernel.shape[:2]
    before = [low for low, _ in lax.padtype_to_pads(sides, taps, strides, padding)]
    reach = [s * (n - 1) + 1 for s, n in zip(strides, dy.shape[1:3], strict=True)]

    def image_gradient_alone(dy: Array, kernel: Array) -> Array:
        # The outputs are dilated by the strides; the reversed kernel spreads each over its window.
        pads = [
            (tap - 1 - low, side + low - length)
            for tap, low, side, length in zip(taps, before, sides, reach, strict=True)
        ]
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        return _correlate(dy, turned, pads, strides, (1, 1))

    def kernel_gradient_alone(x: Array, dy: Array) -> Array:
        # The outputs' gradient is dilated by the strides and slides over the images. Sums run over
        # the batch, which takes the place of the channels.
        pads = [
            (low, tap + length - 1 - side - low)
            for tap, low, side, length in zip(taps, before, sides, reach, strict=True)
        ]
        as_kernel = dy.transpose(1, 2, 0, 3)
        moved = _correlate(x.transpose(3, 1, 2, 0), as_kernel, pads, (1, 1), strides)
        return moved.transpose(1, 2, 0, 3)

    def image_gradient_by_product(dy: Array, kernel: Array) -> Array:
        return _image_gradient_by_product(dy, kernel, x.shape, strides, padding)

    def kernel_gradient_by_product(x: Array, dy: Array) -> Array:
        rows = _windows(x, (taps[0], taps[1]), strides, padding)
        return _kernel_gradient_by_product(rows, dy).reshape(kernel.shape)

    return (
        unless_vmapped(image_gradient_alone, image_gradient_by_product)(dy, kernel),
        unless_vmapped(kernel_gradient_alone, kernel_gradient_by_product)(x, dy),
    )


def _correlate(
    x: Array, kernel: Array, pads: list[tuple[int, int]], spread: Strides, spread_kernel: Strides
) -> Array:
    """Computes `conv_lax` with explicit padding, and with dilated pixels or taps."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, spread, spread_kernel, numbers)


conv_direct.defvjp(_direct_forward, _direct_backward)


def conv_winograd(
    x: Num[Array, "B h w i"], kernel: Num[Array, "kh kw i o"], strides: Strides, padding: Padding
) -> Num[Array, "B H W o"]:
    """Computes 3×3 kernels of stride 1 by `winograd_3x3`, and all others by `conv_matmul`."""
    if kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1):
        return winograd_3x3(x, kernel, padding)
    return conv_matmul(x, kernel, strides, padding)


def conv_auto(
    x: Num[Array, "B h w i"], kernel: Num[Array, "kh kw i o"], strides: Strides, padding: Padding
) -> Num[Array, "B H W o"]:
    """Uses the fastest form for a client axis: `conv_matmul`, or one of two others on a CPU.

    Both are faster for stride 1, in float32: `conv_winograd` from 32 channels and images of 8×8 on
    (below that, the sums before and after the products cost more than they save), `conv_direct`
    from 16 channels on (docs/speed.md).
    """
    taps, channels = kernel.shape[:2], kernel.shape[2]
    pays = x.dtype == jnp.float32 and tuple(strides) == (1, 1) and channels >= 16
    if jax.default_backend() != "cpu" or not pays:
        return conv_matmul(x, kernel, strides, padding)
    if taps == (3, 3) and channels >= 32 and min(x.shape[1:3]) >= 8:
        return conv_winograd(x, kernel, strides, padding)
    return conv_direct(x, kernel, strides, padding)


CONVOLUTIONS: dict[str, Convolution] = {
    "auto": conv_auto,
    "matmul": conv_matmul,
    "direct": conv_direct,
    "winograd": conv_winograd,
    "lax": conv_lax,
}


def convolution(name: str) -> Convolution:
    """Looks up an implementation by name.

    Raises:
      InputError: if the name is not in `CONVOLUTIONS`.
    """
    ModelOptions.check(conv=name)
    return CONVOLUTIONS[name]


class Conv(nn.Module):
    """Convolution layer; a normalisation that follows or `use_bias` adds a bias.

    Attributes:
      features: output channels.
      kernel_size: side of the square window.
      stride: the same in both directions.
      padding: "SAME" or "VALID".
      use_bias: whether to add a bias per output channel.
      conv: the implementation, see `convolution`.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding = "SAME"
    use_bias: bool = False
    conv: Convolution = conv_auto

    @nn.compact
    def __call__(self, x: Num[Array, "B h w i"]) -> Num[Array, "B H W o"]:
        """Maps (B, h, w, i) to (B, h', w', features)."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        x, kernel = as_inputs(x, kernel)
        y = self.conv(x, kernel, (self.stride, self.stride), self.padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(y.dtype).reshape(1, 1, 1, -1)
        return y
