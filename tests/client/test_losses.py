from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.client import balance_loss, router_z_loss
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


def test_the_balance_loss_is_least_at_the_use_that_is_due():
    # Expert 0 is due three quarters. By hand: f = (2/3, 1/3), p = (7/12, 5/12), as above, and
    # 2/3 · 7/12 / (3/4) + 1/3 · 5/12 / (1/4) = 14/27 + 5/9 = 29/27.
    first = np.array([0.75, 0.75, 0.25], np.float32)
    held, valid = np.array([True, True]), np.ones(3, np.float32)

    @jax.jit
    def loss(first, use):
        logits = jnp.log(jnp.stack([first, 1 - first], axis=1))
        return balance_loss(route(logits, held), held, valid, use)

    use = np.array([0.75, 0.25], np.float32)
    assert loss(first, use) == pytest.approx(29 / 27, rel=1e-5)
    # More use of expert 0 lowers the loss here, where with even parts it raises it.
    slope = jax.jit(jax.grad(loss))
    assert (slope(first, use) < 0).all()
    assert (slope(first, None) > 0).all()
    # An expert that is due nothing counts as if it were due 1 %: 2/3 · 7/12 + 1/3 · 5/12 / 0.01.
    nearly = loss(first, np.array([1.0, 0.0], np.float32))
    assert nearly == pytest.approx(7 / 18 + 500 / 36, rel=1e-5)
