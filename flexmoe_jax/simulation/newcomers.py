"""Clients that join late: they are probed, given experts and evaluated before they train.

    coming = await_newcomers(federation, data, capacity)
    owns = coming.init(key)
    fitness = coming.probe(state.server, owns, data)
    evaluation = coming.evaluate(state.server, owns, coming.enrol(fitness), test, data.about)

Nothing here changes the federation's state.

Axis legend: `n` newcomers, `E` experts, `K` expert slots, `G` groups of MoE layers, `L` MoE layers,
`S` batches, `B` batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexmoe_jax import client, server
from flexmoe_jax.assignment import Solution
from flexmoe_jax.data import About, ClientData
from flexmoe_jax.errors import InputError, check_range
from flexmoe_jax.federation import Federation
from flexmoe_jax.models import check_capacity
from flexmoe_jax.simulation.blocks import (
    client_mesh,
    replicate,
)
from flexmoe_jax.simulation.evaluate import TestSet, checker, evaluate
from flexmoe_jax.simulation.exchange import check_split
from flexmoe_jax.simulation.initial import init_owns
from flexmoe_jax.simulation.plan import assignment_slots
from flexmoe_jax.simulation.probe import probe_all
from flexmoe_jax.types import Array, Evaluation, Key, Own, Server, State


class Newcomers(NamedTuple):
    """The steps that newcomers go through, as functions of a federation's state.

    Attributes:
      init: key of the run -> Own, leaves (n, ...): the newcomers' own parts at the start. Jitted.
      probe: (Server, Own, ClientData) -> (G, n, E) fitness of all experts on all examples of the
        newcomers. Jitted.
      enrol: fitness -> a Solution for each group of MoE layers. Runs on the host.
      evaluate: (Server, Own, solutions, TestSet, About) -> Evaluation of the newcomers. If test
        examples have a `group` that is a single client, it is a newcomer's place, 0 to n - 1. The
        assembled model of all experts is left out, because it does not depend on newcomers.
    """

    init: Callable[[Key], Own]
    probe: Callable[[Server, Own, ClientData], Array]
    enrol: Callable[[Array], tuple[Solution, ...]]
    evaluate: Callable[[Server, Own, tuple[Solution, ...], TestSet, About], Evaluation]


def await_newcomers(
    federation: Federation,
    data: ClientData,
    capacity: np.ndarray,
    *,
    shortlist: int = 0,
    mesh: Mesh | None = None,
) -> Newcomers:
    """Builds the functions that handle the newcomers of a federation.

    Args:
      federation: the federation that they join.
      data: a few examples of each newcomer, used to probe the experts (see `ClientData.few`).
      capacity: (n,) int k_c of each newcomer.
      shortlist: how many experts each newcomer downloads for the probe, as recommended by the
        routers; 0 for all.
      mesh: the devices, as for `simulate`.

    Raises:
      InputError: a capacity out of range, not exactly one capacity per newcomer, examples that the
        task cannot take, an impossible shortlist, or a mesh over which the experts cannot be split.
    """
    capacity = np.asarray(capacity, np.int64)
    experts, newcomers = federation.layout.experts, len(data.size)
    if capacity.shape != (newcomers,):
        remedy = f"give a whole number for each of the {newcomers} newcomers"
        raise InputError("capacity", capacity.tolist(), remedy)
    federation.check(data.arrays)
    check_range("capacity", capacity, 0, experts, "the number of experts")
    check_capacity(federation.layout, capacity.tolist())
    check_shortlist(federation, shortlist, int(capacity.max()))
    mesh = mesh or client_mesh(1)
    check_split(federation, mesh)
    jitted = partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    judge = jitted(partial(_evaluate, federation, mesh))
    slots, check = max(int(capacity.max()), 1), checker(federation)

    def enrol(fitness: Array) -> tuple[Solution, ...]:
        return server.enrol(np.asarray(fitness), capacity, federation.seed)

    def evaluate_them(
        begun: Server, owns: Own, solutions: tuple[Solution, ...], test: TestSet, about: About
    ) -> Evaluation:
        check(test, about)
        assignment = np.stack([solution.assignment for solution in solutions], axis=1)
        given: Any = assignment_slots(assignment, slots)
        # A solver with a time limit may give different results on different hosts: all hosts use
        # the result of the first one.
        if jax.process_count() > 1:
            given = multihost_utils.broadcast_one_to_all(given)
        found: Evaluation = judge(begun, owns, replicate(given, mesh), test, about)
        return found

    return Newcomers(
        init=jitted(partial(_init, federation, newcomers)),
        probe=jitted(partial(_probe_all, federation, mesh, shortlist)),
        enrol=enrol,
        evaluate=evaluate_them,
    )


def check_shortlist(federation: Federation, shortlist: int, capacity: int) -> None:
    """Refuses a shortlist without routers, or one that is shorter than the largest capacity.

    Raises:
      InputError: the shortlist is out of range, a MoE layer has no router, or experts stay with
        their clients.
    """
    experts = federation.layout.experts
    if shortlist and not capacity <= shortlist <= experts:
        remedy = f"give {capacity}, the most that one can hold, to {experts}; or 0 for all"
        raise InputError("clients.shortlist", shortlist, remedy)
    if shortlist and any(routing.router is None for routing in federation.outputs[1].values()):
        raise InputError(
            "clients.shortlist", shortlist, "only routers recommend: model.router=true"
        )
    if shortlist and federation.keeps_experts:
        remedy = "experts stay with their clients: give 0"
        raise InputError("clients.shortlist", shortlist, remedy)


def _init(federation: Federation, newcomers: int, key: Key) -> Own:
    """Draws the newcomers' own parts; their ids follow the training clients', so draws differ."""
    numbers = federation.clients + jnp.arange(newcomers, dtype=jnp.int32)
    return init_owns(federation, key, numbers)[1]


def _evaluate(
    federation: Federation,
    mesh: Mesh,
    begun: Server,
    owns: Own,
    slots: Array,
    test: TestSet,
    about: About,
) -> Evaluation:
    state = State(begun, owns._replace(slots=slots))
    return evaluate(federation, mesh, state, test, about)._replace(assembled=None)


def _probe_all(
    federation: Federation,
    mesh: Mesh,
    shortlist: int,
    begun: Server,
    owns: Own,
    data: ClientData,
) -> Array:
    """Computes the fitness (G, n, E) of all experts on all examples of all newcomers."""
    newcomers, padded = data.index.shape
    log_share = None
    if federation.local.prior and data.label_share.shape[1]:
        log_share = client.log_shares(data.label_share)
    batch = federation.local.batch_size
    steps = -(-padded // batch)
    place = jnp.arange(steps * batch, dtype=jnp.int32)[None]
    rows = data.index[:, place[0].clip(max=padded - 1)]
    rows = jnp.where(place < data.size[:, None], rows, -1).reshape(newcomers, steps, batch)
    each = owns, rows, log_share
    return probe_all(federation, mesh, begun, each, data.arrays, shortlist)
