"""Runs rounds one after another: assigns experts, trains, checks the result and reports metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.build import Experiment
from experiments.history import Metrics, fell_back
from flexmoe_jax.assignment import Solution
from flexmoe_jax.data import ClientData
from flexmoe_jax.edge import Outcome
from flexmoe_jax.metrics import coefficient_of_variation, evaluation_figures
from flexmoe_jax.server import epsilon
from flexmoe_jax.simulation import Traffic, probe_traffic, traffic
from flexmoe_jax.types import RoundReport, State


class DivergedError(RuntimeError):
    """The training loss or the model is not a number, or no update of a round can be used."""


class Assigned(NamedTuple):
    """A round before it begins: the cohort (P,), the experts assigned to it, and the traffic."""

    cohort: np.ndarray
    solutions: tuple[Solution, ...]
    traffic: Traffic

    @property
    def seconds(self) -> float:
        """Wall time that the solvers took for the assignment."""
        return sum(solution.seconds for solution in self.solutions)


class Carried(NamedTuple):
    """A round that is finished, or is still being computed on the device.

    Attributes:
      state: the state after the round.
      clients: (P,) clients of the round's plan.
      outcome: each client's share of work, whether the client was reached and its update delivered,
        and the seconds of the round.
      report: the report of the round.
    """

    state: State
    clients: np.ndarray
    outcome: Outcome
    report: RoundReport


Carry = Callable[[Experiment, State, ClientData, Assigned], Carried]
"""(experiment, state, the cohort's examples, assigned experts) -> the round after training."""


def play(experiment: Experiment, state: State, examples: ClientData, assigned: Assigned) -> Carried:
    """Carries out a round by simulation."""
    simulation, done = experiment.simulation, int(state.server.round)
    arrival, outcome = experiment.network.play(assigned.cohort, assigned.traffic, done)
    plan = simulation.plan(assigned.cohort, assigned.solutions, arrival)
    clients = np.asarray(plan.clients)
    following, report = simulation.round(state, examples, plan)
    return Carried(following, clients, outcome, report)


def run_rounds(
    config: ConfigDict,
    experiment: Experiment,
    state: State,
    first: int = 0,
    carry: Carry | None = None,
) -> Iterator[tuple[State, Metrics]]:
    """Runs rounds from number `first` (from 0) to the last, one per step of the iterator.

    While the device trains a cohort, the host sends the examples of the next cohort, if they are
    not on the device yet. While the device evaluates, the host assigns the next round's experts.

    Yields:
      The new state, which the next round consumes, and the round's line of metrics.jsonl.

    Raises:
      DivergedError: a client's loss or the model is not a number, or no update can be used.
    """
    network, carry = experiment.network, carry or play
    if first == config.rounds:
        return
    cohort = network.cohort(first)
    examples = experiment.feed(cohort)
    assigned = _assign(config, experiment, state, cohort, examples)
    for round_index in range(first, config.rounds):
        begin = time.monotonic()
        last = round_index + 1 == config.rounds
        state, clients, outcome, report = carry(experiment, state, examples, assigned)
        if not last:
            cohort = network.cohort(round_index + 1)
            examples = experiment.feed(cohort)
        report = jax.device_get(report)
        seconds = assigned.seconds + time.monotonic() - begin
        check_health(report, clients, network.faulty(), round_index, config)
        metrics: Metrics = {
            "round": round_index + 1,
            **round_metrics(state, assigned, outcome, report),
            "time/round_seconds": seconds,
            "time/train_examples_per_second": float(report.examples.sum()) / seconds,
            **privacy_spent(config, round_index + 1),
        }
        if network.devices is not None:
            metrics["time/simulated_seconds"] = outcome.seconds
        evaluation = None
        if (round_index + 1) % config.eval.every == 0 or last:
            evaluation = experiment.simulation.evaluate(state, experiment.test, experiment.about)
        if not last:
            assigned = _assign(config, experiment, state, cohort, examples)
        # The host waits for the evaluation only here.
        if evaluation is not None:
            metrics |= evaluation_figures(evaluation)
            for judge in experiment.judges:
                metrics |= judge(state)
        yield state, existing(metrics)


def _assign(
    config: ConfigDict,
    experiment: Experiment,
    state: State,
    cohort: np.ndarray,
    examples: ClientData,
) -> Assigned:
    """Assigns experts to a cohort, and computes the traffic of the round."""
    simulation = experiment.simulation
    solutions = simulation.assign(state, cohort, examples)
    assignment = np.stack([solution.assignment for solution in solutions], axis=1)
    current = None
    if config.edge.cache:
        current = np.asarray(state.server.ledger.current)[:, cohort].swapaxes(0, 1)
    sent = traffic(assignment, experiment.payload, current)
    if config.fitness.probe == "all":  # Clients already have the experts, from probing.
        asked = probe_traffic(simulation.setting.federation, len(cohort))
        sent = Traffic(asked.down, sent.up + asked.up, np.zeros_like(sent.cached))
    return Assigned(cohort, solutions, sent)


def privacy_spent(config: ConfigDict, rounds: int) -> Metrics:
    """Returns ε after a number of rounds; no figure if no noise is added."""
    if not config.server.noise_multiplier:
        return {}
    spent = epsilon(config.server.noise_multiplier, rounds, config.server.delta)
    simulated = "_simulated" if config.server.noise == "simulated" else ""
    return {f"privacy/epsilon{simulated}": spent}


def existing(metrics: Metrics) -> Metrics:
    """Leaves out figures that are NaN, as the balance of a round without load."""
    return {key: value for key, value in metrics.items() if value == value}


def round_metrics(
    state: State, assigned: Assigned, outcome: Outcome, report: RoundReport
) -> Metrics:
    """Returns the metrics of a round: loss, balance, assignment, clients and bytes."""
    traffic, ledger = assigned.traffic, state.server.ledger
    solution = worst(assigned.solutions)
    load = np.stack([one.load for one in assigned.solutions])
    usage = np.asarray(report.usage)
    trained = report.units.sum() > 0
    return {
        **({"train/loss": float(np.average(report.loss, weights=report.units))} if trained else {}),
        "load/assigned_cv": imbalance(load),
        "load/assigned_cv_cumulative": imbalance(np.asarray(ledger.load)),
        "load/usage_cv": imbalance(usage),
        "load/usage_cv_cumulative": imbalance(np.asarray(ledger.usage).sum(axis=1)),
        "load/assigned": load.sum(axis=0).tolist(),
        "load/usage": usage.sum(axis=0).tolist(),
        "assignment/gap": float(solution.gap),
        "assignment/solve_seconds": float(assigned.seconds),
        "assignment/status": solution.status,
        **({"assignment/by_kind": True} if solution.alike else {}),
        "clients/asked": len(assigned.cohort),
        "clients/delivered": int(outcome.delivered.sum()),
        "clients/quarantined": int(report.quarantined.sum()),
        **({"clients/void_round": True} if report.void else {}),
        "comm/bytes_down": int(traffic.down[outcome.reached].sum()),
        "comm/bytes_up": int(traffic.up[outcome.delivered].sum()),
        "comm/bytes_cached": int(traffic.cached[outcome.reached].sum()),
    }


def worst(solutions: Sequence[Solution]) -> Solution:
    """Returns the layers' worst solution: one that fell back, or else the one of largest gap."""
    return max(solutions, key=lambda one: (fell_back(one.status), one.gap))


def imbalance(load: np.ndarray) -> float:
    """Returns the coefficient of variation of loads (G, E), averaged over groups of MoE layers.

    A single expert has no balance: NaN.
    """
    if load.shape[1] == 1:
        return math.nan
    return float(np.mean([coefficient_of_variation(one) for one in load]))


def check_health(
    report: RoundReport,
    clients: np.ndarray,
    faulty: np.ndarray,
    round_index: int,
    config: ConfigDict,
) -> None:
    """Stops a run if its loss or model is not a number, or if no update can be used.

    If all clients of a small cohort are faulty, their updates may all be rejected without an error.

    Args:
      report: the report of the round.
      clients: (P,) clients of the plan.
      faulty: (C,) bool, clients whose updates are tampered with.
      round_index: number of the round, from 0.
      config: the config of the run.

    Raises:
      DivergedError: naming the round, the clients and the learning rate.
    """
    broken = np.sort(clients[~np.isfinite(report.loss)])
    remedy = (
        f"with local.learning_rate={config.local.learning_rate}: lower it, or set local.clip_norm"
    )
    if broken.size:
        some = ", ".join(map(str, broken[:10])) + (", ..." if broken.size > 10 else "")
        raise DivergedError(
            f"round {round_index + 1}: the loss of clients {some} is not a number {remedy}"
        )
    refused = clients[report.quarantined]
    honest = (~faulty[refused] | faulty.all()).any()
    if honest and not report.examples.any() and not report.void:
        raise DivergedError(
            f"round {round_index + 1}: every update is not a number, or too long for "
            f"server.norm_factor={config.server.norm_factor} and "
            f"server.norm_limit={config.server.norm_limit}, {remedy}"
        )
    if not report.finite:
        guard = "" if config.server.quarantine else ", or set server.quarantine=True"
        raise DivergedError(
            f"round {round_index + 1}: the model is no longer a number, {remedy}{guard}"
        )
