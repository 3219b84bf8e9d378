"""Who takes part in a round."""

from __future__ import annotations

from typing import cast

import numpy as np

from flexmoe_jax.types import Array, Plan


def sample_cohort(clients: int, per_round: int, *, seed: int, round_index: int) -> np.ndarray:
    """Draws a cohort uniformly, without replacement.

    Args:
      clients: C.
      per_round: P.
      seed: of the run.
      round_index: of the round; the same round always draws the same cohort.

    Returns:
      (P,) int32 client ids in rising order.
    """
    generator = np.random.default_rng([seed, round_index])
    return np.sort(generator.choice(clients, per_round, replace=False)).astype(np.int32)


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
) -> Plan:
    """Lays a cohort and its assignment out for training.

    Clients are put in order of their local steps, longest first, so that those side by side finish
    together, padded to whole blocks, and the blocks dealt out to the devices in turn, so that each
    has as much to do as the next.

    Args:
      cohort: (P,) client ids.
      assignment: (P, E) bool.
      load: (E,) assigned load.
      steps: (P,) local steps of each client of the cohort.
      slots: K, at least the largest number of experts held.
      clients: C.
      block_size: clients side by side on a device.
      devices: how many share the cohort; each gets an equal run of the plan's rows.

    Returns:
      The plan in NumPy arrays, with P rounded up to a multiple of `block_size · devices`.
    """
    order = np.lexsort((cohort, -steps))
    padded = -(-len(cohort) // (block_size * devices)) * block_size * devices
    plan_clients = np.full(padded, clients, np.int32)
    plan_clients[: len(cohort)] = cohort[order]
    plan_slots = np.full((padded, slots), assignment.shape[1], np.int32)
    plan_slots[: len(cohort)] = assignment_slots(assignment[order], slots)
    dealt = np.arange(padded).reshape(-1, devices, block_size).swapaxes(0, 1).ravel()
    parts = plan_clients[dealt], plan_slots[dealt], np.asarray(load, np.float32)
    return Plan(*(cast(Array, part) for part in parts))


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
