"""How much of its work a client should give to each of the experts that it holds.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flexmoe_jax.assignment.problem import BoolArray, FloatArray
from flexmoe_jax.errors import InputError

# Most steps of the iteration, and the relative error of an expert's total at which it ends.
_STEPS, _CLOSE = 200, 1e-4
# Preferences differ by no more than this in effect, or parts would vanish.
_LEAST = -300.0


def split_use(
    preference: npt.ArrayLike, assignment: BoolArray, work: npt.ArrayLike = 1.0
) -> FloatArray:
    """Splits each client's work among its experts, as it prefers, with each expert's total kept.

    With preferences Q and works n it solves, for an assignment x with k_c = Σ_e x_ce experts,

        maximise  Σ_c n_c Σ_e y_ce (Q_ce - log y_ce)  over y ≥ 0, y_ce = 0 where x_ce = 0,
        subject to  Σ_e y_ce = 1  and  Σ_c n_c y_ce = Σ_c n_c x_ce / k_c.

    Clients without a preference split their work evenly. A client that prefers an expert by 1 gives
    it about e times as much, as far as others can give it less: an expert gets as much in total as
    if all its holders split evenly, so the split is as balanced as the assignment. It is a problem
    of optimal transport, solved by Sinkhorn's iteration (Cuturi 2013, arXiv 1306.0895).

    Args:
      preference: [C, E] Q, finite; what clients do not hold does not matter.
      assignment: [C, E] bool, x.
      work: [C] or scalar, n_c ≥ 0.

    Returns:
      [C, E] y, each client's parts, which sum to 1. A client without experts has zeros. Totals are
      met to 1e-4 of the largest, or as nearly as 200 steps bring them.

    Raises:
      InputError: arrays that do not fit together, or numbers out of range.
    """
    clients, experts = assignment.shape
    wish, weight = np.asarray(preference, np.float64), np.asarray(work, np.float64)
    if wish.shape != assignment.shape:
        raise InputError("preference", wish.shape, f"give one of each pair: {assignment.shape}")
    if weight.shape not in ((), (clients,)):
        raise InputError("work", weight.shape, f"give one number of each client: {(clients,)}")
    weight = np.broadcast_to(weight, (clients,))
    holder, expert = np.nonzero(assignment)  # The held pairs, to which all arrays below belong.
    if not np.isfinite(wish[holder, expert]).all():
        raise InputError("preference", "not finite", "give finite numbers for all that is held")
    if not (np.isfinite(weight) & (weight >= 0)).all():
        raise InputError("work", "negative or not finite", "give finite numbers of at least 0")
    held = np.bincount(holder, minlength=clients)
    of_work = weight[holder]
    total = np.bincount(expert, of_work / held[holder], experts)
    best = np.full(clients, -np.inf)
    np.maximum.at(best, holder, wish[holder, expert])
    part = np.exp(np.maximum(wish[holder, expert] - best[holder], _LEAST))
    for _ in range(_STEPS):
        part /= np.bincount(holder, part, clients)[holder]
        given = np.bincount(expert, of_work * part, experts)
        if np.abs(given - total).max(initial=0.0) <= _CLOSE * total.max(initial=0.0):
            break
        part *= np.divide(total, given, out=np.ones(experts), where=given > 0)[expert]
    split = np.zeros(assignment.shape)
    split[holder, expert] = part / np.bincount(holder, part, clients)[holder]
    return split
