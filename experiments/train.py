"""Trains one federation.

    python -m experiments.train --config=experiments/configs/digits.py --workdir=runs/digits

Any field of the config can be set on the command line (`--config.clients.capacity=2`). If the
workdir holds a part of the same run, it is continued from its newest complete checkpoint. Ctrl-C,
SIGTERM or a closing terminal end the run after the current round, with everything saved and exit
code 128 + the signal's number; a second Ctrl-C ends it at once. After any interruption (kill -9, a
full disk), the same command continues the run and gives the same numbers (except for privacy noise,
which is drawn anew each time).
"""

from __future__ import annotations

if __name__ == "__main__":
    # `run` does not return: flags, processes and signals are handled before the slow imports below.
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
from experiments.history import Metrics, fell_back, missing_rounds
from experiments.program_cache import open_cache
from experiments.progress import ProgressDisplay
from experiments.rounds import Carry, DivergedError, play, run_rounds
from experiments.tensorboard import TensorBoard
from experiments.workdir import Workdir
from flexmoe_jax.checkpoint import Checkpoints, Restored
from flexmoe_jax.errors import StoppedError
from flexmoe_jax.reading import is_number
from flexmoe_jax.simulation import compile_ahead, slots_assignment
from flexmoe_jax.types import State


def train(
    config: ConfigDict,
    workdir: Workdir,
    stop: Callable[[], bool] = lambda: False,
    way: Way | None = None,
) -> str:
    """Runs an experiment to its last round; continues the run if its workdir holds one.

    Args:
      config: the config of the experiment.
      workdir: the folder of the run.
      stop: called after each round; True stops the run for now.
      way: how rounds are carried out; None to simulate them.

    Returns:
      "finished", "interrupted" or "diverged".

    Raises:
      InputError: the config or the workdir is invalid, or is in use; nothing is written then.
      OSError: a file of the run cannot be written; files written before stay valid.
    """
    begin = time.monotonic()
    workdir.check(config)
    begin -= workdir.seconds()
    experiment = (way := way or SIMULATED).build(config)
    require_same_inputs(config, experiment.inputs)
    notes = (*experiment.notes, *workdir.check_inputs(config, experiment.inputs))
    tensorboard = _tensorboard(config, workdir)
    experiment = way.ready(experiment)
    state = experiment.simulation.init(jax.random.key(config.seed))
    workdir.open(config, experiment.inputs)
    checkpoints = Checkpoints(workdir.path / "checkpoints", config.checkpoint.keep)
    restored = checkpoints.restore(state, at_most=workdir.history().last)
    state = restored.state or state
    done = int(state.server.round)
    lost = workdir.keep_rounds(done, config.eval.every if done < config.rounds else 1)
    status = "finished"
    begins = _where_it_begins(done, config.rounds, restored)
    with _display(config, done, quiet=not workdir.writes) as display:
        for line in (*notes, *restored.passed_over, *lost, *begins):
            display.say(line)
        rounds = run_rounds(config, experiment, state, done, way.carry)
        try:
            for state, number in _recorded(rounds, workdir, tensorboard, display, begin):
                stopping = _anywhere(stop())
                last = number == config.rounds
                if last or stopping or number % config.checkpoint.every == 0:
                    checkpoints.save(state)
                if stopping and not last:
                    raise StoppedError
        except StoppedError:
            status = "interrupted"
        except DivergedError as error:
            status = "diverged"
            display.say(str(error))
        checkpoints.close()
        tensorboard.close()
        for line in _sum_up(workdir, experiment, state, status, done, time.monotonic() - begin):
            display.say(line)
    return status


def _recorded(
    rounds: Iterator[tuple[State, Metrics]],
    workdir: Workdir,
    tensorboard: TensorBoard,
    display: ProgressDisplay,
    begin: float,
) -> Iterator[tuple[State, int]]:
    """Records and shows rounds, and yields the state and the number of each.

    Args:
      rounds: the rounds as they are run.
      workdir: records the rounds in metrics.jsonl.
      tensorboard: records them as event files.
      display: shows them.
      begin: start of the run on `time.monotonic`, as if it had never been interrupted.
    """
    told: set[str] = set()
    for state, metrics in rounds:
        metrics["time/run_seconds"] = time.monotonic() - begin
        workdir.append(metrics)
        tensorboard.write(metrics)
        display.update(metrics)
        for line in remarks(metrics, told):
            display.say(f"round {metrics['round']}: {line}")
        yield state, metrics["round"]


def _sum_up(
    workdir: Workdir, experiment: Experiment, state: State, status: str, done: int, seconds: float
) -> tuple[str, ...]:
    """Writes the arrays that the report draws as matrices, and the summary; returns new notes."""
    if status != "diverged":
        workdir.write_arrays(**arrays(experiment, state))
    rows = workdir.read()
    notes = notes_on_idle_rounds(rows)
    workdir.write_summary(
        {
            "status": status,
            **summarise(rows, done),
            "personal_measured_on": experiment.personal,
            "notes": [*experiment.notes, *notes],
            "seconds": seconds,
            **environment(),
        }
    )
    return notes


def compiled(experiment: Experiment) -> Experiment:
    """Starts to compile all programs of the experiment, in parallel."""
    network = experiment.network
    simulation = compile_ahead(
        experiment.simulation,
        experiment.feed(network.cohort(0)),
        experiment.test,
        network.asked,
        noise=bool(network.faults.noise),
        cache=open_cache(),
    )
    return replace(experiment, simulation=simulation)


def _tensorboard(config: ConfigDict, workdir: Workdir) -> TensorBoard:
    wanted = config.tensorboard and workdir.writes
    return TensorBoard(workdir.path / "tensorboard" if wanted else None)


def _display(config: ConfigDict, done: int, quiet: bool) -> ProgressDisplay:
    return ProgressDisplay(
        config.rounds,
        done,
        quiet=quiet,
        task=config.task.name,
        newcomers=config.clients.newcomers > 0,
    )


def _where_it_begins(done: int, rounds: int, restored: Restored) -> list[str]:
    """Returns a line that says where the run starts; none for a new run."""
    if done == rounds:
        return ["all rounds are done; to train anew, delete the folder of the run"]
    if done:
        return [f"continuing after round {done} of {rounds}"]
    if restored.passed_over:
        return ["no whole checkpoint is left: starting from the first round"]
    return []


class Way(NamedTuple):
    """How the rounds of a run are carried out: by simulation, or by real clients.

    Attributes:
      build: builds the experiment from a config; rejects invalid ones before anything is written.
      ready: returns the experiment with its programs compiled, or being compiled.
      carry: carries out a round.
    """

    build: Callable[[ConfigDict], Experiment]
    ready: Callable[[Experiment], Experiment]
    carry: Carry


SIMULATED = Way(build, compiled, play)


def remarks(metrics: Metrics, told: set[str]) -> Iterator[str]:
    """Yields remarks on a round that the user should see, most of them only once.

    Args:
      metrics: the metrics of the round.
      told: remarks made before; new ones are added.
    """
    if fell_back(metrics["assignment/status"]):
        yield metrics["assignment/status"]
    if fell_back(status := metrics.get("assignment/newcomer_status", "")):
        yield f"newcomers: {status}"
    for line in (refusals(metrics), _by_kind(metrics)):
        if line and line not in told:
            told.add(line)
            yield line


def _by_kind(metrics: Metrics) -> str:
    if "assignment/by_kind" not in metrics:
        return ""
    return "from now on it counts which clients are alike: these come to share experts (affinity)"


def notes_on_idle_rounds(rows: list[Metrics]) -> tuple[str, ...]:
    """Returns a sentence on rounds in which no update arrived, if there are any."""
    idle = sum(row.get("clients/delivered") == 0 for row in rows)
    if not idle:
        return ()
    what = "nothing was learned" if idle == len(rows) else "nothing was learned in these"
    return (f"no update arrived in {idle} of {len(rows)} rounds: {what}",)


def refusals(metrics: Metrics) -> str:
    """Returns a sentence on the updates that a round refused; empty if there are none."""
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


def arrays(experiment: Experiment, state: State) -> dict[str, np.ndarray]:
    """Returns the arrays that the report draws as matrices."""
    ledger = state.server.ledger
    tables = jax.device_get((ledger.fitness, ledger.held_rounds, ledger.usage))
    # If MoE layers are assigned one by one, take means over them; `held` is true for any layer.
    known = [np.asarray(table).mean(axis=0) for table in tables]
    held = slots_assignment(np.asarray(state.clients.slots), known[0].shape[1]).any(axis=1)
    counts = experiment.label_counts
    return {
        **({} if counts is None else {"label_counts": counts}),
        **({} if experiment.ids is None else {"ids": experiment.ids}),
        "classes": np.asarray(experiment.classes),
        "capacity": experiment.capacity,
        "fitness": known[0],
        "holds": held,
        "held_rounds": tables[1].max(axis=0),
        "usage": known[2],
    }


def summarise(rows: list[Metrics], done: int = 0) -> dict[str, Any]:
    """Returns final and best values: the best accuracy or rate is the highest, else the lowest.

    Args:
      rows: the rows of metrics.jsonl.
      done: number of rounds known to be done, with a row or not. If rounds are lost, there are no
        totals.
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
    """Returns the versions of packages, and the device."""
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
    """Returns whether `here` is true in any process of the run, so that all act alike."""
    return bool(multihost_utils.process_allgather(np.array(here)).any())
