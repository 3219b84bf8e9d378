from __future__ import annotations

import jax.numpy as jnp
import pytest

from flexmoe_jax.client import balance_loss, router_z_loss
from flexmoe_jax.models import route


def test_losses_on_routing_by_hand():
    # Two of three experts held; four examples, the last is padding. Of the three that count, two
    # go to expert 0, one to expert 1: f = (2/3, 1/3). Probabilities 0.75, 0.75, 0.25 for expert 0:
    # p = (7/12, 5/12). 2 · (2/3 · 7/12 + 1/3 · 5/12) = 2 · 19/36 = 19/18.
    probability = jnp.array([0.75, 0.75, 0.25, 0.9])
    logits = jnp.stack([jnp.log(probability), jnp.log(1 - probability), jnp.full(4, 7.0)], axis=1)
    held, valid = jnp.array([True, True, False]), jnp.array([1.0, 1.0, 1.0, 0.0])
    routing = route(logits, held)
    assert balance_loss(routing, held, valid) == pytest.approx(19 / 18, rel=1e-5)
    # The two held probabilities sum to 1, so log z = 0 for all that count.
    assert router_z_loss(routing, held, valid) == pytest.approx(0.0, abs=1e-9)
    # Adding 2 to each logit moves log z to 2, and its square to 4.
    assert router_z_loss(route(logits + 2, held), held, valid) == pytest.approx(4.0, rel=1e-5)
