"""Who takes part in a round, and what fits them: a plan, or a refusal."""

from __future__ import annotations

from typing import cast

import numpy as np

from flexmoe_jax.assignment import Solution
from flexmoe_jax.data import ClientData
from flexmoe_jax.errors import InputError
from flexmoe_jax.models import MoEClassifier
from flexmoe_jax.types import Array, Plan


def sample_cohort(
    clients: int,
    per_round: int,
    *,
    seed: int,
    round_index: int,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """Draws a cohort without replacement.

    Args:
      clients: C.
      per_round: P.
      seed: of the run.
      round_index: of the round; the same round always draws the same cohort.
      weight: (C,) of each client in the draw, of any scale; 0 for one that cannot be drawn. None to
        draw uniformly from all.

    Returns:
      (P,) int32 client ids in rising order; fewer where fewer can be drawn.
    """
    generator = np.random.default_rng([seed, round_index])
    if weight is None:
        return np.sort(generator.choice(clients, per_round, replace=False)).astype(np.int32)
    size = min(per_round, int(np.count_nonzero(weight)))
    if not size:
        return np.zeros(0, np.int32)
    chosen = generator.choice(clients, size, replace=False, p=weight / weight.sum())
    return np.sort(chosen).astype(np.int32)


def check_setting(capacity: np.ndarray | int, data: ClientData, model: MoEClassifier) -> np.ndarray:
    """Refuses capacities and models that do not fit the clients' data.

    Returns:
      (C,) int64 k_c.

    Raises:
      InputError: capacities of another number of clients, not whole or outside 0..E, or a model of
        other classes.
    """
    clients, classes = data.label_share.shape
    given = np.asarray(capacity)
    if given.shape not in ((), (clients,)) or not np.issubdtype(given.dtype, np.integer):
        raise InputError(
            "capacity", capacity, f"give a whole number, or one a client: ({clients},)"
        )
    if given.min() < 0 or given.max() > model.experts:
        worst = given.min() if given.min() < 0 else given.max()
        raise InputError("capacity", worst, f"give 0 to {model.experts}, the number of experts")
    if model.classes != classes:
        raise InputError("model.classes", model.classes, f"the clients' labels have {classes}")
    return np.broadcast_to(given, clients).astype(np.int64)


def check_solution(
    solution: Solution, cohort: np.ndarray, capacity: np.ndarray, experts: int
) -> None:
    """Refuses a policy's answer that is none for this cohort.

    Raises:
      InputError: no `Solution`, an assignment of another shape or type, or a client with more
        experts than it has room for.
    """
    given = getattr(solution, "assignment", None)
    if not (isinstance(given, np.ndarray) and given.dtype == bool):
        raise InputError("policy", type(solution).__name__, "return a Solution: see as_solution")
    if given.shape != (len(cohort), experts):
        remedy = f"return an assignment of shape {(len(cohort), experts)}"
        raise InputError("policy", given.shape, remedy)
    held, room = given.sum(axis=1), capacity[cohort]
    if (held > room).any():
        worst = int(np.argmax(held - room))
        remedy = f"client {cohort[worst]} has room for {room[worst]}"
        raise InputError("policy", f"{held[worst]} experts", remedy)


def make_plan(
    cohort: np.ndarray,
    assignment: np.ndarray,
    load: np.ndarray,
    *,
    steps: np.ndarray,
    slots: int,
    clients: int,
    block_size: int,
    devices: int = 1,
    rows: int = 0,
    tamper: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    secret: np.ndarray | None = None,
) -> Plan:
    """Lays a cohort and its assignment out for training.

    Clients are put in order of their local steps, longest first, so that those side by side finish
    together, padded to whole blocks, and the blocks dealt out to the devices in turn, so that each
    has as much to do as the next.

    Args:
      cohort: (P,) client ids.
      assignment: (P, E) bool.
      load: (E,) assigned load.
      steps: (P,) local steps that each client of the cohort completes and delivers.
      slots: K, at least the largest number of experts held.
      clients: C.
      block_size: clients side by side on a device.
      devices: how many share the cohort; each gets an equal run of the plan's rows.
      rows: for how many clients to make room, where cohorts differ in size.
      tamper: (P,) factors on the clients' updates; None for ones.
      noise: (P,) norms of the noise in them, over their own; None where there is none.
      secret: (2,) random bits of this round; None where no noise is drawn from any.

    Returns:
      The plan in NumPy arrays, with P rounded up to a multiple of `block_size · devices`.
    """
    order = np.lexsort((cohort, -steps))
    padded = -(-max(rows, len(cohort)) // (block_size * devices)) * block_size * devices
    dealt = np.arange(padded).reshape(-1, devices, block_size).swapaxes(0, 1).ravel()

    def lay_out(values: np.ndarray, empty: float, dtype: type) -> Array:
        laid_out = np.full((padded, *values.shape[1:]), empty, dtype)
        laid_out[: len(cohort)] = values[order]
        return cast(Array, laid_out[dealt])

    return Plan(
        clients=lay_out(cohort, clients, np.int32),
        slots=lay_out(assignment_slots(assignment, slots), assignment.shape[1], np.int32),
        load=cast(Array, np.asarray(load, np.float32)),
        steps=lay_out(steps, 0, np.int32),
        tamper=lay_out(np.ones(len(cohort)) if tamper is None else tamper, 1.0, np.float32),
        noise=None if noise is None else lay_out(noise, 0.0, np.float32),
        secret=cast(Array | None, secret),
    )


def assignment_slots(assignment: np.ndarray, slots: int) -> np.ndarray:
    """Turns (P, E) bool into (P, K) int32 expert numbers, rising, with E for an empty slot."""
    experts = assignment.shape[1]
    numbered = np.where(assignment, np.arange(experts), experts)
    return np.sort(numbered, axis=1)[:, :slots].astype(np.int32)


def slots_assignment(slots: np.ndarray, experts: int) -> np.ndarray:
    """Inverse of `assignment_slots`: (P, K) expert numbers to (P, E) bool."""
    assignment = np.zeros((len(slots), experts + 1), bool)
    np.put_along_axis(assignment, slots, True, axis=1)
    return assignment[:, :experts]
