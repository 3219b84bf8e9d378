from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.data import AUGMENTATIONS, crop, crop_flip, flip

IMAGES = np.arange(1, 2 * 16 * 24 * 3 + 1, dtype=np.uint32).reshape(2, 16, 24, 3)
# An eighth of 16 and of 24 pixels, up and down, left and right.
PLACES = [(down, right) for down in range(-2, 3) for right in range(-3, 4)]


def shifted(image, down, right):
    padded = np.pad(image, ((2, 2), (3, 3), (0, 0)))
    return padded[2 - down : 18 - down, 3 - right : 27 - right]


def test_the_lowest_bit_mirrors():
    found = np.asarray(flip(IMAGES, jnp.array([4, 5], jnp.uint32)))
    assert (found[0] == IMAGES[0]).all()
    assert (found[1] == IMAGES[1, :, ::-1]).all()


def test_the_other_bits_shift_by_every_offset_alike():
    drawn = jnp.arange(len(PLACES), dtype=jnp.uint32) << 1
    images = np.broadcast_to(IMAGES[:1], (len(PLACES), *IMAGES.shape[1:]))
    found = np.asarray(jax.jit(crop)(images, drawn))
    # Growing bits move the window down and right, so what it shows goes up and left.
    for image, (down, right) in zip(found, PLACES[::-1], strict=True):
        assert (image == shifted(IMAGES[0], down, right)).all()


@given(st.integers(0, 2**32 - 1))
def test_crop_flip_is_one_after_the_other(number):
    bits = jnp.array([number, 0], jnp.uint32)
    found = np.asarray(crop_flip(IMAGES, bits))
    place = (number >> 1) % len(PLACES)
    expected = shifted(IMAGES[0], *PLACES[::-1][place])
    assert (found[0] == (expected[:, ::-1] if number % 2 else expected)).all()


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(8, 8, 1), (1, 1, 3), (28, 28, 1)])
def test_shape_and_type_stay(name, shape):
    images = jnp.ones((5, *shape), jnp.uint8)
    bits = jax.random.bits(jax.random.key(0), (5,), jnp.uint32)
    found = AUGMENTATIONS[name](images, bits)
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
