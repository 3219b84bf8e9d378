"""Other tasks: regression and several labels per example, by the package and by a user."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import data, models, simulation, tasks
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.metrics import evaluation_figures
from flexmoe_jax.server import FitnessOptions

RNG = np.random.default_rng(0)
X = RNG.normal(size=(480, 5)).astype(np.float32)
# Two rules: what is true of the same input depends on the client.
RULE = np.arange(480) % 2
CLIENTS = [np.flatnonzero(np.arange(480) % 8 == c) for c in range(8)]


class Net(nn.Module):
    """A MoE layer with a linear head."""

    outputs: int

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8)(x)
        return nn.Dense(self.outputs)(h + models.MoELayer(4, hidden=16, name="moe")(h))


def federated(task, arrays, outputs, rounds=8):
    """The evaluations before and after some rounds on 400 examples, of the other 80."""
    train = {name: x[:400] for name, x in arrays.items()}
    parts = [rows[rows < 400] for rows in CLIENTS]
    clients = data.join(train, parts)
    federation = Federation(
        model=models.from_linen(Net(outputs)),
        sample={name: x[:2] for name, x in train.items()},
        capacity=np.full(8, 2),
        policy=make_policy("flex"),
        local=LocalTraining(optax.adam(0.02), epochs=2, batch_size=10),
        task=task,
        fitness=FitnessOptions("loss"),
    )
    simulated = simulation.simulate(federation, clients)
    state, everybody = simulated.init(jax.random.key(0)), np.arange(8)
    # Each client's own test examples are those of its rule.
    rest = {name: x[400:] for name, x in arrays.items()}
    test = simulation.chunk_test_set(rest, 30, group=(np.arange(400, 480) % 8).astype(np.int32))
    losses = []
    for _ in range(rounds):
        plan = simulated.plan(everybody, simulated.assign(state, everybody))
        state, report = simulated.round(state, clients, plan)
        losses.append(float(report.loss.mean()))
    return losses, simulated.evaluate(state, test, clients.about), state


def test_regression():
    y = np.stack([X[:, 0], X[:, 1] * np.where(RULE, 1, -1)], axis=1).astype(np.float32)
    losses, evaluation, state = federated(tasks.regression("x", "y"), {"x": X, "y": y}, 2)
    assert losses[-1] < 0.5 * losses[0]
    figures = evaluation_figures(evaluation)
    # There is no accuracy: losses alone.
    assert {k for k in figures if figures[k] == figures[k] and "accuracy" in k} == set()
    # Half the squared distance, by example; of nought it is half the mean square.
    nought = 0.5 * np.square(y[400:]).sum(axis=1).mean()
    assert figures["eval/personal_loss"] < nought
    # Feedback is in losses as well: that of the pairs that were used is known.
    assert np.unique(state.server.ledger.fitness).size > 8


def test_a_task_of_a_users_own_with_several_labels():
    def log_odds(probability):
        return jnp.log(probability) - jnp.log1p(-probability)

    def check(arrays, outputs):
        if arrays["tags"].shape[1:] != outputs:
            raise InputError("tags", arrays["tags"].shape, f"the model has outputs {outputs}")

    several = tasks.Task(
        name="several labels",
        inputs=lambda batch: batch["x"],
        loss=lambda logits, batch: optax.sigmoid_binary_cross_entropy(logits, batch["tags"]).sum(1),
        hits=lambda logits, batch: ((logits > 0) == batch["tags"]).mean(axis=1),
        weight=lambda batch: jnp.ones(len(batch["tags"]), jnp.float32),
        mean=(jax.nn.sigmoid, log_odds),
        labels=None,
        adjust=None,
        check=check,
    )
    tags = X[:, :3] > 0
    losses, evaluation, _ = federated(several, {"x": X, "tags": tags}, 3)
    assert losses[-1] < 0.5 * losses[0]
    figures = evaluation_figures(evaluation)
    assert min(figures[f"eval/{who}_accuracy"] for who in ("personal", "global", "server")) > 0.85
    with pytest.raises(InputError, match=r"^tags=\(400, 3\): the model has outputs \(2,\)"):
        federated(several, {"x": X, "tags": tags}, 2)
