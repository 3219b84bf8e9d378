from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.special

from flexmoe_jax.client import balance_bias_loss, balance_loss, router_z_loss
from flexmoe_jax.models import route


def test_losses_on_routing_by_hand():
    # Two of three experts held; four examples, the last is padding. Of the three that count, two
    # go to expert 0, one to expert 1: f = (2/3, 1/3). Probabilities 0.75, 0.75, 0.25 for expert 0:
    # p = (7/12, 5/12). 2 · (2/3 · 7/12 + 1/3 · 5/12) = 2 · 19/36 = 19/18.
    probability = np.array([0.75, 0.75, 0.25, 0.9], np.float32)
    logits = np.stack([np.log(probability), np.log(1 - probability), np.full(4, 7.0)], axis=1)
    logits = logits.astype(np.float32)
    held, valid = np.array([True, True, False]), np.array([1.0, 1.0, 1.0, 0.0], np.float32)

    @jax.jit
    def losses(logits):
        routing = route(logits, held)
        return balance_loss(routing, held, valid), router_z_loss(routing, held, valid)

    balance, z = losses(logits)
    assert balance == pytest.approx(19 / 18, rel=1e-5)
    # The two held probabilities sum to 1, so log z = 0 for all that count.
    assert z == pytest.approx(0.0, abs=1e-9)
    # Adding 2 to each logit moves log z to 2, and its square to 4.
    assert losses(logits + 2)[1] == pytest.approx(4.0, rel=1e-5)


def test_a_bias_falls_with_the_use_of_its_expert():
    # Experts 0, 1 and 2 are held. Of the three examples that count, two choose expert 0 and one
    # chooses expert 1. Mean use is 1/3: 0 is above it, 2 is below it, 1 is exactly there.
    logits = np.array([[3.0, 1, 0, 9], [3, 1, 0, 9], [0, 3, 1, 9], [0, 0, 3, 9]], np.float32)
    held, valid = np.array([True, True, True, False]), np.array([1.0, 1, 1, 0], np.float32)

    @jax.jit
    def choose(bias):
        return route(logits, held, biased=logits + bias)

    def loss(bias):
        return balance_bias_loss(choose(bias), held, valid)

    slope = jax.jit(jax.grad(loss))(np.zeros(4, np.float32))
    np.testing.assert_allclose(slope, [1, 0, -1, 0], atol=1e-6)
    # A bias decides who is selected, and not with what weight.
    moved = jax.device_get(choose(np.array([-3.0, 0, 0, 0], np.float32)))
    np.testing.assert_array_equal(moved.selected[0], [False, True, False, False])
    np.testing.assert_allclose(
        moved.combine[0, 1], scipy.special.softmax(logits[0, :3])[1], rtol=1e-6
    )
