"""How clients fare that a run keeps out of training: probed, given experts and tested."""

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
"""State of a federation -> the figures of its newcomers."""

# A few batches of a client's: enough to tell experts apart by what they make of the same examples.
_BATCHES = 4


def make_judge(
    config: ConfigDict,
    federation: Federation,
    examples: Examples,
    capacity: np.ndarray,
    test: TestSet,
    mesh: Mesh,
) -> Judge | None:
    """What says how newcomers fare; None where there are none.

    Args:
      config: of the run.
      federation: of the clients that train.
      examples: of them, and of the newcomers.
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
    """What newcomers are sent, to be asked and then to hold: of a shortlist these experts alone.

    Args:
      federation: of the clients that train.
      shortlist: experts that a newcomer is asked about; 0 for all.
      fitness: (G, n, E) what newcomers said; the least of a row for experts it was not asked about.
      solutions: of each layer.
    """
    everything = simulation.probe_traffic(federation, fitness.shape[1])
    if not shortlist:
        return everything
    asked = fitness > fitness.min(axis=(0, 2), keepdims=True) + 0.5
    sent = asked | np.stack([solution.assignment for solution in solutions])
    down = simulation.traffic(sent.swapaxes(0, 1), simulation.payloads(federation)).down
    up = everything.up * (shortlist / fitness.shape[2])
    return everything._replace(down=down, up=up.astype(np.int64))


def notes_on_newcomers(config: ConfigDict, federation: Federation) -> tuple[str, ...]:
    """What a user should know of newcomers before trusting their figures."""
    kept = {"gate": "gates", "private": "private parts"}.items()
    untrained = [words for owner, words in kept if owner in federation.layout.owner]
    if not config.clients.newcomers or not untrained:
        return ()
    return (
        f"newcomers have {' and '.join(untrained)} of their own as they were drawn, since such "
        "never leave the clients that trained theirs",
    )
