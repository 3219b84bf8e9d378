"""Models of other libraries, and plain functions, are federated as Linen modules are."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

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
    class MoE(nnx.Module):
        def __init__(self, features, experts, rngs):
            shape = (experts, features, features)
            self.experts = nnx.Param(0.2 * jax.random.normal(rngs.params(), shape))
            self.gate = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape[:2]))

        def __call__(self, x, held):
            routing = models.route(x @ self.gate.T, held)
            return jnp.einsum("be,edf,bd->bf", routing.combine, self.experts[...], x), routing

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(64, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)
            self.moe = MoE(16, 4, rngs)

        def __call__(self, images, held):
            h = nnx.relu(self.first(images.reshape(-1, 64) / 128 - 1))
            mixed, routing = self.moe(h, held["moe"])
            return self.last(h + nnx.relu(mixed)), {"moe": routing}

    graph = nnx.graphdef(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    model = models.from_functions(
        init=lambda key, images: nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(key)))),
        apply=lambda params, images, held: nnx.merge(graph, params)(images, held),
        rules={"moe/experts": EXPERT, "moe/gate": GATE},
    )
    check(*federated(clients, model))


def test_an_equinox_model(clients):
    class MoE(eqx.Module):
        experts: eqx.nn.MLP  # E of them: every array has the expert axis in front
        gate: eqx.nn.Linear

        def __init__(self, features, experts, key):
            make = eqx.filter_vmap(lambda key: eqx.nn.MLP(features, features, 8, 1, key=key))
            self.experts = make(jax.random.split(key, experts))
            self.gate = eqx.nn.Linear(features, experts, key=key)

        def __call__(self, x, held):
            routing = models.route(jax.vmap(self.gate)(x), held)
            each = eqx.filter_vmap(lambda expert: jax.vmap(expert)(x))(self.experts)
            return jnp.einsum("be,ebd->bd", routing.combine, each), routing

    class Net(eqx.Module):
        first: eqx.nn.Linear
        moe: MoE
        last: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.first, self.moe = eqx.nn.Linear(64, 16, key=keys[0]), MoE(16, 4, keys[1])
            self.last = eqx.nn.Linear(16, 10, key=keys[2])

        def __call__(self, images, held):
            h = jax.nn.relu(jax.vmap(self.first)(images.reshape(-1, 64) / 128 - 1))
            mixed, routing = self.moe(h, held["moe"])
            return jax.vmap(self.last)(h + mixed), {"moe": routing}

    _, static = eqx.partition(Net(jax.random.key(0)), eqx.is_array)
    model = models.from_functions(
        init=lambda key, images: eqx.filter(Net(key), eqx.is_array),
        apply=lambda params, images, held: eqx.combine(params, static)(images, held),
        rules={"moe/experts/*": EXPERT, "moe/gate/*": GATE},
    )
    check(*federated(clients, model))


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
