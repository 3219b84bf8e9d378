from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from flexmoe_jax.data import doubts, standardise
from flexmoe_jax.data.standardise import moments


def test_many_large_images_are_standardised_exactly():
    # Ten million pixels a channel: in single precision their sum comes out far too small.
    images = np.broadcast_to(np.array([200, 0, 50], np.uint8), (2, 2_300, 2_300, 3)).copy()
    images[0, :, :, 0] = 100
    images[1, :, :, 1] = 255
    found = np.asarray(standardise(images)(images[:, :1, :1]))
    assert np.allclose(found[:, 0, 0, 0], [-1, 1], atol=1e-4)
    assert np.allclose(found[:, 0, 0, 1], [-1, 1], atol=1e-4)
    assert (found[..., 2] == 0).all()


def test_features_are_standardised_each_by_itself():
    features = np.array([[1.0, -300.0], [3.0, 100.0]], np.float32)
    found = np.asarray(standardise(features)(features))
    assert np.allclose(found, [[-1, -1], [1, 1]], atol=1e-4)


@hypothesis.given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 400), wide=st.booleans())
def test_moments_are_numpys_in_any_order_of_the_rows(seed, rows, wide):
    rng = np.random.default_rng(seed)
    shape = (rows, 40, 25, 2) if wide else (rows, 3)  # 2,000 places: chunks of 65 rows
    site = np.sort(rng.integers(0, 5, rows)).reshape(-1, *[1] * (len(shape) - 1))
    images = (1000 * site + rng.normal(size=shape)).astype(np.float32)
    axes = tuple(range(images.ndim - 1))
    for some in (images, images[rng.permutation(rows)]):
        found = moments(some)
        assert np.allclose(found.mean, images.mean(axes, np.float64), rtol=1e-12, atol=1e-9)
        assert np.allclose(found.deviation, images.std(axes, dtype=np.float64), rtol=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e7, 1e30, 1e-30])
def test_a_constant_channel_is_worth_nothing(value):
    train = np.stack([np.full(1000, value), np.arange(1000)], axis=1).astype(np.float32)
    test = np.array([[value, 0], [value + 1, 999], [2 * value, 0]], np.float32)
    found = np.asarray(standardise(train)(test))
    assert (found[:, 0] == 0).all()
    assert np.allclose(found[:, 1], [-1.730, 1.730, -1.730], atol=1e-3)


def test_a_channel_of_small_numbers_is_no_constant_one():
    train = (1e-12 * np.arange(100)[:, None]).astype(np.float32)
    assert np.asarray(standardise(train)(train)).std() == pytest.approx(1, abs=1e-4)


def test_one_example_is_all_mean():
    one = np.array([[3.0, -4.0]], np.float32)
    assert (np.asarray(standardise(one)(one)) == 0).all()
    assert doubts(one, one) == ()


def test_most_examples_raise_no_doubts():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 8, 8, 3)).astype(np.uint8)
    assert doubts(images, images[:5]) == ()
    assert doubts(images, images[:1]) == ()
    features = rng.normal(size=(50, 8)) * 10.0 ** np.arange(8)
    assert doubts(features, rng.normal(size=(20, 8)) * 10.0 ** np.arange(8)) == ()
    small = rng.integers(0, 256, (50, 3, 3, 3)).astype(np.uint8)
    assert doubts(small, small) == ()


def test_other_scales_are_told():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3)).astype(np.float32)
    (line,) = doubts(images, images / 255)
    assert line.startswith("test values are scaled unlike training values in 3 of 3 channels")
    (line,) = doubts(images / 255, images)
    assert line.startswith("test values are scaled unlike training values in 3 of 3 channels")
    shifted = images + np.array([0, 0, 5000], np.float32)
    (line,) = doubts(images, shifted)
    assert "in 1 of 3 channels: channel 2 has mean" in line


def test_what_is_constant_in_training_alone_is_told():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(50, 3)), rng.normal(size=(20, 3))
    train[:, 1] = 7
    (line,) = doubts(train, test)
    assert line.startswith("1 of 3 channels are constant in the training examples and not in")
    test[:, 1] = 7
    assert doubts(train, test) == ()
    test[:, 1] = 8
    assert len(doubts(train, test)) == 1


def test_channels_that_stand_first_are_told():
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32)).astype(np.uint8)
    (line,) = doubts(images, images)
    assert line.startswith("images of shape (3, 32, 32) look as if their channels stood first")
