"""Policies: what decides who holds which expert in a round.

A policy is a function from a `Request` (what the server knows at the start of the round) to a
`Solution`. Whatever the order of the cohort, a client gets the same experts: the cohort is sorted
by client id first, and every random choice is a function of (seed, round, client id).

Axis legend: `P` clients in this round's cohort, `E` experts, `F` numbers that describe a client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from flexmoe_jax.assignment.bounds import load_bounds
from flexmoe_jax.assignment.engine import solve
from flexmoe_jax.assignment.heuristics import (
    client_keys,
    take_best,
    take_in_turn,
    take_random,
    take_top,
)
from flexmoe_jax.assignment.problem import (
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    SolverError,
    objective,
)
from flexmoe_jax.assignment.solution import Solution, make_solution
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.assignment import AssignmentOptions

# Noise that breaks ties between clients fairly, and the clients that are enough to tell what it is
# a part of.
_TIE_NOISE, _SAMPLE = 1e-6, 4096
# Draws for exploration, apart from those that break ties.
_EXPLORATION = 1


@dataclass(frozen=True, eq=False)
class Request:
    """What a policy is told about one round.

    Attributes:
      fitness: [P, E] learned worth of client c holding expert e.
      capacity: [P] int, experts that each client holds.
      clients: [P] int, ids of the clients, all different.
      round: number of the round, from 0.
      seed: the experiment's seed.
      load_weight: load of a holder on its expert: a scalar, [P] or [P, E].
      deficit: [E] load that each expert is owed, as `update_deficit` keeps it; None for zeros.
      usage: [P, E] samples that each client routed to each expert in the past; None for zeros.
      held_rounds: [P, E] rounds in which each client held each expert; None for zeros.
      descriptor: [P, F] what kind of data each client has, or None.
      held: [P, E] bool, experts of which a client still has a copy that is as the server's, so that
        it would not have to be sent; None for none. Not who held what last: an expert that was
        trained since is False.
      load: [E] load that others than these clients put on the experts, and which bounds are to even
        out as well; None for none.
      group: which MoE layers are assigned, by their order in the model: 0 where all go together.
        With `layers="each"` a policy is asked once for each of them.
    """

    fitness: FloatArray
    capacity: IntArray
    clients: IntArray
    round: int
    seed: int
    load_weight: float | FloatArray = 1.0
    deficit: FloatArray | None = None
    usage: FloatArray | None = None
    held_rounds: IntArray | None = None
    descriptor: FloatArray | None = None
    held: BoolArray | None = None
    load: FloatArray | None = None
    group: int = 0


Policy = Callable[[Request], Solution]


PLAIN = AssignmentOptions(exploration=0.0)
"""Options of `flex` where none are given: those of a config, but without noise on the fitness.

A policy that is called by itself answers by the fitness alone, as the paper's does; the noise is
for rounds of training, whose experts are to meet the data of many clients."""


def flex(
    request: Request, *, options: AssignmentOptions = PLAIN, share: FloatArray | None = None
) -> Solution:
    """FLEX-MoE: greatest fitness with every expert's load close to what it is owed.

    Args:
      request: what is known of the round.
      options: of the assignment.
      share: [E] part of the load meant for each expert; default: the same for all.
    """
    diversity, exploration = options.diversity, options.exploration
    if diversity and request.descriptor is None:
        raise InputError("assignment.diversity", diversity, "needs a descriptor of the clients")
    experts = request.fitness.shape[1]
    deficit = np.zeros(experts) if request.deficit is None else request.deficit
    low, high = load_bounds(
        request.capacity,
        deficit,
        slack=options.slack,
        load_weight=request.load_weight,
        share=share,
        load=request.load,
    )
    if options.exploration_rounds:
        exploration *= 1 - min(request.round / options.exploration_rounds, 1)
    fitness = _worth(request, options.movement, exploration)
    problem = Problem(
        fitness,
        request.capacity,
        low,
        high,
        request.load_weight,
        holders_min=options.holders_min,
        # Where the load is meant to go: the middle of the bounds.
        target=0.5 * (low + high),
        balance=options.balance,
        descriptor=request.descriptor,
        diversity=diversity,
    )
    noise = _tie_noise(fitness) * _keys(request, request.round)
    try:
        found = solve(
            replace(problem, fitness=fitness + noise),
            options.solver,
            options.rounding,
            seed=request.seed,
            backend=options.backend,
            time_limit=options.time_limit,
        )
    except SolverError as error:
        return replace(_even(request, problem, deficit), status=f"fallback: {error}")
    # The noise only adds fitness, so the bound holds for the true problem, too. The gap stays that
    # of the noisy one: what noise adds and nobody could win is no loss.
    return replace(found, value=objective(problem, found.assignment))


def _even(request: Request, problem: Problem, deficit: FloatArray) -> Solution:
    """What is dealt out where no optimum is found."""
    owed = deficit if request.load is None else deficit - request.load
    held = _deal(request, problem, owed)
    # Of any assignment, whatever bounds, floors or prices.
    bound = float(np.sum(problem.fitness, where=take_top(problem.fitness, problem.capacity)))
    return make_solution(problem, held, bound, 0.0)


def _worth(request: Request, movement: float, exploration: float) -> FloatArray:
    """Fitness less the price of what must be sent, and with noise so that holders change."""
    worth = np.asarray(request.fitness, np.float64)
    if movement:
        sent = True if request.held is None else ~request.held
        worth = worth - movement * sent
    if exploration:
        worth = worth + exploration * _keys(request, request.round, _EXPLORATION)
    return worth


def _tie_noise(fitness: FloatArray) -> float:
    """Width of the noise: far below differences of a fitness [P, E] that matter, in whatever unit.

    What matters is the span of most clients' values or, where that is owed to a few of them, as a
    bonus for the untried, the span that most of the values would have among themselves.
    """
    gaps = np.diff(np.sort(fitness[:_SAMPLE], axis=1), axis=1)
    span, gap = gaps.sum(axis=1), gaps[gaps > 0]
    if not gap.size:
        # All that a client can hold is worth the same to it.
        return _TIE_NOISE * (float(np.max(np.abs(fitness), initial=0.0)) or 1.0)
    dense = float(np.median(gap)) * fitness.shape[1]
    return _TIE_NOISE * min(float(np.median(span[span > 0])), dense)


def greedy(request: Request) -> Solution:
    """Every client takes its fittest experts; ties fall by a seeded key."""
    return as_solution(
        request, take_best(_fitness(request), request.capacity, _keys(request, request.round))
    )


def greedy_usage(request: Request) -> Solution:
    """Every client tries all experts, then takes those that it uses most in a round.

    After FedMoE (arXiv 2408.11304), which chooses by activations recorded before: without the trial
    no client would ever use, and so choose, an expert that it did not get in the first round.
    """
    usage = np.zeros(request.fitness.shape) if request.usage is None else request.usage
    held = np.zeros(usage.shape) if request.held_rounds is None else request.held_rounds
    a_round = np.where(held > 0, usage / np.maximum(held, 1), np.inf)
    return as_solution(request, take_best(a_round, request.capacity, _keys(request, request.round)))


def random(request: Request) -> Solution:
    """Every client takes experts at random, anew each round."""
    return as_solution(request, take_random(request.capacity, _keys(request, request.round)))


def static(request: Request) -> Solution:
    """Every client takes experts at random once and keeps them."""
    return as_solution(request, take_random(request.capacity, _keys(request, 0)))


def round_robin(request: Request) -> Solution:
    """Client c in round t takes experts `(c + t + 0 .. k_c - 1) mod E`."""
    held = take_in_turn(request.capacity, request.clients, request.round, request.fitness.shape[1])
    return as_solution(request, held)


def full(request: Request) -> Solution:
    """Every client holds all experts, whatever its capacity: the upper reference."""
    everything = replace(
        request, capacity=np.full(request.clients.shape, request.fitness.shape[1], np.int64)
    )
    return as_solution(everything, np.ones(request.fitness.shape, bool))


POLICIES: dict[str, Callable[..., Solution]] = {
    "flex": flex,
    "full": full,
    "greedy": greedy,
    "greedy_usage": greedy_usage,
    "random": random,
    "round_robin": round_robin,
    "static": static,
}
"""Policies by name. Enter one of your own, and `make_policy` and the launchers know it."""


def _fitness(request: Request) -> FloatArray:
    return np.asarray(request.fitness, np.float64)


def _keys(request: Request, turn: int, *purpose: int) -> FloatArray:
    seed = [request.seed, turn, *purpose]
    return client_keys(seed, request.clients, request.fitness.shape[1])


def _deal(request: Request, problem: Problem, deficit: FloatArray) -> BoolArray:
    """Experts dealt out like cards, [P, E]: holders differ by one at the most.

    The heaviest clients come first, so that loads come out nearly even, too; of equal ones chance
    decides. The experts that are owed most get the holders left over.
    """
    heaviest = np.lexsort((_keys(request, request.round)[:, 0], -problem.weights.mean(axis=1)))
    dealt_before = np.empty_like(problem.capacity)
    dealt_before[heaviest] = np.cumsum(problem.capacity[heaviest]) - problem.capacity[heaviest]
    held = np.empty(problem.fitness.shape, bool)
    owed = np.argsort(-deficit, kind="stable")
    held[:, owed] = take_in_turn(problem.capacity, dealt_before, 0, problem.experts)
    return held


def as_solution(request: Request, assignment: npt.ArrayLike) -> Solution:
    """What a policy without load bounds answers with, for the assignment [P, E] bool that it chose.

    A client may be given fewer experts than it has room for, and never more. The bound is what
    clients would take if loads did not matter.

    Raises:
      InputError: an assignment of another shape, or of other numbers than 0 and 1.
    """
    given = np.asarray(assignment)
    if given.shape != request.fitness.shape or not np.isin(given, (0, 1)).all():
        remedy = f"give a bool array {request.fitness.shape}: who holds what"
        raise InputError("assignment", f"{given.dtype}{list(given.shape)}", remedy)
    experts = request.fitness.shape[1]
    low, high = np.zeros(experts), np.full(experts, np.inf)
    problem = Problem(request.fitness, request.capacity, low, high, request.load_weight)
    best = take_top(problem.fitness, problem.capacity)
    return make_solution(
        problem, given.astype(bool), float(np.sum(problem.fitness, where=best)), 0.0
    )
