"""Who holds which expert in a round: what the server knows, put to a policy.

Axis legend: `C` clients, `P` clients of the cohort, `E` experts, `G` groups of MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np

from flexmoe_jax.assignment import Policy, Request, Solution
from flexmoe_jax.errors import InputError
from flexmoe_jax.server.server import Desk
from flexmoe_jax.types import Server

Assign = Callable[[Server, np.ndarray], tuple[Solution, ...]]
"""(server, cohort (P,)) -> a solution for each group of MoE layers. Runs on the host."""

# Keeps the draws of each group of layers apart from others of the same seed.
_GROUPS = 0x6C61


def make_assign(
    desk: Desk,
    policy: Policy,
    capacity: np.ndarray,
    descriptor: np.ndarray | None,
    seed: int,
) -> Assign:
    """Builds the server's assignment.

    Args:
      desk: what the server runs with.
      policy: who holds which experts.
      capacity: (C,) k_c.
      descriptor: (C, F) what kind of data each client has, or None.
      seed: of the policy's ties and draws.
    """

    def assign(server: Server, cohort: np.ndarray) -> tuple[Solution, ...]:
        books = jax.device_get(server.ledger._replace(norms=()))
        found = []
        for g in range(desk.groups):
            fitness, usage, rounds, fresh = (
                table[g][cohort]
                for table in (books.fitness, books.usage, books.held_rounds, books.fresh)
            )
            request = Request(
                fitness=fitness + desk.fitness.optimism * (rounds == 0),
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
            if g:
                drawn = np.random.default_rng([seed, _GROUPS, g]).integers(2**31)
                request = replace(request, seed=int(drawn))
            solution = policy(request)
            check_solution(solution, cohort, capacity, desk.experts)
            found.append(solution)
        return tuple(found)

    return assign


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
