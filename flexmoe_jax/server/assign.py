"""Assignment of experts to clients: the server passes its records to a policy.

Axis legend: `C` clients, `P` clients of the cohort, `E` experts, `G` groups of MoE layers, `n`
newcomers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from flexmoe_jax.assignment import Policy, Request, Solution, make_policy, split_use
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.server import FitnessOptions
from flexmoe_jax.server.affinity import affinity
from flexmoe_jax.server.server import Desk
from flexmoe_jax.types import Ledger, Server

Assign = Callable[..., tuple[Solution, ...]]
"""(server, cohort (P,), said=None) -> a solution for each group of MoE layers. Runs on the host.

`said` (G, P, E) is the fitness that the clients have just reported; None to use the server's Q.
"""

# Separates the random draws of the groups of layers, which share a seed.
_GROUPS = 0x6C61
# The least part that a client may want to use an expert, and a worth that counts as none.
_LEAST_PART, _LITTLE = 5e-5, 1e-3
# The part of the evidence that is enough in the round after affinity counted.
_STILL = 0.5


def make_assign(
    desk: Desk,
    policy: Policy,
    capacity: Int[np.ndarray, " C"],
    descriptor: Float[np.ndarray, "C F"] | None,
    seed: int,
    profile: Float[np.ndarray, "C S"] | None = None,
    work: Int[np.ndarray, " C"] | None = None,
) -> Assign:
    """Builds the server's assignment function.

    Args:
      desk: the server's settings.
      policy: assigns experts to clients.
      capacity: (C,) k_c.
      descriptor: (C, F) the kind of data of each client (as label shares), or None.
      seed: seed of the policy's tie-breaking and random draws.
      profile: (C, S) profiles of the clients that are known in advance, for `affinity`; None for
        the profiles learnt from their updates.
      work: (C,) examples that each client trains on in a round. With it, affinity also says how
        much clients use each of their experts (`Solution.use`).
    """

    def assign(
        server: Server, cohort: np.ndarray, said: np.ndarray | None = None
    ) -> tuple[Solution, ...]:
        books = jax.device_get(server.ledger._replace(norms=()))
        _check_scores(desk.fitness, books.fitness)
        found, begin = [], time.perf_counter()
        like = _match(desk, books, profile, capacity, seed, descriptor)
        alike = bool(like.any())
        # The time to compute the affinity is part of the assignment's time, counted once.
        telling = time.perf_counter() - begin
        for g in range(desk.groups):
            fitness, usage, rounds, current = (
                table[g][cohort]
                for table in (books.fitness, books.usage, books.held_rounds, books.current)
            )
            known = fitness + desk.fitness.optimism * (rounds == 0) if said is None else said[g]
            request = Request(
                fitness=known + desk.fitness.affinity * like[g][cohort],
                capacity=capacity[cohort],
                clients=cohort,
                round=int(server.round),
                seed=seed,
                load_weight=desk.load.weigh(cohort, usage.astype(np.float64), rounds),
                deficit=books.deficit[g],
                usage=usage,
                held_rounds=rounds,
                held=current,
                descriptor=None if descriptor is None else descriptor[cohort],
                explore=not (desk.fitness.evidence and alike),
                group=g,
            )
            solution = policy(replace(request, seed=_seed_of_group(seed, g)))
            check_solution(solution, cohort, capacity, desk.experts)
            found.append(_split(replace(solution, alike=alike), like[g][cohort], work, cohort))
        return (replace(found[0], seconds=found[0].seconds + telling), *found[1:])

    return assign


def _match(
    desk: Desk,
    books: Ledger,
    profile: np.ndarray | None,
    capacity: np.ndarray,
    seed: int,
    descriptor: np.ndarray | None,
) -> np.ndarray:
    """How well experts match clients' kinds, (G, C, E) in [0, 1]; 0 if affinity does not count."""
    if not desk.fitness.affinity:
        return np.zeros(books.usage.shape)
    known: Any = books
    label_share = descriptor if desk.fitness.beyond_labels else None
    if profile is not None:
        return affinity(profile, known.usage, capacity, seed)
    # Less is enough for kinds that were seen before: once their experts fit them, clients pull the
    # shared parameters apart less and less.
    least = desk.fitness.evidence * (_STILL if known.alike else 1.0)
    return affinity(known.profile, known.usage, capacity, seed, label_share, least)


def _split(
    solution: Solution, like: np.ndarray, work: np.ndarray | None, cohort: np.ndarray
) -> Solution:
    """Adds how much each client of the cohort should use its experts, if its `work` is known."""
    if work is None:
        return solution
    held = solution.assignment
    return replace(solution, use=split_use(_wish(like, held), held, work[cohort]))


def _wish(
    like: Float[np.ndarray, "P E"], held: Bool[np.ndarray, "P E"]
) -> Float[np.ndarray, "P E"]:
    """How much clients want to use the experts they hold, as logarithms of parts.

    A client wants to use the experts of its own equally. The part of those that it does not hold
    goes to the others that it holds, first to those of its kinds. It is the less certain, the less
    its kind explains.
    """
    sure = like.max(axis=1, keepdims=True)
    own = (like == sure) & (sure > 0)
    part = own / np.maximum(own.sum(axis=1, keepdims=True), 1)
    lost = (part * ~held).sum(axis=1, keepdims=True)
    others = np.where(held & ~own, like + _LITTLE, 0.0)
    others = np.where(others.any(axis=1, keepdims=True), others, held)
    part = part + lost * others / np.maximum(others.sum(axis=1, keepdims=True), _LITTLE)
    return np.asarray(sure * np.log(np.maximum(part, _LEAST_PART)))


def enrol(
    fitness: Float[np.ndarray, "G n E"], capacity: Int[np.ndarray, " n"], seed: int
) -> tuple[Solution, ...]:
    """Gives each newcomer the experts with the best fitness, up to its capacity.

    There are no load bounds, because a client that has not trained contributes no updates yet. In
    its first round a newcomer is part of the cohort, and the assignment balances the load.

    Args:
      fitness: (G, n, E) fitness of all experts on the newcomers' data, from a probe.
      capacity: (n,) k_c.
      seed: seed of the tie-breaking.

    Returns:
      A solution for each group of MoE layers, with the load of the newcomers only.
    """
    fittest, places = make_policy("greedy"), np.arange(len(capacity))
    return tuple(
        fittest(Request(of_group, capacity, places, round=0, seed=_seed_of_group(seed, g)))
        for g, of_group in enumerate(fitness)
    )


def _check_scores(options: FitnessOptions, fitness: np.ndarray) -> None:
    if options.score == "loss" and fitness.max(initial=0.0) > max(options.initial, 1.0):
        remedy = "exp(-α l) is above 1, as the task's loss is below 0: give your own score"
        raise InputError("fitness.score", "loss", remedy)


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
    """Checks that a policy's answer is valid for this cohort.

    Raises:
      InputError: the answer is not a `Solution`, its assignment has another shape or type, or a
        client gets more experts than its capacity.
    """
    given = getattr(solution, "assignment", None)
    if not (isinstance(given, np.ndarray) and given.dtype == bool):
        raise InputError("policy", type(solution).__name__, "return a Solution: see as_solution")
    if solution.use is not None:
        raise InputError("policy", "a Solution with use", "leave out use, which the server sets")
    if given.shape != (len(cohort), experts):
        remedy = f"return an assignment of shape {(len(cohort), experts)}"
        raise InputError("policy", given.shape, remedy)
    held, room = given.sum(axis=1), capacity[cohort]
    if (held > room).any():
        worst = int(np.argmax(held - room))
        remedy = f"client {cohort[worst]} has room for {room[worst]}"
        raise InputError("policy", f"{held[worst]} experts", remedy)
