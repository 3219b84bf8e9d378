"""A small federation on real digits, for all tests of the federated room."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import data, federated, models
from flexmoe_jax.assignment import make_policy

CAPACITY = np.array([1, 3, 2, 1, 2, 3, 1])
EXPERTS = 4


@pytest.fixture(scope="session")
def clients(digits: data.Dataset) -> data.ClientData:
    parts = data.partition("dirichlet", digits.train_labels, len(CAPACITY), seed=0, alpha=0.3)
    return data.build_clients(digits, parts)


def prepare(images):
    return images.astype(jnp.float32) / 128 - 1


@pytest.fixture(scope="session")
def make_algorithm(clients: data.ClientData) -> Callable[..., federated.Algorithm]:
    def make(**options) -> federated.Algorithm:
        settings = {
            "prepare": prepare,
            "capacity": CAPACITY,
            "policy": make_policy("random"),
            "load_model": federated.make_load_model("clients", CAPACITY, CAPACITY),
            "local": federated.LocalTraining(optax.sgd(0.1), epochs=2, batch_size=8),
            "fitness": federated.FitnessOptions(),
        }
        model = models.MoEClassifier(models.MLP((16,)), classes=10, experts=EXPERTS, hidden=8)
        return federated.flexmoe(model, clients, **(settings | options))

    return make
