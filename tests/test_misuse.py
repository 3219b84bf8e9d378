"""Common mistakes are refused at once, with one line that says what to give instead."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import assignment, client, data, models, server, simulation, tasks
from flexmoe_jax.checkpoint import Checkpoints
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from tests.conftest import CAPACITY

NOBODY: Any = None  # Refused before anybody looks at it.
REQUEST = assignment.Request(np.zeros((1, 2)), np.array([1]), np.array([0]), round=0, seed=0)
NONE_OF_TEN = np.zeros((2, 10))


class _Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x.reshape(len(x), -1)))


class Given:
    """A federation that is valid except for the change of a test case."""

    def __init__(self, clients: data.ClientData, digits: data.Dataset) -> None:
        self.clients = clients
        self.test = {"images": digits.test_images, "labels": digits.test_labels}
        self.train = {"images": digits.train_images, "labels": digits.train_labels}

    def model(self, backbone: nn.Module | None = None) -> models.Model:
        module = models.MoEClassifier(backbone or models.MLP((8,)), classes=10, experts=4)
        return models.classifier(module).after(lambda images: images / 128 - 1)

    def federation(self, **changes: Any) -> Federation:
        chosen: dict[str, Any] = {
            "model": self.model(),
            "sample": {name: values[:2] for name, values in self.clients.arrays.items()},
            "capacity": CAPACITY,
            "policy": assignment.make_policy("flex"),
            "local": client.LocalTraining(optax.sgd(0.1), batch_size=8),
            **changes,
        }
        return Federation(**chosen)

    def simulate(self, **options: Any) -> simulation.Simulation:
        return simulation.simulate(self.federation(), self.clients, **options)

    def judge(self, test: dict[str, np.ndarray], **options: Any) -> None:
        chunked = simulation.chunk_test_set(test, **options)
        self.simulate().evaluate(NOBODY, chunked, self.clients.about)

    def with_task(self, **functions: Any) -> None:
        task = tasks.classification()._replace(**functions)
        simulation.simulate(self.federation(task=task), self.clients)

    def with_labels(self, labels: np.ndarray) -> data.ClientData:
        return replace(self.clients, arrays={**self.clients.arrays, "labels": labels})


@pytest.fixture(scope="module")
def given(clients, digits) -> Given:
    return Given(clients, digits)


def _hold(held: Any, top_k: Any = 1) -> None:
    # As users have it, without the tests' own look at shapes.
    inspect.unwrap(models.route)(jnp.ones((2, 4)), jnp.asarray(held), top_k)


CASES = {
    "a name for a policy": (
        lambda g: g.federation(policy="flex"),
        'policy=flex: give a function Request -> Solution, as assignment.make_policy("flex")',
    ),
    "an unknown policy": (
        lambda g: assignment.make_policy("flx"),
        "assignment.policy=flx: did you mean flex?",
    ),
    "a rate for a local optimiser": (
        lambda g: client.LocalTraining(0.1),
        "optimizer=0.1: give an optax transform, as optax.sgd(0.1)",
    ),
    "a rate for the server's optimiser": (
        lambda g: g.federation(optimizer=1.0),
        "optimizer=1.0: give an optax transform",
    ),
    "no batch": (
        lambda g: client.LocalTraining(optax.sgd(0.1), batch_size=0),
        "local.batch_size=0: choose 1 or more",
    ),
    "epochs below 0": (
        lambda g: client.LocalTraining(optax.sgd(0.1), epochs=-1),
        "local.epochs=-1: choose 1 or more",
    ),
    "beta of 2": (
        lambda g: server.FitnessOptions(beta=2.0),
        "fitness.beta=2.0: choose a number in (0, 1]",
    ),
    "a trim above a half": (
        lambda g: server.trimmed_mean(0.6),
        "server.trim=0.6: choose a number in [0, 0.5]",
    ),
    "no expert an example": (
        lambda g: _hold([True] * 4, top_k=0),
        "model.top_k=0: choose 1 or more",
    ),
    "half an expert an example": (
        lambda g: _hold([True] * 4, top_k=1.5),
        "model.top_k=1.5: give a whole number",
    ),
    "numbers of experts for a mask": (
        lambda g: _hold([0, 2, 3, 3]),
        "held=int32[4]: give a mask: bool[4]",
    ),
    "a mask of other experts": (lambda g: _hold([True] * 3), "held=bool[3]: give a mask: bool[4]"),
    "labels that the model does not know": (
        lambda g: simulation.simulate(g.federation(), g.with_labels(np.arange(300) % 11)),
        "labels=10: the model tells classes 0 to 9 apart",
    ),
    "a row that is not there": (
        lambda g: data.join(g.train, [np.array([0]), np.array([10**6])], NONE_OF_TEN),
        "parts=1000000: give 0 to 299, positions in the arrays",
    ),
    "a row from the end": (
        lambda g: data.join(g.train, [np.array([0]), np.array([-1])], NONE_OF_TEN),
        "parts=-1: give 0 to 299, positions in the arrays",
    ),
    "rows by names": (
        lambda g: data.join(g.train, [np.array(["a"]), np.array(["b"])], NONE_OF_TEN),
        "parts=<U1: give positions in the arrays: whole numbers",
    ),
    "arrays of different lengths": (
        lambda g: data.join({**g.train, "labels": np.arange(3)}, [np.array([0])]),
        "give every array one entry for each example",
    ),
    "a client twice in a cohort": (
        lambda g: g.simulate().assign(NOBODY, np.array([1, 1])),
        "cohort=1: give each client once",
    ),
    "a client that is not there": (
        lambda g: g.simulate().assign(NOBODY, np.array([1, 7])),
        "cohort=7: give 0 to 6, the ids of the clients",
    ),
    "a client from the end": (
        lambda g: g.simulate().plan(np.array([-1]), ()),
        "cohort=-1: give 0 to 6, the ids of the clients",
    ),
    "a mask for a cohort": (
        lambda g: g.simulate().assign(NOBODY, CAPACITY > 1),
        "give client ids: whole numbers (P,)",
    ),
    "batch statistics": (
        lambda g: g.federation(model=g.model(_Normed())),
        "without batch statistics or other state",
    ),
    "a module for a model": (
        lambda g: g.federation(model=models.MLP((8,))),
        "give a models.Model, as models.from_linen(module) makes it",
    ),
    "arrays for a test set": (
        lambda g: g.simulate().evaluate(NOBODY, g.test, g.clients.about),
        "test=dict: give what chunk_test_set(arrays) makes of them",
    ),
    "test examples of other names": (
        lambda g: g.judge({"pictures": g.test["images"], "labels": g.test["labels"]}),
        "test=pictures, labels: the task reads 'images'",
    ),
    "test labels that the model does not know": (
        lambda g: g.judge({**g.test, "labels": g.test["labels"] + 1}),
        "labels=10: the model tells classes 0 to 9 apart",
    ),
    "test examples of clients that are not there": (
        lambda g: g.judge(g.test, group=np.arange(100) % 8),
        "group=7: give -1 to 6, where -1 is for what is nobody's own",
    ),
    "test examples, none at a time": (
        lambda g: simulation.chunk_test_set(g.test, batch_size=0),
        "batch_size=0: choose 1 or more",
    ),
    "an ownership of nothing": (
        lambda g: g.federation(ownership=models.Ownership(("nothing",))),
        "nothing: the model has no such part",
    ),
    "an ownership by a word": (
        lambda g: g.federation(ownership=models.Ownership("head")),
        "ownership.private=head: give a tuple of paths: ('head',)",
    ),
    "capacities of other clients": (
        lambda g: simulation.simulate(g.federation(capacity=np.ones(5, int)), g.clients),
        "give one for each of the 7 clients",
    ),
    "half a capacity": (
        lambda g: g.federation(capacity=np.full(7, 1.5)),
        "give whole numbers, one a client: (C,)",
    ),
    "a name for a task": (
        lambda g: g.federation(task="classification"),
        "task=classification: give a tasks.Task, as tasks.classification()",
    ),
    "a loss for each label": (
        lambda g: g.with_task(loss=lambda logits, batch: logits),
        "task.loss=(2, 10): give a number for each unit, (B, U...), as weight does: here (2,)",
    ),
    "a mean for a loss": (
        lambda g: g.with_task(loss=lambda logits, batch: logits.mean()),
        "task.loss=(): give a number for each unit",
    ),
    "hits for each label": (
        lambda g: g.with_task(hits=lambda logits, batch: logits > 0),
        "task.hits=(2, 10): give a number for each unit",
    ),
    "a task of other arrays": (
        lambda g: g.federation(task=tasks.classification("x", "y")),
        "sample=images, labels: give a batch of the named examples that the task reads ('x')",
    ),
    "no sample": (
        lambda g: g.federation(sample=None),
        "sample=None: give a batch of the named examples",
    ),
    "labels from 1": (
        lambda g: data.label_counts(np.array([1, 2, 3]), [np.arange(3)], 3),
        "labels=3: give 0 to 2, the numbers of the classes",
    ),
    "numbers of experts for an assignment": (
        lambda g: assignment.as_solution(REQUEST, np.array([[0, 2]])),
        "assignment=int64[1, 2]: give a bool array (1, 2): who holds what",
    ),
    "a name for an aggregator": (
        lambda g: g.federation(aggregator="mean"),
        "aggregator=mean: give a server.Aggregator, as server.mean()",
    ),
    "a name for a codec": (
        lambda g: g.federation(codec="int8"),
        'codec=int8: give a client.Codec, as client.Codec(client.make_compressor("int8"))',
    ),
    "a name for a compressor": (
        lambda g: g.federation(codec=client.Codec("top_k")),
        'codec.compressor=top_k: give a client.Compressor, as client.make_compressor("int8")',
    ),
    "a task without means": (
        lambda g: g.federation(task=tasks.classification()._replace(mean=None)),
        "task.mean=None: give two functions: outputs to what is averaged, and back",
    ),
    "a name for a loss": (
        lambda g: g.federation(task=tasks.classification()._replace(loss="mse")),
        "task.loss=mse: give a function",
    ),
    "a number in an aggregator": (
        lambda g: g.federation(aggregator=server.mean()._replace(zero=0)),
        "aggregator.zero=0: give a function",
    ),
    "words as examples": (
        lambda g: data.join({"text": np.array(["a", "b"])}, [np.arange(2)]),
        "text=array of <U1: give numbers; classes are numbered from 0",
    ),
    "a name for a load model": (
        lambda g: g.federation(load="usage"),
        "load=usage: give a server.LoadModel, as server.make_load_model makes it",
    ),
    "a dictionary for a record": (
        lambda g: g.federation(admission={"clip": 1.0}),
        "admission={'clip': 1.0}: give a server.Admission",
    ),
    "an unknown way of layers": (
        lambda g: g.federation(layers="every"),
        "assignment.layers=every: choose one of same, each",
    ),
    "blocks below 0": (
        lambda g: g.simulate(block_size=-1),
        "execution.client_block_size=-1: choose 0 or more",
    ),
    "a number for a key": (
        lambda g: g.simulate().init(0),
        "key=int32: give a key, as jax.random.key(0)",
    ),
    "fitness that is no number": (
        lambda g: assignment.Problem(np.full((2, 2), np.nan), np.ones(2, int), 0, 2),
        "fitness=nan: every number must be finite",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_easily_got_wrong_is_refused_in_one_line(given, case):
    misuse, line = CASES[case]
    with pytest.raises(InputError) as refused:
        misuse(given)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_can_be_understood_is_taken(given, tmp_path):
    assert Checkpoints(str(tmp_path), keep=2).rounds() == []
    simulated = given.simulate()
    state = simulated.init(jax.random.key(0))
    solutions = simulated.assign(state, [1, 2])
    plan = simulated.plan([1, 2], solutions)
    assert sorted(np.asarray(plan.clients).tolist())[:2] == [1, 2]
    assert given.federation(capacity=[1] * 7).clients == 7
