"""Trains one federation.

    python -m experiments.train --config=experiments/configs/digits.py --workdir=runs/digits

Any field of the config can be set on the command line (`--config.clients.capacity=2`). A workdir
that holds a part of the same run is continued from its newest whole checkpoint. Ctrl-C or SIGTERM
ends after the round at work, with everything saved; a second one ends at once. Whatever ends a run
(kill -9, a full disk), the same command goes on with it, and ends with the same numbers (but for
the noise of privacy, which is new each time).
"""

from __future__ import annotations

import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags

import flexmoe_jax
from experiments.build import Experiment, build
from experiments.cli import read_config, run_cli
from experiments.devices import prepare_devices
from experiments.progress import ProgressDisplay
from experiments.tensorboard import TensorBoard
from experiments.workdir import Metrics, Workdir
from flexmoe_jax.assignment import Solution
from flexmoe_jax.checkpoint import Checkpoints
from flexmoe_jax.edge import Outcome
from flexmoe_jax.errors import InputError
from flexmoe_jax.federated import Traffic, compile_ahead, epsilon, slots_assignment, traffic
from flexmoe_jax.metrics import accuracies, coefficient_of_variation
from flexmoe_jax.types import RoundReport, State

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of the experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


class DivergedError(RuntimeError):
    """The training loss, or the model, is no longer a number."""


def main(argv: list[str]) -> None:
    """Trains, then writes the report; exit code 1 if the run diverged or a file fails."""
    if len(argv) > 1:
        raise InputError("argument", argv[1], "flags begin with --")
    config = read_config(_CONFIG.value, config_flags.get_config_filename(flags.FLAGS["config"]))
    if not _WORKDIR.value:
        raise InputError("--workdir", _WORKDIR.value, "name a folder for the run, as runs/digits")
    prepare_devices(config.execution.devices)
    workdir = Workdir(_WORKDIR.value, writes=jax.process_index() == 0)
    try:
        with _interruptible() as interrupted:
            status = train(config, workdir, stop=lambda: bool(interrupted))
            if not workdir.writes:
                return

            from experiments.report import write_report

            page = write_report([workdir.path], workdir.path / "report" / "index.html")
    except (OSError, InputError) as error:
        # The report wraps what it cannot write, as if the user had chosen the file.
        fault = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(fault, OSError):
            raise
        print(
            f"{fault.filename or workdir.path}: {fault.strerror or fault}; once that is put right "
            "(free some space?), the same command goes on from the newest checkpoint",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"ended at once; the same command goes on with {workdir.path}", file=sys.stderr)
        sys.exit(130)
    print(f"{status} · report: {page}")
    if status == "diverged":
        sys.exit(1)


def train(config: ConfigDict, workdir: Workdir, stop: Callable[[], bool] = lambda: False) -> str:
    """Runs an experiment to its last round, or on from where its workdir stands.

    Args:
      config: of the experiment.
      workdir: of the run.
      stop: asked after each round whether that is to be the last for now.

    Returns:
      "finished", "interrupted" or "diverged".

    Raises:
      InputError: if the config or the workdir cannot be used; nothing is written then.
      OSError: if a file of the run cannot be written; what was written before counts.
    """
    begin = time.monotonic()
    workdir.check(config)
    experiment = build(config)
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

    workdir.open(config)
    checkpoints = Checkpoints(workdir.path / "checkpoints", config.checkpoint.keep)
    restored = checkpoints.restore(state, at_most=len(workdir.read()))
    if restored.state is not None:
        state = restored.state
    done = int(state.round)
    workdir.keep_rounds(done)
    status = "finished"
    display = ProgressDisplay(config.rounds, done, quiet=not workdir.writes)
    with display:
        for line in (*experiment.notes, *restored.passed_over):
            display.say(line)
        if done == config.rounds:
            display.say("all rounds are done; to train anew, delete the folder of the run")
        elif done:
            display.say(f"continuing after round {done} of {config.rounds}")
        elif restored.passed_over:
            display.say("no whole checkpoint is left: starting from the first round")
        rounds, told = run_rounds(config, experiment, state, done), set[str]()
        try:
            for state, metrics in rounds:
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
                last = metrics["round"] == config.rounds or stopping
                if last or metrics["round"] % config.checkpoint.every == 0:
                    checkpoints.save(state)
                if stopping:
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
            **summarise(workdir.read()),
            "personal_measured_on": experiment.personal,
            "notes": list(experiment.notes),
            "seconds": workdir.seconds() + time.monotonic() - begin,
            **environment(),
        }
    )
    return status


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


def summarise(rows: list[Metrics]) -> dict[str, Any]:
    """Final and best values: of accuracies the highest is best, of all else the lowest."""
    summary: dict[str, Any] = {"rounds": len(rows)}
    numbers = [key for row in rows[-1:] for key, value in row.items() if isinstance(value, float)]
    for key in numbers:
        values = [row[key] for row in rows if key in row]
        best = max if "accuracy" in key or key.endswith("per_second") else min
        summary[f"final/{key}"] = values[-1]
        summary[f"best/{key}"] = best(values)
    totals = ("comm/bytes_down", "comm/bytes_up", "comm/bytes_cached", "time/simulated_seconds")
    for key in (*totals, "clients/quarantined"):
        if rows and key in rows[-1]:
            summary[f"total/{key}"] = sum(row[key] for row in rows)
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


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yields a list that the first SIGINT or SIGTERM fills; the second acts as usual."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for kept, handler in before.items():
            signal.signal(kept, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_cli(main)
