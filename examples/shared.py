"""What the examples share: pictures of digits dealt out to clients, and some rounds."""

import jax
import numpy as np
import optax

from flexmoe_jax import assignment, client, data, models, simulation
from flexmoe_jax.federation import Federation


def digits(clients: int = 10):
    """Clients that each see three of ten digits, and a test set for all."""
    found = data.load(data.DataOptions("digits", train_limit=600, test_limit=200))
    skew = data.PartitionOptions("k_class", classes_per_client=3)
    parts = data.partition(skew, found.train_labels, clients, seed=0)
    test = {"images": found.test_images, "labels": found.test_labels.astype(np.int32)}
    return data.build_clients(found, parts), simulation.chunk_test_set(test)


def classifier():
    """Four experts of 16 hidden units behind a small backbone."""
    module = models.MoEClassifier(models.MLP((32,)), classes=10, experts=4, hidden=16)
    return models.classifier(module).after(lambda images: images / 128 - 1)


def federate(model, clients, **choices):
    """A federation in which a client holds two experts, but for other choices."""
    usual = {
        "capacity": np.full(len(clients.size), 2),
        "policy": assignment.make_policy("flex"),
        "local": client.LocalTraining(optax.adam(0.01), batch_size=16),
    }
    sample = {name: values[:2] for name, values in clients.arrays.items()}
    return Federation(model, sample, **{**usual, **choices})


def train(federation, clients, rounds: int = 5, cohorts=None):
    """The simulation, and its state after some rounds of these clients: cohorts(round) or all."""
    simulated = simulation.simulate(federation, clients)
    state = simulated.init(jax.random.key(0))
    for t in range(rounds):
        cohort = np.arange(federation.clients) if cohorts is None else cohorts(t)
        plan = simulated.plan(cohort, simulated.assign(state, cohort))
        state, report = simulated.round(state, clients, plan)
        loss = np.average(report.loss, weights=report.units)
        used = np.asarray(report.usage[0], int)
        print(f"round {t + 1}: loss {loss:.3f}, examples to each expert {used.tolist()}")
    return simulated, state


def show_learning(model):
    """Federates a model, and prints how well it serves its clients."""
    clients, test = digits()
    simulated, state = train(federate(model, clients), clients)
    found = simulated.evaluate(state, test, clients.about)
    print(f"a client is right on {float(found.personal_accuracy.mean()):.0%} of its own digits")
