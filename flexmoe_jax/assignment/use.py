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
      [C, E] y, each client's parts. A client without experts has zeros.

    Raises:
      InputError: arrays that do not fit together, or numbers that are not finite.
    """
    clients, experts = assignment.shape
    wish = np.asarray(preference, np.float64)
    weight = np.broadcast_to(np.asarray(work, np.float64), (clients,))
    if wish.shape != assignment.shape:
        raise InputError("preference", wish.shape, f"give one of each pair: {assignment.shape}")
    holder, expert = np.nonzero(assignment)  # The held pairs, to which all arrays below belong.
    if not (np.isfinite(wish[holder, expert]).all() and np.isfinite(weight).all()):
        raise InputError("preference", "not finite", "give finite preferences and works")
    held = np.bincount(holder, minlength=clients)
    of_work = weight[holder]
    total = np.bincount(expert, of_work / held[holder], experts)
    best = np.full(clients, -np.inf)
    np.maximum.at(best, holder, wish[holder, expert])
    part = np.exp(wish[holder, expert] - best[holder])
    for _ in range(_STEPS):
        part /= np.bincount(holder, part, clients)[holder]
        given = np.bincount(expert, of_work * part, experts)
        if np.abs(given - total).max(initial=0.0) <= _CLOSE * total.max(initial=0.0):
            break
        part *= np.divide(total, given, out=np.ones(experts), where=given > 0)[expert]
    split = np.zeros(assignment.shape)
    split[holder, expert] = part
    return split
