"""Who holds which expert in a round: what the server knows, put to a policy.

Axis legend: `C` clients, `P` clients of the cohort, `E` experts, `G` groups of MoE layers, `n`
newcomers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from flexmoe_jax.assignment import NamedPolicy, Policy, Request, Solution
from flexmoe_jax.errors import InputError
from flexmoe_jax.server.affinity import affinity
from flexmoe_jax.server.load import LoadModel
from flexmoe_jax.server.server import Desk
from flexmoe_jax.types import Server

Assign = Callable[..., tuple[Solution, ...]]
"""(server, cohort (P,), said=None) -> a solution for each group of MoE layers. Runs on the host.

`said` (G, P, E) is the fitness as clients have just told it; None for what the server has learnt.
"""

# Keeps the draws of each group of layers apart from others of the same seed.
_GROUPS = 0x6C61


def make_assign(
    desk: Desk,
    policy: Policy,
    capacity: Int[np.ndarray, " C"],
    descriptor: Float[np.ndarray, "C F"] | None,
    seed: int,
    profile: Float[np.ndarray, "C F"] | None = None,
) -> Assign:
    """Builds the server's assignment.

    Args:
      desk: what the server runs with.
      policy: who holds which experts.
      capacity: (C,) k_c.
      descriptor: (C, F) what kind of data each client has, or None.
      seed: of the policy's ties and draws.
      profile: (C, F) what is known of clients beforehand, for `affinity`; None for what their
        updates tell.
    """

    def assign(
        server: Server, cohort: np.ndarray, said: np.ndarray | None = None
    ) -> tuple[Solution, ...]:
        books = jax.device_get(server.ledger._replace(norms=()))
        found = []
        begin = time.perf_counter()
        like = np.zeros(books.usage.shape)
        if desk.fitness.affinity:
            of_clients = books.profile if profile is None else profile
            like = desk.fitness.affinity * affinity(of_clients, books.usage, capacity, seed)
        # Telling who is alike is a part of the assignment's time, entered once.
        telling = time.perf_counter() - begin
        for g in range(desk.groups):
            fitness, usage, rounds, fresh = (
                table[g][cohort]
                for table in (books.fitness, books.usage, books.held_rounds, books.fresh)
            )
            known = fitness + desk.fitness.optimism * (rounds == 0) if said is None else said[g]
            request = Request(
                fitness=known + like[g][cohort],
                capacity=capacity[cohort],
                clients=cohort,
                round=int(server.round),
                seed=seed,
                load_weight=desk.load.weigh(cohort, usage.astype(np.float64), rounds),
                deficit=books.deficit[g],
                usage=usage,
                held_rounds=rounds,
                held=fresh,
                descriptor=None if descriptor is None else descriptor[cohort],
            )
            solution = policy(replace(request, seed=_seed_of_group(seed, g)))
            check_solution(solution, cohort, capacity, desk.experts)
            found.append(solution)
        first = replace(found[0], seconds=found[0].seconds + telling)
        return (first, *found[1:])

    return assign


class Newcomers(NamedTuple):
    """Clients that have not trained, as the server sees them.

    Attributes:
      fitness: (G, n, E) of all experts on their data, from a probe.
      capacity: (n,) k_c.
      load: what they weigh, by their place among the newcomers.
      descriptor: (n, F) what kind of data each has, or None.
    """

    fitness: np.ndarray
    capacity: np.ndarray
    load: LoadModel
    descriptor: np.ndarray | None = None


def enrol(
    desk: Desk,
    policy: Policy,
    server: Server,
    held: Bool[np.ndarray, "C G E"],
    newcomers: Newcomers,
    seed: int,
) -> tuple[Solution, ...]:
    """Assigns experts to newcomers, beside the clients that hold experts already.

    The problem is that of a round, with the load that is on the experts already: bounds lie around
    the fair share of all load, theirs and the newcomers'. Deficits are left out, since they are
    made up for by rounds of training.

    Args:
      desk: what the server runs with.
      policy: who holds which experts; one by name without what makes holders change (see
        `NamedPolicy.settled`).
      server: as it is.
      held: (C, G, E) bool, the latest experts of the clients that have trained.
      newcomers: who they are.
      seed: of the policy's ties and draws.

    Returns:
      A solution for each group of MoE layers, with the newcomers' load alone.
    """
    if isinstance(policy, NamedPolicy):
        policy = policy.settled()
    there, found = load_of(desk, server, held), []
    places = np.arange(len(newcomers.capacity))
    none = np.zeros((len(places), desk.experts))
    for g in range(desk.groups):
        request = Request(
            fitness=newcomers.fitness[g],
            capacity=newcomers.capacity,
            # Numbers of nobody who has trained.
            clients=len(held) + places,
            round=int(server.round),
            seed=_seed_of_group(seed, g),
            load_weight=newcomers.load.weigh(places, none, none),
            descriptor=newcomers.descriptor,
            load=there[g],
        )
        solution = policy(request)
        check_solution(solution, places, newcomers.capacity, desk.experts)
        found.append(solution)
    return tuple(found)


def load_of(
    desk: Desk, server: Server, held: Bool[np.ndarray, "C G E"]
) -> Float[np.ndarray, "G E"]:
    """Load (G, E) that all clients put on the experts that they hold, (C, G, E) bool."""
    usage, rounds = jax.device_get((server.ledger.usage, server.ledger.held_rounds))
    everyone, loads = np.arange(len(held)), []
    for g in range(desk.groups):
        weight = desk.load.weigh(everyone, usage[g].astype(np.float64), rounds[g])
        of_each = weight if np.ndim(weight) != 1 else np.asarray(weight)[:, None]
        loads.append((held[:, g] * of_each).sum(axis=0))
    return np.stack(loads)


def _seed_of_group(seed: int, group: int) -> int:
    if not group:
        return seed
    return int(np.random.default_rng([seed, _GROUPS, group]).integers(2**31))


def check_solution(
    solution: Solution,
    cohort: Int[np.ndarray, " P"],
    capacity: Int[np.ndarray, " C"],
    experts: int,
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
