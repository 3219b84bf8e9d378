"""Suite `scale`: rounds of a federation with very many clients, of which a few take part.

One line per cohort size P, each measured in its own process: seconds of a round, seconds of the
assignment and plan in it, seconds per client of the cohort, bytes of the federation's state (mostly
one gate per client), and peak memory. Every device keeps a copy of the state. `seconds_fed` is for
rounds whose examples the host sends while the previous round is computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from statistics import median

import jax
import numpy as np
import optax

from experiments.benchmarks.process import Figures, peak_bytes, run_case
from experiments.benchmarks.timing import set_up
from experiments.benchmarks.workloads import CLASSES, make_federation
from flexmoe_jax import client, data, models, simulation
from flexmoe_jax.errors import InputError

_PER_ROUND = (10, 100, 1_000)
_CLIENTS, _EXPERTS = 100_000, 64
_EXAMPLES, _BATCH = 50, 10
_WARM_UP, _ROUNDS = 2, 5


def run(words: list[str]) -> Iterator[Figures]:
    """Yields the figures of each cohort size, or of the given one.

    Raises:
      InputError: more than one word, or a word that is not a valid cohort size.
    """
    if not words:
        for per_round in _PER_ROUND:
            yield run_case("scale", per_round)
    elif len(words) > 1 or not words[0].isdecimal() or not 0 < int(words[0]) <= _CLIENTS:
        raise InputError("scale", " ".join(words), f"give one cohort size, 1 to {_CLIENTS}")
    else:
        set_up()
        yield measure(_CLIENTS, _EXPERTS, int(words[0]))


def measure(clients: int, experts: int, per_round: int) -> Figures:
    """Times rounds of clients that each have 50 of scikit-learn's digits, drawn at random."""
    mesh = simulation.client_mesh()
    rng = np.random.default_rng(0)
    dataset = data.load(data.DataOptions("digits"))
    owned = rng.integers(0, len(dataset.train_labels), (clients, _EXAMPLES))
    client_data = data.build_clients(dataset, list(owned), place=np.asarray)
    federation = make_federation(
        models.MoEClassifier(models.MLP(), CLASSES, experts),
        client_data,
        rng.integers(1, 5, clients),
        prepare=data.standardise(dataset.train_images),
        local=client.LocalTraining(optax.sgd(0.1), batch_size=_BATCH, balance=0.0),
    )
    simulated = simulation.simulate(federation, client_data, mesh=mesh)
    resident = simulation.replicate(client_data, mesh)
    rounds, assignments, state_bytes = time_rounds(simulated, lambda cohort: resident, per_round)
    peak = peak_bytes()
    put = partial(simulation.replicate, mesh=mesh)
    fed, *_ = time_rounds(simulated, data.feed_cohorts(client_data, per_round, put), per_round)
    return {
        "suite": "scale",
        "clients": clients,
        "experts": experts,
        "per_round": per_round,
        "seconds": min(rounds),
        "seconds_median": median(rounds),
        "assign_seconds": min(assignments),
        "seconds_per_client": min(rounds) / per_round,
        "seconds_fed": min(fed),
        "state_bytes": state_bytes,
        "peak_bytes": peak,
        "devices": mesh.size,
    }


def time_rounds(
    simulated: simulation.Simulation, feed: data.Feed, per_round: int
) -> tuple[list[float], list[float], int]:
    """Returns seconds of warm rounds, seconds of their assignment and plan, and state bytes."""
    clients = len(simulated.setting.capacity)
    state = simulated.init(jax.random.key(0))
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    rounds, assignments = [], []

    def draw(number: int) -> np.ndarray:
        return simulation.sample_cohort(clients, per_round, seed=0, round_index=number)

    examples = feed(draw(0))
    for number in range(_WARM_UP + _ROUNDS):
        begin = time.perf_counter()
        cohort = draw(number)
        plan = simulated.plan(cohort, simulated.assign(state, cohort))
        assigned = time.perf_counter()
        state, report = simulated.round(state, examples, plan)
        examples = feed(draw(number + 1))
        jax.block_until_ready((state, report, examples))
        assignments.append(assigned - begin)
        rounds.append(time.perf_counter() - begin)
    return rounds[_WARM_UP:], assignments[_WARM_UP:], state_bytes
