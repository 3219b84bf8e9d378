"""Prices for problems whose numbers differ by orders of magnitude.

The error of `estimate_prices` is a small fraction of the widest difference in fitness. If the
differences that decide are much smaller (one expert is worth a million times the others, for
example), its prices assign clients to the wrong experts. But the prices are nearly right: they
decide most pairs. The other pairs differ only a little, so prices estimated at that smaller scale
are better. This step is repeated.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flexmoe_jax.assignment.certificate import effective_bounds
from flexmoe_jax.assignment.heuristics import take_top
from flexmoe_jax.assignment.prices import estimate_prices
from flexmoe_jax.assignment.problem import FloatArray, Problem, seconds_left

# Refinements without improvement before stopping, and the factor of the span in each refinement.
_PATIENCE, _CLOSER = 2, 2.0**-6


class View(NamedTuple):
    """A problem relative to nearly optimal prices.

    Attributes:
      worth: [C, E] fitness minus those prices; near zero for pairs that are in doubt.
      base: [E] the prices on load.
      span: width of the range around zero in which differences of worth matter.
    """

    worth: FloatArray
    base: FloatArray
    span: float


def look(problem: Problem) -> View:
    """Returns the view at prices of zero."""
    span = float(np.max(np.ptp(problem.fitness, axis=1), initial=0.0)) if problem.clients else 0.0
    return View(problem.fitness, np.zeros(problem.experts), span)


def look_closer(
    problem: Problem,
    prices: FloatArray,
    misses: Callable[[View, FloatArray], float],
    enough: float,
    deadline: float = np.inf,
) -> tuple[View, FloatArray]:
    """Returns the view and prices [E] on load with the smallest miss; they add to the view's base.

    Args:
      problem: a problem without balance and expert sizes.
      prices: [E] from `estimate_prices`.
      misses: computes how much load is misplaced at the prices of a view.
      enough: a miss at or below which the search stops.
      deadline: on the `time.perf_counter` clock.

    Raises:
      SolverError: the deadline passed.
    """
    view = look(problem)
    best, least, vain = (view, prices), misses(view, prices), 0
    while least > enough and vain < _PATIENCE and view.span > 0:
        seconds_left(deadline)
        view = _closer(problem, view, prices)
        prices = _estimate(problem, view)
        missed = misses(view, prices)
        vain = 0 if missed < 0.95 * least else vain + 1
        if missed < least:
            best, least = (view, prices), missed
    return best


def _estimate(problem: Problem, view: View) -> FloatArray:
    # A positive price means that the maximum load binds, a negative one that the minimum binds.
    # With a price of zero, either may bind.
    low, high = effective_bounds(problem)
    seen = replace(
        problem,
        fitness=np.clip(view.worth, -0.5 * view.span, 0.5 * view.span),
        load_min=np.where(view.base > 0, high, low),
        load_max=np.where(view.base < 0, low, high),
    )
    return estimate_prices(seen)


def _closer(problem: Problem, view: View, prices: FloatArray) -> View:
    """Returns the view at the improved prices, with a smaller span."""
    span = _CLOSER * view.span
    reduced = view.worth - problem.weights * prices
    held = take_top(reduced, problem.capacity)
    worst_in = np.min(reduced, axis=1, where=held, initial=np.inf)
    best_out = np.max(reduced, axis=1, where=~held, initial=-np.inf)
    threshold = np.where(np.isinf(best_out), worst_in, best_out)
    both = np.isfinite(worst_in) & np.isfinite(best_out)
    threshold[both] = 0.5 * (worst_in + best_out)[both]
    total = view.base + prices
    base = np.where(np.abs(total) * problem.weights.mean() <= 0.5 * span, 0.0, total)
    worth = view.worth - problem.weights * (base - view.base) - threshold[:, None]
    return View(worth, base, span)
