"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

from flexmoe_jax import data

# Unit tests compile far more than they compute; the launcher's tests run with all optimisations.
jax.config.update("jax_disable_most_optimizations", True)
hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    """300 real digits for training, all 10 classes."""
    return data.load("digits", train_limit=300, test_limit=100)
