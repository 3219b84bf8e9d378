"""Policies decide which client holds which expert in a round.

A policy is a function from a `Request` (what the server knows at the start of the round) to a
`Solution`. A client's experts do not depend on the order of the cohort: the cohort is sorted by
client id first, and every random choice is a function of (seed, round, client id).

Axis legend: `P` clients in this round's cohort, `E` experts, `F` features in a client's descriptor.
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
    largest,
    objective,
)
from flexmoe_jax.assignment.solution import Solution, make_solution
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.assignment import AssignmentOptions

# Relative width of the noise that breaks ties between clients fairly, and number of clients from
# which the scale of the fitness is estimated.
_TIE_NOISE, _SAMPLE = 1e-6, 4096
# Seed component that makes the draws for exploration differ from those that break ties.
_EXPLORATION = 1


@dataclass(frozen=True, eq=False)
class Request:
    """The inputs of a policy for one round.

    Attributes:
      fitness: [P, E] learned value of client c holding expert e.
      capacity: [P] int, number of experts that each client holds.
      clients: [P] int, ids of the clients, all different.
      round: number of the round, from 0.
      seed: the experiment's seed.
      load_weight: load that a client adds to an expert it holds: a scalar, [P] or [P, E].
      deficit: [E] load that each expert is owed, as `update_deficit` computes it; None for zeros.
      usage: [P, E] samples that each client routed to each expert in the past; None for zeros.
      held_rounds: [P, E] rounds in which each client held each expert; None for zeros.
      descriptor: [P, F] features of each client's data, or None.
      held: [P, E] bool, whether a client still has a copy of the expert that equals the server's,
        so the server need not send it; None for none. This differs from the previous assignment:
        an expert that was trained since is False.
      load: [E] load that clients outside this cohort put on the experts, and that the bounds also
        even out; None for none.
      explore: whether holders may change by chance; False once the server knows who is alike.
      group: index of the assigned group of MoE layers, in the order of their names: 0 if all are
        assigned together. With `layers="each"` a policy is called once for each of them.
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
    explore: bool = True
    group: int = 0


Policy = Callable[[Request], Solution]


PLAIN = AssignmentOptions(exploration=0.0)
"""Default options of `flex`: the defaults of a config, but without noise on the fitness.

A policy that is called on its own uses only the fitness, as in the paper. The noise is for rounds
of training, in which experts should see the data of many clients."""


def flex(
    request: Request, *, options: AssignmentOptions = PLAIN, share: FloatArray | None = None
) -> Solution:
    """Assigns by FLEX-MoE: maximises fitness with every expert's load close to its target.

    Args:
      request: the inputs for the round.
      options: options of the assignment.
      share: [E] part of the load that each expert should get; default: the same for all.
    """
    diversity, exploration = options.diversity, options.exploration * request.explore
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
        # The load should go to the middle of the bounds.
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
    # The noise only adds fitness, so the bound also holds for the true problem. The gap stays the
    # noisy problem's gap: fitness that only the noise adds cannot be won, so it is no loss.
    return replace(found, value=objective(problem, found.assignment))


def _even(request: Request, problem: Problem, deficit: FloatArray) -> Solution:
    """Deals experts out evenly, as a fallback if no optimum is found."""
    owed = deficit if request.load is None else deficit - request.load
    held = _deal(request, problem, owed)
    # This bound holds for any assignment, for all load bounds, floors and prices.
    bound = float(np.sum(problem.fitness, where=take_top(problem.fitness, problem.capacity)))
    return make_solution(problem, held, bound, 0.0)


def _worth(request: Request, movement: float, exploration: float) -> FloatArray:
    """Computes fitness minus the cost of sending experts, plus noise that makes holders change."""
    worth = np.asarray(request.fitness, np.float64)
    if movement:
        held = False if request.held is None else _as_bool("held", request.held, worth.shape)
        worth = worth - movement * np.logical_not(held)
    if exploration:
        worth = worth + exploration * _keys(request, request.round, _EXPLORATION)
    return worth


def _tie_noise(fitness: FloatArray) -> float:
    """Computes a noise width far below the relevant differences of a fitness [P, E], in any unit.

    The relevant scale is the span of a typical client's values. If a few values alone cause that
    span (a bonus for untried experts, for example), it is the span of the remaining values.
    """
    gaps = np.diff(np.sort(fitness[:_SAMPLE], axis=1), axis=1)
    span, gap = gaps.sum(axis=1), gaps[gaps > 0]
    if not gap.size:
        # All experts have the same fitness for each client.
        return _TIE_NOISE * (largest(fitness) or 1.0)
    dense = float(np.median(gap)) * fitness.shape[1]
    return _TIE_NOISE * min(float(np.median(span[span > 0])), dense)


def greedy(request: Request) -> Solution:
    """Gives every client its experts of highest fitness; a seeded key breaks ties."""
    return as_solution(
        request, take_best(_fitness(request), request.capacity, _keys(request, request.round))
    )


def greedy_usage(request: Request) -> Solution:
    """Lets every client try all experts, then gives it those that it uses most per round.

    After FedMoE (arXiv 2408.11304), which chooses by recorded activations. Without the trial, a
    client would never use, and so never choose, an expert that it did not get in the first round.
    """
    usage = np.zeros(request.fitness.shape) if request.usage is None else request.usage
    held = np.zeros(usage.shape) if request.held_rounds is None else request.held_rounds
    a_round = np.where(held > 0, usage / np.maximum(held, 1), np.inf)
    return as_solution(request, take_best(a_round, request.capacity, _keys(request, request.round)))


def random(request: Request) -> Solution:
    """Gives every client random experts, drawn again in each round."""
    return as_solution(request, take_random(request.capacity, _keys(request, request.round)))


def static(request: Request) -> Solution:
    """Gives every client random experts once; the client keeps them in all rounds."""
    return as_solution(request, take_random(request.capacity, _keys(request, 0)))


def round_robin(request: Request) -> Solution:
    """Gives client c in round t the experts `(c + t + 0 .. k_c - 1) mod E`."""
    held = take_in_turn(request.capacity, request.clients, request.round, request.fitness.shape[1])
    return as_solution(request, held)


def full(request: Request) -> Solution:
    """Gives every client all experts, and ignores capacity: the upper reference."""
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
"""Policies by name. `make_policy` and the launchers also accept policies that you add here."""


def _fitness(request: Request) -> FloatArray:
    return np.asarray(request.fitness, np.float64)


def _keys(request: Request, turn: int, *purpose: int) -> FloatArray:
    seed = [request.seed, turn, *purpose]
    return client_keys(seed, request.clients, request.fitness.shape[1])


def _deal(request: Request, problem: Problem, deficit: FloatArray) -> BoolArray:
    """Deals experts out like cards, [P, E]: numbers of holders differ by at most one.

    The heaviest clients come first, so that the loads are also nearly even. The order of equally
    heavy clients is random. The experts with the largest deficit get the remaining holders.
    """
    heaviest = np.lexsort((_keys(request, request.round)[:, 0], -problem.weights.mean(axis=1)))
    dealt_before = np.empty_like(problem.capacity)
    dealt_before[heaviest] = np.cumsum(problem.capacity[heaviest]) - problem.capacity[heaviest]
    held = np.empty(problem.fitness.shape, bool)
    owed = np.argsort(-deficit, kind="stable")
    held[:, owed] = take_in_turn(problem.capacity, dealt_before, 0, problem.experts)
    return held


def as_solution(request: Request, assignment: npt.ArrayLike) -> Solution:
    """Builds the solution of a policy without load bounds from its assignment [P, E] bool.

    A client may get fewer experts than its capacity, but never more; the server checks this. The
    bound is the value if every client took its best experts, without load bounds.

    Raises:
      InputError: an assignment of another shape, or with values other than 0 and 1.
    """
    held = _as_bool("assignment", assignment, request.fitness.shape)
    experts = request.fitness.shape[1]
    low, high = np.zeros(experts), np.full(experts, np.inf)
    problem = Problem(request.fitness, request.capacity, low, high, request.load_weight)
    best = take_top(problem.fitness, problem.capacity)
    return make_solution(problem, held, float(np.sum(problem.fitness, where=best)), 0.0)


def _as_bool(field: str, value: npt.ArrayLike, shape: tuple[int, ...]) -> BoolArray:
    """Converts an array of zeros and ones, or bools, of this shape; else raises `InputError`."""
    given = np.asarray(value)
    if given.shape != shape or not np.isin(given, (0, 1)).all():
        remedy = f"give a bool array {shape}: who holds what"
        raise InputError(field, f"{given.dtype}{list(given.shape)}", remedy)
    return given.astype(bool)
