"""Several MoE layers: an expert is a column through all of them, or each is assigned by itself."""

from __future__ import annotations

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import client, data, models, server, simulation, tasks
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.federation import Federation
from flexmoe_jax.types import Params

EXPERTS, CLIENTS = 4, 6
CAPACITY = np.array([1, 2, 3, 2, 1, 2])


def text():
    """A decoder with experts in both blocks, and clients that count in steps of their own."""
    step = 1 + np.arange(CLIENTS).repeat(12)[:, None] % 3
    tokens = ((np.arange(9) * step + np.arange(len(step))[:, None]) % 16).astype(np.int32)
    module = models.Transformer(EXPERTS, width=16, heads=2, hidden=8, vocabulary=16)
    parts = np.split(np.arange(len(tokens)), CLIENTS)
    return models.decoder(module), tasks.next_token(), data.join({"tokens": tokens}, parts), 2


def pictures(digits):
    """A ResNet with experts after all three stages."""
    mixture = partial(models.MoELayer, EXPERTS, 8, whole=True)
    backbone = models.ResNet(8, 4, 2, mixture=mixture, stages=(1, 2, 3))
    model = models.from_linen(models.Classifier(backbone, 10)).after(lambda x: x / 128 - 1)
    parts = np.split(np.arange(96), CLIENTS)
    few = {"images": digits.train_images[:96], "labels": digits.train_labels[:96]}
    counts = data.label_counts(few["labels"], parts, 10)
    return model, tasks.classification(), data.join(few, parts, counts), 3


@pytest.mark.parametrize(("kind", "layers"), [("transformer", "same"), ("resnet", "each")])
def test_a_model_with_several_layers_trains(digits, kind, layers):
    model, task, clients, count = text() if kind == "transformer" else pictures(digits)
    federation = Federation(
        model=model,
        sample={name: x[:2] for name, x in clients.arrays.items()},
        capacity=CAPACITY,
        policy=make_policy("random"),
        local=LocalTraining(optax.adam(0.01), epochs=2, batch_size=8, balance=0.1),
        task=task,
        layers=layers,
    )
    assert len(federation.layout.layers) == count
    groups = count if layers == "each" else 1
    simulated = simulation.simulate(federation, clients)
    state, everybody, losses, unlike = simulated.init(jax.random.key(0)), np.arange(CLIENTS), [], []
    begun = jax.device_get(state.server.experts)
    for _ in range(3):
        solutions = simulated.assign(state, everybody)
        assert len(solutions) == groups
        held = np.stack([solution.assignment for solution in solutions])
        assert (held.sum(axis=2) == CAPACITY).all()
        unlike.append((held != held[0]).any())
        state, report = simulated.round(state, clients, simulated.plan(everybody, solutions))
        losses.append(float(report.loss.mean()))
        # A unit passes every layer, so each has as many to count.
        assert np.allclose(report.usage.sum(axis=1), report.usage.sum() / groups)
    assert losses[-1] < losses[0]
    assert any(unlike) == (layers == "each")
    for layer, experts in jax.device_get(state.server.experts).items():
        used = np.asarray(state.server.ledger.usage[federation.group[layer]]).sum(axis=0) > 0
        for before, after in zip(*map(jax.tree.leaves, (begun[layer], experts)), strict=True):
            moved = (before != after).reshape(EXPERTS, -1).any(axis=1)
            assert not moved[~used].any()
        assert moved.any()
    if layers == "each":
        check_slots(federation, state, clients)


def check_slots(federation, state, clients):
    """Each client's model with K slots gives the output of the model of E experts with a mask."""
    inputs = federation.task.inputs({name: x[:3] for name, x in clients.arrays.items()})

    @jax.jit
    def both(state, number):
        own = jax.tree.map(lambda x: x[number], state.clients)
        down = server.send(federation.desk, state.server, own.slots, jnp.int32(0))
        params, held = client.model_of(federation.site, own, down)
        found, _ = federation.apply(params, inputs, held)
        mask = {
            layer: jnp.zeros(EXPERTS, bool).at[own.slots[group]].set(True, mode="drop")
            for layer, group in federation.group.items()
        }
        whole = Params(state.server.shared, state.server.experts, own.gates, own.private)
        expected, routings = federation.apply(whole, inputs, mask)
        selected = {layer: routing.selected for layer, routing in routings.items()}
        return found, expected, selected, mask

    for number in range(0, CLIENTS, 2):
        found, expected, selected, mask = jax.device_get(both(state, number))
        chex.assert_trees_all_close(found, expected, atol=1e-6, rtol=1e-6)
        for layer, chosen in selected.items():
            assert (chosen <= mask[layer][None]).all()
