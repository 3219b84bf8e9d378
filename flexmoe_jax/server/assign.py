"""Who holds which expert in a round: what the server knows, put to a policy.

Axis legend: `C` clients, `P` clients of the cohort, `E` experts, `G` groups of MoE layers, `n`
newcomers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Float, Int

from flexmoe_jax.assignment import Policy, Request, Solution, make_policy
from flexmoe_jax.errors import InputError
from flexmoe_jax.server.affinity import affinity
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
    profile: Float[np.ndarray, "C S"] | None = None,
) -> Assign:
    """Builds the server's assignment.

    Args:
      desk: what the server runs with.
      policy: who holds which experts.
      capacity: (C,) k_c.
      descriptor: (C, F) what kind of data each client has, or None.
      seed: of the policy's ties and draws.
      profile: (C, S) what is known of clients beforehand, for `affinity`; None for what their
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
                group=g,
            )
            solution = policy(replace(request, seed=_seed_of_group(seed, g)))
            check_solution(solution, cohort, capacity, desk.experts)
            found.append(solution)
        first = replace(found[0], seconds=found[0].seconds + telling)
        return (first, *found[1:])

    return assign


def enrol(
    fitness: Float[np.ndarray, "G n E"], capacity: Int[np.ndarray, " n"], seed: int
) -> tuple[Solution, ...]:
    """Gives newcomers the experts that suit them best, as many as each has room for.

    Without load bounds: whoever has not trained adds nothing to what experts learn from. In its
    first round a newcomer is one of the cohort, whose assignment evens out the load.

    Args:
      fitness: of all experts on their data, from a probe.
      capacity: k_c.
      seed: of ties.

    Returns:
      A solution for each group of MoE layers, with the newcomers' load alone.
    """
    fittest, places = make_policy("greedy"), np.arange(len(capacity))
    return tuple(
        fittest(Request(of_group, capacity, places, round=0, seed=_seed_of_group(seed, g)))
        for g, of_group in enumerate(fitness)
    )


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
