"""Backbones: the part of the shared extractor that turns images into features.

Each is a Linen module that maps images (B, h, w, channels) to features (B, D). Normalisation is by
group, never by batch, because batch statistics would mix clients' label distributions.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Num

from flexmoe_jax.errors import InputError
from flexmoe_jax.models.conv import Conv, Convolution, conv_auto
from flexmoe_jax.models.dense import Dense
from flexmoe_jax.options.models import ModelOptions, check_widths
from flexmoe_jax.types import Array


def max_pool(x: Num[Array, "B h w i"], window: int = 2) -> Num[Array, "B h_n w_n i"]:
    """Maximum over non-overlapping square windows, (B, h, w, channels) to (B, h/n, w/n, channels).

    Rows and columns that do not fill a window are dropped. The windows are made by reshaping,
    because the gradient of XLA's own window reduction takes four times as long on a CPU. Equal
    maxima share the gradient.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x[:, : rows * window, : columns * window]
    return _window_max(x.reshape(batch, rows, window, columns, window, channels))


@jax.custom_vjp
def _window_max(x: Array) -> Array:
    """(B, h, n, w, n, channels) to (B, h, w, channels)."""
    return x.max(axis=(2, 4))


def _window_max_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = x.max(axis=(2, 4))
    return y, (x, y)


def _window_max_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array]:
    # Like JAX's own gradient, but equal maxima are counted by an unrolled sum, which XLA fuses with
    # the rest.
    x, y = residuals
    window = range(x.shape[2])
    equals = reduce(add, ((x[:, :, i, :, j] == y).astype(y.dtype) for i in window for j in window))
    share = (dy / equals)[:, :, None, :, None]
    return (jnp.where(x == y[:, :, None, :, None], share, 0),)


_window_max.defvjp(_window_max_forward, _window_max_backward)


class GroupNorm(nn.Module):
    """Normalisation over groups of channels (Wu and He 2018), like `flax.linen.GroupNorm`.

    Sums run over pixels first and then over a group's channels, and every channel is scaled and
    shifted once. A CPU can vectorise these passes over the image. All sums and products are in
    single precision.

    Attributes:
      groups: a divisor of the channels.
      epsilon: added to the variance.
    """

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h w i"]:
        """Maps images to the same shape."""
        batch, height, width, channels = x.shape
        kind, x = x.dtype, x.astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)

        def over_group(of_channel: Array) -> Array:
            grouped = of_channel.reshape(batch, self.groups, -1)
            mean = jnp.broadcast_to(grouped.mean(axis=-1, keepdims=True), grouped.shape)
            return mean.reshape(batch, channels) / (height * width)

        mean = over_group(x.sum(axis=(1, 2)))  # (B, channels)
        square = over_group((x * x).sum(axis=(1, 2)))
        factor = scale[None] * lax.rsqrt(jnp.maximum(square - mean**2, 0.0) + self.epsilon)
        shift = bias[None] - mean * factor
        return (x * factor[:, None, None] + shift[:, None, None]).astype(kind)


class MLP(nn.Module):
    """Fully connected layers on the flattened image.

    Attributes:
      widths: units of each layer; the last is D.
    """

    widths: Sequence[int] = (128, 64)

    @nn.compact
    def __call__(self, x: Num[Array, "B ..."]) -> Float[Array, "B D"]:
        """Maps (B, h, w, channels) to (B, D)."""
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.relu(Dense(width)(x))
        return x


class ConvNet(nn.Module):
    """Convolutions of 3×3, every second one with stride 2, then the mean over pixels.

    Attributes:
      widths: output channels of each convolution; the last is D.
      groups: groups of the normalisation after each convolution; 0 for none.
      conv: the convolution's implementation.
    """

    widths: Sequence[int] = (32, 32, 64, 64)
    groups: int = 0
    conv: Convolution = conv_auto

    @nn.compact
    def __call__(self, x: Num[Array, "B h w c"]) -> Float[Array, "B D"]:
        """Maps (B, h, w, channels) to (B, D)."""
        for layer, width in enumerate(self.widths):
            x = Conv(width, stride=1 + layer % 2, use_bias=not self.groups, conv=self.conv)(x)
            if self.groups:
                x = GroupNorm(self.groups)(x)
            x = nn.relu(x)
        return x.mean(axis=(1, 2))


class CNN(nn.Module):
    """Convolutions of 3×3, each followed by a maximum over 2×2, then one fully connected layer.

    The small network of the federated-learning literature (McMahan et al. 2017 use two convolutions
    and a wider fully connected layer). It keeps the position of image content, and so learns in far
    fewer steps than `ConvNet`, which takes the mean over pixels.

    Attributes:
      widths: output channels of each convolution; the last is D, of the fully connected layer.
      groups: groups of the normalisation after each convolution; 0 for none.
      conv: the convolution's implementation.
    """

    widths: Sequence[int] = (16, 32, 64)
    groups: int = 0
    conv: Convolution = conv_auto

    @nn.compact
    def __call__(self, x: Num[Array, "B h w c"]) -> Float[Array, "B D"]:
        """Maps (B, h, w, channels) to (B, D)."""
        *channels, features = self.widths
        if min(x.shape[1:3]) < 2 ** len(channels):
            remedy = f"{len(channels)} halvings leave nothing of an image of {x.shape[1:3]}"
            raise InputError("model.widths", self.widths, f"{remedy}; choose fewer widths")
        for width in channels:
            x = Conv(width, use_bias=not self.groups, conv=self.conv)(x)
            if self.groups:
                x = GroupNorm(self.groups)(x)
            x = nn.relu(max_pool(x))  # equals max_pool(relu(x)), on a quarter of the numbers
        return nn.relu(Dense(features)(x.reshape(x.shape[0], -1)))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016), normalised by group.

    Attributes:
      width: output channels.
      stride: of the first convolution and of the shortcut.
      groups: groups of each normalisation.
      conv: the convolution's implementation.
    """

    width: int
    stride: int
    groups: int
    conv: Convolution

    @nn.compact
    def __call__(self, x: Num[Array, "B h w c"]) -> Float[Array, "B H W o"]:
        """Maps (B, h, w, channels) to (B, h/stride, w/stride, width)."""
        y = Conv(self.width, stride=self.stride, conv=self.conv)(x)
        y = nn.relu(GroupNorm(self.groups)(y))
        y = Conv(self.width, conv=self.conv)(y)
        y = GroupNorm(self.groups)(y)
        if x.shape != y.shape:
            x = Conv(self.width, kernel_size=1, stride=self.stride, conv=self.conv)(x)
            x = GroupNorm(self.groups)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """CIFAR-style residual network of depth 6n+2 (He et al. 2016) with group normalisation.

    Attributes:
      depth: 8, 14, 20, ...: three stages of n = (depth - 2) / 6 blocks.
      width: channels of the first stage; each later stage doubles them, so D = 4 * width.
      groups: groups of each normalisation.
      conv: the convolution's implementation.
      mixture: makes the MoE layer after each of `stages`, (B, h, w, channels) to the same shape;
        its output is added to its input (FLEX-MoE has such layers; their places are not public).
      stages: which of the stages 1, 2, 3 are followed by a MoE layer.
    """

    depth: int = 8
    width: int = 16
    groups: int = 8
    conv: Convolution = conv_auto
    mixture: Callable[[], nn.Module] | None = None
    stages: Sequence[int] = ()

    @nn.compact
    def __call__(self, x: Num[Array, "B h w c"]) -> Float[Array, "B D"]:
        """Maps (B, h, w, channels) to (B, 4 * width)."""
        x = Conv(self.width, conv=self.conv)(x)
        x = nn.relu(GroupNorm(self.groups)(x))
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage and not block else 1
                x = ResidualBlock(self.width * 2**stage, stride, self.groups, self.conv)(x)
            if self.mixture is not None and stage + 1 in self.stages:
                x = x + self.mixture()(x)
        return jnp.mean(x, axis=(1, 2))


def _mlp(widths: Sequence[int], depth: int, groups: int, conv: Convolution) -> nn.Module:
    return MLP(tuple(widths) or MLP.widths)


def _convnet(widths: Sequence[int], depth: int, groups: int, conv: Convolution) -> nn.Module:
    widths = tuple(widths) or ConvNet.widths
    _check_groups(groups, widths)
    return ConvNet(widths, groups, conv)


def _cnn(widths: Sequence[int], depth: int, groups: int, conv: Convolution) -> nn.Module:
    widths = tuple(widths) or CNN.widths
    _check_groups(groups, widths[:-1])
    return CNN(widths, groups, conv)


def _resnet(widths: Sequence[int], depth: int, groups: int, conv: Convolution) -> nn.Module:
    width = widths[0] if widths else ResNet.width
    depth = depth or ResNet.depth
    if depth < 8 or (depth - 2) % 6:
        raise InputError("model.depth", depth, "choose 6n+2: 8, 14, 20, 26, 32, ...")
    groups = groups or math.gcd(ResNet.groups, width)
    _check_groups(groups, (width,))
    return ResNet(depth, width, groups, conv)


def _check_groups(groups: int, widths: Sequence[int]) -> None:
    if groups < 0 or (groups and any(width % groups for width in widths)):
        raise InputError(
            "model.groups", groups, f"choose a divisor of every width in {tuple(widths)}, or 0"
        )


class PersonalMixture(nn.Module):
    """A shared and a client's own backbone, mixed by a gate (pFedMoE, arXiv 2402.01350).

    h = g_0 · shared(x) + g_1 · local(x) with g = softmax(gate(shared(x))). In pFedMoE the gate has
    its own network; here it is linear in the shared features. `Ownership` decides who owns each
    part: in pFedMoE "local", "mixture" and the head stay with their clients.

    Attributes:
      shared: backbone (B, ...) -> (B, D).
      local: backbone of the same D.
    """

    shared: nn.Module
    local: nn.Module

    @nn.compact
    def __call__(self, x: Num[Array, "B ..."]) -> Float[Array, "B D"]:
        """Maps images (B, h, w, channels) to features (B, D)."""
        shared, local = self.shared(x), self.local(x)
        logits = Dense(2, name="mixture")(shared.astype(jnp.float32))
        weight = nn.softmax(logits).astype(shared.dtype)
        return weight[:, :1] * shared + weight[:, 1:] * local


BACKBONES: dict[str, Callable[[Sequence[int], int, int, Convolution], nn.Module]] = {
    "mlp": _mlp,
    "convnet": _convnet,
    "cnn": _cnn,
    "resnet": _resnet,
}


def make_backbone(
    name: str,
    *,
    widths: Sequence[int] = (),
    depth: int = ModelOptions.depth,
    groups: int = ModelOptions.groups,
    conv: Convolution = conv_auto,
) -> nn.Module:
    """Builds a backbone by name.

    Args:
      name: `mlp`, `convnet`, `cnn` or `resnet`.
      widths: width of each layer (`resnet`: of the first stage); empty for the module's default.
      depth: of the `resnet`; 0 for its default.
      groups: groups of the normalisation; 0 for the backbone's default.
      conv: the convolution's implementation.

    Returns:
      A Linen module that maps images (B, h, w, channels) to features (B, D).

    Raises:
      InputError: naming the field that does not fit.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=1, cutoff=0)
        remedy = f"did you mean {near[0]}? choose one of {', '.join(BACKBONES)}"
        raise InputError("model.backbone", name, remedy)
    check_widths(tuple(widths))
    return BACKBONES[name](widths, depth, groups, conv)
