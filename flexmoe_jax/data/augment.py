"""Augmentation: random changes of training images that keep their labels.

Each augmentation is a pure function of images and of 32 random bits for each image. It runs in the
compiled round, and the bits of a whole round are drawn at once. Evaluation uses no augmentation.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from flexmoe_jax.types import Array

Augmentation = Callable[[Array, Array], Array]
"""(uint8 images (B, h, w, channels), random bits (B,) uint32) -> images of the same shape."""


def flip(images: Array, bits: Array) -> Array:
    """Mirror each image left to right with probability 1/2."""
    mirrored = (bits & 1).astype(bool)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def crop(images: Array, bits: Array) -> Array:
    """Shift images by up to an eighth of their height and width, and fill the border with 0.

    For 32×32 pixels this is the usual "pad by 4, then crop" (He et al. 2016, section 4.2).
    """
    _, height, width, channels = images.shape
    down, right = height // 8, width // 8
    padded = jnp.pad(images, ((0, 0), (down, down), (right, right), (0, 0)))
    # `flip` uses the lowest bit.
    place = (bits >> 1) % ((2 * down + 1) * (2 * right + 1))
    top, left = jnp.divmod(place, 2 * right + 1)

    def cut(image: Array, top: Array, left: Array) -> Array:
        return lax.dynamic_slice(image, (top, left, jnp.int32(0)), (height, width, channels))

    return jax.vmap(cut)(padded, top.astype(jnp.int32), left.astype(jnp.int32))


def crop_flip(images: Array, bits: Array) -> Array:
    """Apply `crop`, then `flip`: the usual augmentation for CIFAR-10."""
    return flip(crop(images, bits), bits)


AUGMENTATIONS: dict[str, Augmentation] = {"flip": flip, "crop": crop, "crop_flip": crop_flip}
"""Augmentations by name."""
