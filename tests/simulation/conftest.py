"""A small federation on real digits, for all tests of the simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import client, data, models, simulation
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.federation import Federation
from flexmoe_jax.simulation import client_mesh
from tests.conftest import CAPACITY

EXPERTS = 4
MODULE = models.MoEClassifier(models.MLP((16,)), classes=10, experts=EXPERTS, hidden=8)


class TwoLayers(nn.Module):
    """A classifier with two MoE layers, of unlike sizes."""

    @nn.compact
    def __call__(self, x):
        h = models.MLP((16,), name="backbone")(x)
        layer = partial(models.MoELayer, EXPERTS)
        h = h + layer(hidden=8, name="first")(h)
        h = h + layer(hidden=4, name="second")(h)
        return nn.Dense(10, name="head")(h)


def prepare(images):
    return images.astype(jnp.float32) / 128 - 1


DEEP = models.from_linen(TwoLayers()).after(prepare)


DEFAULTS = {
    "model": models.classifier(MODULE).after(prepare),
    "capacity": CAPACITY,
    "policy": make_policy("random"),
    "local": client.LocalTraining(optax.sgd(0.1), epochs=2, batch_size=8, balance=0.0),
    "prior": False,
}


@pytest.fixture(scope="session")
def make_simulation(clients: data.ClientData) -> Callable[..., simulation.Simulation]:
    """Builds a small simulation; options of `Federation` and `simulate` replace its defaults.

    The policy runs on the host. Simulations that differ in nothing else have the same programs,
    which are traced once; a test that counts compilations asks for programs of its own.
    """
    sample = {name: values[:2] for name, values in clients.arrays.items()}
    known: dict[tuple, simulation.Simulation] = {}

    def make(rows=0, block_size=0, mesh=None, own=False, **choices) -> simulation.Simulation:
        federation, mesh = Federation(sample=sample, **(DEFAULTS | choices)), mesh or client_mesh(1)
        made = simulation.simulate(federation, clients, rows=rows, block_size=block_size, mesh=mesh)
        if own:
            return made
        traced = {name: _by_value(x) for name, x in (DEFAULTS | choices).items()}
        del traced["policy"]
        place = (rows, block_size, mesh, *sorted(traced.items(), key=lambda item: item[0]))
        like = known.setdefault(place, made)
        return made._replace(
            init=like.init, round=like.round, tune=like.tune, evaluate=like.evaluate
        )

    return make


def _by_value(x):
    """Returns what an option is told apart by."""
    return (x.shape, x.dtype, x.tobytes()) if isinstance(x, np.ndarray) else x


@pytest.fixture(scope="session")
def simulated(make_simulation) -> simulation.Simulation:
    """The small simulation with its defaults."""
    return make_simulation()


def plain(state):
    """A state that can be compared: without its key."""
    return jax.device_get(state._replace(server=state.server._replace(key=0)))


@contextmanager
def strictly() -> Iterator[None]:
    """JAX in double precision, and refusing to promote types or ranks."""
    with (
        jax.enable_x64(),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield
