"""Models of other libraries, and plain functions, can be federated like Linen modules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import equinox_model, nnx_model
from flexmoe_jax import models, simulation
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.federation import Federation
from flexmoe_jax.models import EXPERT, GATE
from tests.conftest import CAPACITY

LOCAL = LocalTraining(optax.adam(0.01), batch_size=8)


def federated(clients, model, rounds=4):
    """The federation, and the state and the mean loss after each round."""
    sample = {name: values[:2] for name, values in clients.arrays.items()}
    federation = Federation(model, sample, CAPACITY, make_policy("flex", exploration=1.0), LOCAL)
    simulated = simulation.simulate(federation, clients)
    states, losses, everybody = [simulated.init(jax.random.key(0))], [], np.arange(7)
    for _ in range(rounds):
        plan = simulated.plan(everybody, simulated.assign(states[-1], everybody))
        # The round takes the state that it is given; the first is looked at afterwards.
        state, report = simulated.round(jax.tree.map(jnp.copy, states[-1]), clients, plan)
        states.append(state)
        losses.append(float((report.loss * report.units).sum() / report.units.sum()))
    return federation, states, losses


def check(federation, states, losses):
    """Experts are assigned within capacity, and all are trained; what clients keep, too."""
    assert losses[-1] < 0.8 * losses[0]
    assert federation.layout.layers == ("moe",)
    assert set(federation.layout.owner) == {"shared", "experts", "gate"}
    begun, ended = jax.device_get((states[0], states[-1]._replace(server=states[-1].server)))
    held = (ended.clients.slots < 4).sum(axis=(1, 2))
    assert held.tolist() == CAPACITY.tolist()
    used = ended.server.ledger.usage[0]
    assert used.sum(axis=0).all()
    assert ((ended.server.ledger.held_rounds[0] > 0) >= (used > 0)).all()
    for before, after in zip(
        *map(jax.tree.leaves, (begun.server.experts, ended.server.experts)), strict=True
    ):
        assert (before != after).reshape(4, -1).any(axis=1).all()
    for before, after in zip(
        *map(jax.tree.leaves, (begun.clients.gates, ended.clients.gates)), strict=True
    ):
        moved = (before != after).reshape(7, 4, -1).any(axis=2)
        assert (moved <= (ended.server.ledger.held_rounds[0] > 0)).all()
        assert moved.any()


def test_an_nnx_model(clients):
    check(*federated(clients, nnx_model.model))


def test_an_equinox_model(clients):
    check(*federated(clients, equinox_model.model))


def test_plain_functions(clients):
    def init(key, images):
        keys = jax.random.split(key, 4)
        shapes = {"in": (64, 16), "experts": (4, 16, 16), "gate": (4, 16), "out": (16, 10)}
        drawn = {
            n: 0.2 * jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys, strict=True)
        }
        return {"in": drawn["in"], "out": drawn["out"], "moe": (drawn["experts"], drawn["gate"])}

    def apply(params, images, held):
        experts, gate = params["moe"]
        h = jax.nn.relu((images.reshape(-1, 64) / 128 - 1) @ params["in"])
        routing = models.route(h @ gate.T, held["moe"])
        mixed = jnp.einsum("be,edf,bd->bf", routing.combine, experts, h)
        return (h + mixed) @ params["out"], {"moe": routing}

    check(*federated(clients, models.from_functions(init, apply, {"moe/0": EXPERT, "moe/1": GATE})))
