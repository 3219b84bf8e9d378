"""Evaluates newcomers, clients kept out of training: they are probed, given experts and tested."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.examples import Examples
from experiments.history import Metrics, fell_back
from flexmoe_jax import simulation
from flexmoe_jax.assignment import Solution
from flexmoe_jax.federation import Federation
from flexmoe_jax.metrics import newcomer_figures
from flexmoe_jax.simulation import TestSet
from flexmoe_jax.types import Own, State

Judge = Callable[[State], Metrics]
"""Maps the state of a federation to figures, such as those of its newcomers."""

# Batches per client for probing: enough to compare experts on the same examples.
_BATCHES = 4


def make_judge(
    config: ConfigDict,
    federation: Federation,
    examples: Examples,
    capacity: np.ndarray,
    test: TestSet,
    mesh: Mesh,
) -> Judge | None:
    """Makes the function that evaluates newcomers; None if there are no newcomers.

    Args:
      config: the config of the run.
      federation: the federation of the clients that train.
      examples: examples of these clients, and of the newcomers.
      capacity: (n,) k_c of the newcomers.
      test: the test set of the clients that train.
      mesh: the devices.
    """
    coming = examples.newcomers
    if coming is None:
        return None
    few = coming.clients.few(_BATCHES * config.local.batch_size, config.seed)
    shortlist = config.clients.shortlist
    them = simulation.await_newcomers(federation, few, capacity, shortlist=shortlist, mesh=mesh)
    shown = simulation.replicate(few, mesh)
    if coming.group is not None:
        numbers = {"row": np.arange(len(coming.group))}
        cut = simulation.chunk_test_set(numbers, config.eval.batch_size, mesh, coming.group)
        test = test._replace(group=cut.group)

    @cache
    def owned() -> Own:
        return them.init(jax.random.key(config.seed))

    def judge(state: State) -> Metrics:
        fitness = them.probe(state.server, owned(), shown)
        solutions = them.enrol(fitness)
        evaluation = them.evaluate(state.server, owned(), solutions, test, shown.about)
        sent = _traffic(federation, shortlist, np.asarray(fitness), solutions)
        return {
            **newcomer_figures(evaluation),
            "assignment/newcomer_status": max((s.status for s in solutions), key=fell_back),
            "comm/newcomer_bytes_down": int(sent.down.sum()),
            "comm/newcomer_bytes_up": int(sent.up.sum()),
        }

    return judge


def _traffic(
    federation: Federation, shortlist: int, fitness: np.ndarray, solutions: tuple[Solution, ...]
) -> simulation.Traffic:
    """Computes the bytes sent to newcomers to probe experts, and then to hold some of them.

    With a shortlist of some experts, a newcomer downloads only these and those it is assigned.

    Args:
      federation: the federation of the clients that train.
      shortlist: number of experts that a newcomer probes; 0 for all.
      fitness: (G, n, E) fitness that newcomers report; experts that a newcomer does not probe have
        the lowest value of its rows.
      solutions: the assignment of each layer group.
    """
    everything = simulation.probe_traffic(federation, fitness.shape[1])
    experts = fitness.shape[2]
    if shortlist in (0, experts):
        return everything
    asked = fitness > fitness.min(axis=(0, 2), keepdims=True) + 0.5
    sent = asked | np.stack([solution.assignment for solution in solutions])
    down = simulation.traffic(sent.swapaxes(0, 1), simulation.payloads(federation)).down
    up = everything.up * (shortlist / experts)
    return everything._replace(down=down, up=up.astype(np.int64))


def notes_on_newcomers(config: ConfigDict, federation: Federation) -> tuple[str, ...]:
    """Returns notes on newcomers that a user should read before trusting their figures."""
    kept = {"gate": "gates", "private": "private parts"}.items()
    untrained = [words for owner, words in kept if owner in federation.layout.owner]
    if not config.clients.newcomers or not untrained:
        return ()
    return (
        f"newcomers have {' and '.join(untrained)} of their own as they were drawn, since such "
        "never leave the clients that trained theirs",
    )
