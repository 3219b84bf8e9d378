"""Plans a simulated round: which clients take part, and how they are laid out on the devices.

Axis legend: `C` clients, `P` clients of the cohort, `E` experts, `K` expert slots, `G` groups of
MoE layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from flexmoe_jax.errors import InputError, check_range
from flexmoe_jax.types import Array, Plan


def check_cohort(cohort: npt.ArrayLike, clients: int) -> np.ndarray:
    """Returns a cohort as (P,) distinct client ids; it is empty if no client can be reached.

    Raises:
      InputError: values that are not client ids, or an id that occurs twice.
    """
    given = np.asarray(cohort)
    if given.shape == (0,):
        return given.astype(np.int32)
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        raise InputError("cohort", cohort, "give client ids: whole numbers (P,)")
    check_range("cohort", given, 0, clients - 1, "the ids of the clients")
    times = np.bincount(given)
    if times.max() > 1:
        raise InputError("cohort", times.argmax(), "give each client once")
    return given


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
      round_index: index of the round; the same round always draws the same cohort.
      weight: (C,) relative weight of each client in the draw, on any scale; 0 excludes a client.
        None to draw uniformly from all clients.

    Returns:
      (P,) int32 client ids in ascending order; fewer if fewer clients can be drawn.

    Raises:
      InputError: more clients than there are, or a seed below 0.
    """
    check_range("seed", np.asarray(seed), 0, 2**63 - 1, "the largest seed")
    generator = np.random.default_rng([seed, round_index])
    if weight is None:
        check_range("per_round", np.asarray(per_round), 0, clients, "the number of clients")
        return np.sort(generator.choice(clients, per_round, replace=False)).astype(np.int32)
    size = min(per_round, int(np.count_nonzero(weight)))
    if not size:
        return np.zeros(0, np.int32)
    chosen = generator.choice(clients, size, replace=False, p=weight / weight.sum())
    return np.sort(chosen).astype(np.int32)


class Floor(NamedTuple):
    """The layout in which simulated cohorts train; it determines the shapes of all plans.

    Attributes:
      clients: C.
      slots: K, at least the largest number of experts that a client holds.
      rows: P, the number of clients that there is room for.
      block_size: clients side by side on a device.
      devices: number of devices that share the cohort; each gets an equal run of consecutive rows.
    """

    clients: int
    slots: int
    rows: int
    block_size: int
    devices: int = 1

    @property
    def padded(self) -> int:
        """P rounded up to whole blocks on every device."""
        together = self.block_size * self.devices
        return -(-self.rows // together) * together

    def deal(self, cohort: int) -> np.ndarray:
        """(P,) which of the ordered clients each row takes: devices receive the blocks in turn."""
        padded = self._replace(rows=max(self.rows, cohort)).padded
        return np.arange(padded).reshape(-1, self.devices, self.block_size).swapaxes(0, 1).ravel()


class Arrival(NamedTuple):
    """The part of a cohort's work that reaches the server.

    Attributes:
      work: (P,) share of its local steps that each client completes and delivers, in [0, 1].
      reached: (P,) bool, clients that received their experts; the others keep their old experts.
      tamper: (P,) factor on each update on its way to the server; 1 for an honest client.
      noise: (P,) L2 norm of the noise added to each update, relative to the update's own norm; None
        for no noise.
    """

    work: np.ndarray
    reached: np.ndarray
    tamper: np.ndarray
    noise: np.ndarray | None = None


class Tampering(NamedTuple):
    """How a cohort's updates are altered on their way to the server.

    Attributes:
      factor: (P,) factor on each update, 1 for an honest client; None for all ones.
      noise: (P,) L2 norm of the noise added to each update, relative to the update's own norm; None
        for no noise.
    """

    factor: Any = None
    noise: Any = None


def make_plan(
    cohort: np.ndarray,
    assignment: np.ndarray,
    load: np.ndarray,
    floor: Floor,
    steps: np.ndarray,
    tampering: Tampering,
    secret: np.ndarray | None = None,
    use: np.ndarray | None = None,
) -> Plan:
    """Lays out a cohort and its assignment for training.

    Clients are sorted by their local steps, most steps first, so that clients side by side finish
    together. They are padded to whole blocks. The devices receive the blocks in turn, so that all
    devices have about the same amount of work.

    Args:
      cohort: (P,) client ids.
      assignment: (P, G, E) bool.
      load: (G, E) assigned load.
      floor: the layout in which they train.
      steps: (P,) local steps that each client of the cohort completes and delivers.
      tampering: how their updates are altered.
      secret: (2,) random bits of this round; None if no noise is drawn from a secret.
      use: (P, G, E) the part of its units that each client should route to each expert, or None.

    Returns:
      The plan in NumPy arrays, with P rounded up to whole blocks on every device.
    """
    order, dealt = np.lexsort((cohort, -steps)), floor.deal(len(cohort))

    def lay_out(values: np.ndarray, empty: float, dtype: type) -> Array:
        laid_out = np.full((len(dealt), *values.shape[1:]), empty, dtype)
        laid_out[: len(cohort)] = values[order]
        return cast(Array, laid_out[dealt])

    ones = np.ones(len(cohort))
    slots = assignment_slots(assignment, floor.slots)
    return Plan(
        clients=lay_out(cohort, floor.clients, np.int32),
        slots=lay_out(slots, assignment.shape[-1], np.int32),
        load=cast(Array, np.asarray(load, np.float32)),
        steps=lay_out(steps, 0, np.int32),
        tamper=lay_out(ones if tampering.factor is None else tampering.factor, 1.0, np.float32),
        noise=None if tampering.noise is None else lay_out(tampering.noise, 0.0, np.float32),
        secret=cast(Array | None, secret),
        use=None if use is None else lay_out(_at_slots(use, slots), 0.0, np.float32),
    )


def _at_slots(of_experts: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Takes what stands for each expert (..., E) for the expert of each slot (..., K); else 0."""
    padded = np.pad(of_experts, [(0, 0)] * (of_experts.ndim - 1) + [(0, 1)])
    return np.take_along_axis(padded, slots, axis=-1)


def assignment_slots(assignment: np.ndarray, slots: int) -> np.ndarray:
    """Converts (..., E) bool to (..., K) int32 expert ids, ascending, with E for an empty slot."""
    experts = assignment.shape[-1]
    numbered = np.where(assignment, np.arange(experts), experts)
    return np.sort(numbered, axis=-1)[..., :slots].astype(np.int32)


def slots_assignment(slots: np.ndarray, experts: int) -> np.ndarray:
    """Inverse of `assignment_slots`: converts (..., K) expert ids to (..., E) bool."""
    assignment = np.zeros((*slots.shape[:-1], experts + 1), bool)
    np.put_along_axis(assignment, slots, True, axis=-1)
    return assignment[..., :experts]
