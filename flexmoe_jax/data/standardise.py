"""Standardise examples, and check them for likely mistakes before training.

Axis legend: `M` examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flexmoe_jax.types import Array

# Values per chunk: a chunk in double precision fits into a core's cache.
_CHUNK = 2**17
# If deviation / |mean| is below this, single precision cannot tell it from rounding error.
_NOISE = 1e-6
# Warn if the deviation of the test set, or its mean in deviations, is off by more than this factor.
_UNLIKE = 10.0
_CHANNELS = (1, 3, 4)


class Moments(NamedTuple):
    """Mean and standard deviation of each channel.

    Attributes:
      mean: (channels,) float64.
      deviation: (channels,) float64, the population standard deviation. It is 0 for a channel that
        is constant, or that varies by no more than the rounding error of single precision.
    """

    mean: np.ndarray
    deviation: np.ndarray


def moments(images: np.ndarray) -> Moments:
    """Compute the moments over all examples, in any order.

    Args:
      images: (M, ..., channels) uint8 or float. In features (M, D), each feature is a channel.
    """
    # First compute each position of an example separately, since long rows are summed fastest.
    flat = images.reshape(len(images), -1)
    places = flat.shape[1]
    mean, squares = np.zeros(places), np.zeros(places)  # squares: Σ (x - mean)²
    step = max(1, _CHUNK // places)
    # Chunks are merged by the rule of Chan, Golub and LeVeque (1983). Plain sums of squares would
    # lose the deviation of a channel with a large mean.
    for before in range(0, len(flat), step):
        chunk = flat[before : before + step].astype(np.float64)
        size, of_chunk = len(chunk), chunk.mean(axis=0)
        shift = of_chunk - mean
        mean += shift * (size / (before + size))
        chunk -= of_chunk
        squares += np.einsum("mp,mp->p", chunk, chunk)
        squares += shift**2 * (size * before / (before + size))
    by_channel = mean.reshape(-1, images.shape[-1])
    mean = by_channel.mean(axis=0)
    variance = squares.reshape(by_channel.shape).mean(axis=0) / len(images)
    deviation = np.sqrt(variance + by_channel.var(axis=0))
    return Moments(mean, np.where(deviation > _NOISE * np.abs(mean), deviation, 0.0))


@dataclass(frozen=True, eq=False)
class Standardisation:
    """Maps examples (..., channels) to float32, for each channel: (x - mean) · factor.

    Attributes:
      mean: (channels,) float32.
      factor: (channels,) float32, one over the deviation; 0 for a constant channel.
    """

    mean: np.ndarray
    factor: np.ndarray

    def __call__(self, images: Array) -> Array:
        """Return the standardised examples."""
        mean, factor = (
            of_channel.reshape(*[1] * (images.ndim - 1), -1)
            for of_channel in (self.mean, self.factor)
        )
        return (images.astype(jnp.float32) - mean) * factor


def standardise(images: np.ndarray) -> Standardisation:
    """Fit a map to float32 that gives each channel mean 0 and deviation 1 over these images.

    A channel that is constant here carries no information. It maps to 0 for all images, even for
    other images in which it varies.

    Args:
      images: (M, ..., channels) uint8 or float. In features (M, D), each feature is a channel.
    """
    found = moments(images)
    varies = found.deviation > 0
    scale = np.divide(1.0, found.deviation, out=np.zeros_like(found.mean), where=varies)
    return Standardisation(found.mean.astype(np.float32), scale.astype(np.float32))


def doubts(train: np.ndarray, test: np.ndarray) -> tuple[str, ...]:
    """Return warnings about examples that look wrong; none for most data sets.

    The checks find channels in the first axis, and test values with a scale very different from
    the training values (for example by a factor of 255).

    Args:
      train: (M, ..., channels) uint8 or float.
      test: of the same shape except for M.
    """
    return (*_channels_first(train.shape), *_unlike(train, test))


def _channels_first(shape: tuple[int, ...]) -> list[str]:
    if len(shape) != 4 or shape[1] not in _CHANNELS or min(shape[2:]) <= max(_CHANNELS):
        return []
    return [
        f"images of shape {shape[1:]} look as if their channels stood first; they are taken for "
        f"{shape[1]} by {shape[2]} pixels of {shape[3]} channels: np.moveaxis(images, 1, -1) puts "
        "channels last"
    ]


def _unlike(train: np.ndarray, test: np.ndarray) -> list[str]:
    known, found = moments(train), moments(test)
    spread, other = known.deviation, found.deviation
    shift = np.abs(found.mean - known.mean)
    constant = (spread == 0) & ((other > 0) | (shift > _NOISE * np.abs(known.mean)))
    off = (spread > 0) & (
        (other > _UNLIKE * spread)
        | ((other < spread / _UNLIKE) & (len(test) > 1))
        | (shift > _UNLIKE * np.maximum(spread, other))
    )
    lines = []
    if off.any():
        c = int(np.argmax(off))
        lines.append(
            f"test values are scaled unlike training values in {_of(off)}: channel {c} has mean "
            f"{found.mean[c]:.4g} and deviation {other[c]:.4g} against {known.mean[c]:.4g} and "
            f"{spread[c]:.4g}; figures on the test set then mean little"
        )
    if constant.any():
        c = int(np.argmax(constant))
        lines.append(
            f"{_of(constant)} are constant in the training examples and not in the test examples "
            f"(channel {c}); nothing can be learnt from them, so they count as 0 everywhere"
        )
    return lines


def _of(chosen: np.ndarray) -> str:
    return f"{np.count_nonzero(chosen)} of {chosen.size} channels"
