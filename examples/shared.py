"""Code that the examples share: digits distributed over clients, a model, and some rounds."""

import jax
import numpy as np
import optax

from flexmoe_jax import assignment, client, data, models, simulation
from flexmoe_jax.federation import Federation


def digits(clients: int = 10):
    """Returns clients that each have three of ten digits, and a common test set."""
    found = data.load(data.DataOptions("digits", train_limit=600, test_limit=200))
    skew = data.PartitionOptions("k_class", classes_per_client=3)
    parts = data.partition(skew, found.train_labels, clients, seed=0)
    test = {"images": found.test_images, "labels": found.test_labels.astype(np.int32)}
    return data.build_clients(found, parts), simulation.chunk_test_set(test)


def classifier():
    """Returns a model with four experts of 16 hidden units behind a small backbone."""
    module = models.MoEClassifier(models.MLP((32,)), classes=10, experts=4, hidden=16)
    return models.classifier(module).after(lambda images: images / 128 - 1)


def federate(model, clients, **choices):
    """Returns a federation in which each client holds two experts; `choices` change the default."""
    usual = {
        "capacity": np.full(len(clients.size), 2),
        "policy": assignment.make_policy("flex"),
        "local": client.LocalTraining(optax.adam(0.01), batch_size=16),
    }
    sample = {name: values[:2] for name, values in clients.arrays.items()}
    return Federation(model, sample, **{**usual, **choices})


def train(federation, clients, rounds: int = 5, cohorts=None):
    """Trains for some rounds with the clients of `cohorts(round)`, by default with all clients.

    Returns:
      the simulation and its final state.
    """
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
    """Trains a model in a federation, and prints its accuracy on the clients' own digits."""
    clients, test = digits()
    simulated, state = train(federate(model, clients), clients)
    found = simulated.evaluate(state, test, clients.about)
    print(f"a client is right on {float(found.personal_accuracy.mean()):.0%} of its own digits")
