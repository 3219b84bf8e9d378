"""Prices for problems whose numbers are on several scales at once.

`estimate_prices` is as exact as a small part of the widest difference. Where the differences that
decide are much smaller than that, as where one expert is worth a million times the others, its
prices send everybody to the wrong place. They are near, though: seen from them, most pairs are
decided, and the rest differ by so little that a look at these alone tells better prices; and so on.

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

# How often to look closer in vain, and by how much each time.
_PATIENCE, _CLOSER = 2, 2.0**-6


class View(NamedTuple):
    """A problem as it looks from prices that are nearly right.

    Attributes:
      worth: [C, E] fitness less those prices, around zero for pairs that are in doubt.
      base: [E] the prices on load.
      span: within which worth decides.
    """

    worth: FloatArray
    base: FloatArray
    span: float


def look(problem: Problem) -> View:
    """The view from prices of zero."""
    span = float(np.max(np.ptp(problem.fitness, axis=1), initial=0.0)) if problem.clients else 0.0
    return View(problem.fitness, np.zeros(problem.experts), span)


def look_closer(
    problem: Problem,
    prices: FloatArray,
    misses: Callable[[View, FloatArray], float],
    enough: float,
    deadline: float = np.inf,
) -> tuple[View, FloatArray]:
    """The view from which prices miss least, and the prices [E] on load, beside those of the view.

    Args:
      problem: without balance and expert sizes.
      prices: [E] from `estimate_prices`.
      misses: by how much load is not where prices send it.
      enough: a miss with which to be content.
      deadline: on the clock of `time.perf_counter`.

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
    # A price belongs to the bound that it pays for; a price of zero belongs to either.
    low, high = effective_bounds(problem)
    seen = replace(
        problem,
        fitness=np.clip(view.worth, -0.5 * view.span, 0.5 * view.span),
        load_min=np.where(view.base > 0, high, low),
        load_max=np.where(view.base < 0, low, high),
    )
    return estimate_prices(seen)


def _closer(problem: Problem, view: View, prices: FloatArray) -> View:
    """The view from prices that are better still, of a smaller span."""
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
