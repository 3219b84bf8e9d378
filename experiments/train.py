"""Trains one federation.

    python -m experiments.train --config=experiments/configs/digits.py --workdir=runs/digits

Any field of the config can be set on the command line (`--config.clients.capacity=2`). A workdir
that holds a part of the same run is continued from its newest whole checkpoint. Ctrl-C, SIGTERM or
a closing terminal end it after the round at work, with everything saved and exit code 128 + the
signal's number; a second Ctrl-C ends at once. Whatever ends a run (kill -9, a full disk), the same
command goes on with it, and ends with the same numbers (but for the noise of privacy, which is new
each time).
"""

from __future__ import annotations

if __name__ == "__main__":
    # Ends here: flags, processes and signals come before the imports below, which take seconds.
    from experiments.start import run

    run()

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import flexmoe_jax
from experiments.build import Experiment, build
from experiments.devices import require_same_inputs
from experiments.history import Metrics, missing_rounds
from experiments.progress import ProgressDisplay
from experiments.tensorboard import TensorBoard
from experiments.workdir import Workdir
from flexmoe_jax.assignment import Solution
from flexmoe_jax.checkpoint import Checkpoints, Restored
from flexmoe_jax.edge import Outcome
from flexmoe_jax.federated import Traffic, compile_ahead, epsilon, slots_assignment, traffic
from flexmoe_jax.metrics import accuracies, coefficient_of_variation
from flexmoe_jax.reading import is_number
from flexmoe_jax.types import RoundReport, State


class DivergedError(RuntimeError):
    """The training loss, or the model, is no longer a number."""


def train(config: ConfigDict, workdir: Workdir, stop: Callable[[], bool] = lambda: False) -> str:
    """Runs an experiment to its last round, or on from where its workdir stands.

    Args:
      config: of the experiment.
      workdir: of the run.
      stop: asked after each round whether that is to be the last for now.

    Returns:
      "finished", "interrupted" or "diverged".

    Raises:
      InputError: if the config or the workdir cannot be used, or another process is at work there;
        nothing is written then.
      OSError: if a file of the run cannot be written; what was written before counts.
    """
    begin = time.monotonic()
    workdir.check(config)
    before = workdir.seconds()
    experiment = build(config)
    require_same_inputs(experiment.inputs)
    notes = (*experiment.notes, *workdir.check_inputs(config, experiment.inputs))
    tensorboard = TensorBoard(
        workdir.path / "tensorboard" if config.tensorboard and workdir.writes else None
    )
    algorithm = compile_ahead(
        experiment.algorithm,
        experiment.feed(experiment.network.cohort(0)),
        experiment.test,
        experiment.network.asked,
        noise=bool(experiment.network.faults.noise),
    )
    experiment = replace(experiment, algorithm=algorithm)
    state = algorithm.init(jax.random.key(config.seed))

    workdir.open(config, experiment.inputs)
    checkpoints = Checkpoints(workdir.path / "checkpoints", config.checkpoint.keep)
    restored = checkpoints.restore(state, at_most=workdir.history().last)
    if restored.state is not None:
        state = restored.state
    done = int(state.round)
    lost = workdir.keep_rounds(done)
    status = "finished"
    display = ProgressDisplay(config.rounds, done, quiet=not workdir.writes)
    with display:
        begins = _where_it_begins(done, config.rounds, restored)
        for line in (*notes, *restored.passed_over, *lost, *begins):
            display.say(line)
        rounds, told = run_rounds(config, experiment, state, done), set[str]()
        try:
            for state, metrics in rounds:
                metrics["time/run_seconds"] = before + time.monotonic() - begin
                workdir.append(metrics)
                tensorboard.write(metrics)
                display.update(metrics)
                if metrics["assignment/status"].startswith("fallback"):
                    display.say(f"round {metrics['round']}: {metrics['assignment/status']}")
                why = refusals(metrics)
                if why and why not in told:
                    display.say(f"round {metrics['round']}: {why}")
                told.add(why)
                stopping = _anywhere(stop())
                last = metrics["round"] == config.rounds
                if last or stopping or metrics["round"] % config.checkpoint.every == 0:
                    checkpoints.save(state)
                if stopping and not last:
                    status = "interrupted"
                    break
        except DivergedError as error:
            status = "diverged"
            display.say(str(error))
    checkpoints.close()
    tensorboard.close()
    if status != "diverged":
        workdir.write_arrays(**arrays(experiment, state))
    workdir.write_summary(
        {
            "status": status,
            **summarise(workdir.read(), done),
            "personal_measured_on": experiment.personal,
            "notes": list(experiment.notes),
            "seconds": before + time.monotonic() - begin,
            **environment(),
        }
    )
    return status


def _where_it_begins(done: int, rounds: int, restored: Restored) -> list[str]:
    """The line on that; none for a run that is new."""
    if done == rounds:
        return ["all rounds are done; to train anew, delete the folder of the run"]
    if done:
        return [f"continuing after round {done} of {rounds}"]
    if restored.passed_over:
        return ["no whole checkpoint is left: starting from the first round"]
    return []


def run_rounds(
    config: ConfigDict, experiment: Experiment, state: State, first: int = 0
) -> Iterator[tuple[State, Metrics]]:
    """Runs rounds from number `first` (from 0) to the last, one each time the next is asked for.

    While the device trains a cohort, the host sends the examples of the next, if they are not there
    already; while it evaluates, the host assigns the next round's experts.

    Yields:
      The new state, which the next round consumes, and the round's line of metrics.jsonl.

    Raises:
      DivergedError: a client's loss or the model is not a number, or nothing of it can be used.
    """
    algorithm, network = experiment.algorithm, experiment.network

    def assign(state: State, cohort: np.ndarray) -> Assigned:
        solution = algorithm.assign(state, cohort)
        fresh = np.asarray(state.fresh)[cohort] if config.edge.cache else None
        return Assigned(cohort, solution, traffic(solution.assignment, experiment.payload, fresh))

    if first == config.rounds:
        return
    cohort = network.cohort(first)
    assigned, examples = assign(state, cohort), experiment.feed(cohort)
    for round_index in range(first, config.rounds):
        begin = time.monotonic()
        arrival, outcome = network.play(assigned.cohort, assigned.traffic, round_index)
        plan = algorithm.plan(assigned.cohort, assigned.solution, arrival)
        clients = np.asarray(plan.clients)
        last = round_index + 1 == config.rounds
        state, report = algorithm.round(state, examples, plan)
        if not last:
            cohort = network.cohort(round_index + 1)
            examples = experiment.feed(cohort)
        report = jax.device_get(report)
        seconds = assigned.solution.seconds + time.monotonic() - begin
        check_health(report, clients, network.faulty(), round_index, config)
        metrics: Metrics = {
            "round": round_index + 1,
            **round_metrics(state, assigned, outcome, report),
            "time/round_seconds": seconds,
            "time/train_examples_per_second": float(report.examples.sum()) / seconds,
        }
        if network.devices is not None:
            metrics["time/simulated_seconds"] = outcome.seconds
        if config.server.noise_multiplier:
            simulated = "_simulated" if config.server.noise == "simulated" else ""
            metrics[f"privacy/epsilon{simulated}"] = epsilon(
                config.server.noise_multiplier, round_index + 1, config.server.delta
            )
        evaluation = None
        if (round_index + 1) % config.eval.every == 0 or last:
            evaluation = algorithm.evaluate(state, experiment.test, experiment.label_share)
        if not last:
            assigned = assign(state, cohort)
        # Only now is the evaluation waited for.
        yield state, existing(metrics | (accuracies(evaluation) if evaluation else {}))


def existing(metrics: Metrics) -> Metrics:
    """Leaves out figures that do not exist, as the balance of a round without load."""
    return {key: value for key, value in metrics.items() if value == value}


class Assigned(NamedTuple):
    """A round before it begins: who is asked (P,), what each would hold, and its bytes."""

    cohort: np.ndarray
    solution: Solution
    traffic: Traffic


def round_metrics(
    state: State, assigned: Assigned, outcome: Outcome, report: RoundReport
) -> Metrics:
    """What a round says of itself: loss, balance, assignment, clients and bytes."""
    solution, traffic = assigned.solution, assigned.traffic
    trained = report.examples.sum() > 0
    return {
        **(
            {"train/loss": float(np.average(report.loss, weights=report.examples))}
            if trained
            else {}
        ),
        "load/assigned_cv": coefficient_of_variation(solution.load),
        "load/assigned_cv_cumulative": coefficient_of_variation(np.asarray(state.load)),
        "load/usage_cv": coefficient_of_variation(np.asarray(report.usage)),
        "load/usage_cv_cumulative": coefficient_of_variation(np.asarray(state.usage).sum(axis=0)),
        "load/assigned": np.asarray(solution.load).tolist(),
        "load/usage": np.asarray(report.usage).tolist(),
        "assignment/gap": float(solution.gap),
        "assignment/solve_seconds": float(solution.seconds),
        "assignment/status": solution.status,
        "clients/asked": len(assigned.cohort),
        "clients/delivered": int(outcome.delivered.sum()),
        "clients/quarantined": int(report.quarantined.sum()),
        **({"clients/void_round": True} if report.void else {}),
        "comm/bytes_down": int(traffic.down[outcome.reached].sum()),
        "comm/bytes_up": int(traffic.up[outcome.delivered].sum()),
        "comm/bytes_cached": int(traffic.cached[outcome.reached].sum()),
    }


def refusals(metrics: Metrics) -> str:
    """A sentence on updates that a round refused, to be said once; empty where there are none."""
    if "clients/void_round" in metrics:
        return (
            "all updates refused: some were too long for their cohort, which in a first round is "
            "known only when all are summed; from now on such updates are refused one by one"
        )
    if metrics["clients/quarantined"]:
        return (
            "updates refused, not numbers or too long (server.norm_factor, server.norm_limit); "
            "clients/quarantined in metrics.jsonl counts them, round by round"
        )
    return ""


def check_health(
    report: RoundReport,
    clients: np.ndarray,
    faulty: np.ndarray,
    round_index: int,
    config: ConfigDict,
) -> None:
    """Stops a run whose loss or model is no longer a number, or none of whose updates can be used.

    That all updates of a small cohort are refused is no fault of the run if all of it is faulty.

    Args:
      report: of the round.
      clients: (P,) of the plan.
      faulty: (C,) bool, clients whose updates are tampered with.
      round_index: of the round, from 0.
      config: of the run.

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


def arrays(experiment: Experiment, state: State) -> dict[str, np.ndarray]:
    """What the report draws as matrices."""
    known = jax.device_get((state.fitness, state.held_rounds, state.usage))
    return {
        "label_counts": experiment.label_counts,
        "classes": np.asarray(experiment.classes),
        "capacity": experiment.capacity,
        "fitness": known[0],
        "holds": slots_assignment(np.asarray(state.slots), known[0].shape[1]),
        "held_rounds": known[1],
        "usage": known[2],
    }


def summarise(rows: list[Metrics], done: int = 0) -> dict[str, Any]:
    """Final and best values: of accuracies the highest is best, of all else the lowest.

    Args:
      rows: of metrics.jsonl.
      done: rounds known to be done, told there or not. Totals over rounds that are lost are none.
    """
    rounds = max(done, rows[-1]["round"]) if rows else done
    lost = missing_rounds(rows, rounds)
    summary: dict[str, Any] = {"rounds": rounds, **({"rounds_lost": lost} if lost else {})}
    numbers = [key for row in rows[-1:] for key, value in row.items() if isinstance(value, float)]
    for key in numbers:
        values = [row[key] for row in rows if is_number(row.get(key))]
        best = max if "accuracy" in key or key.endswith("per_second") else min
        summary[f"final/{key}"] = values[-1]
        summary[f"best/{key}"] = best(values)
    totals = ("comm/bytes_down", "comm/bytes_up", "comm/bytes_cached", "time/simulated_seconds")
    for key in (*totals, "clients/quarantined"):
        values = [row[key] for row in rows if is_number(row.get(key))]
        if values and len(values) == rounds:
            summary[f"total/{key}"] = sum(values)
    return summary


def environment() -> dict[str, Any]:
    """Versions and device."""
    packages = ("jax", "flax", "optax", "cvxpy", "numpy")
    return {
        "versions": {
            "flexmoe_jax": flexmoe_jax.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _anywhere(here: bool) -> bool:
    """Whether it holds in any of the run's processes, which all must do the same."""
    return bool(multihost_utils.process_allgather(np.array(here)).any())
