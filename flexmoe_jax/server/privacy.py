"""Central differential privacy of the parameters that the server learns (DP-FedAvg).

Each client's whole update, ψ and its experts together, is clipped to an L2 norm `clip` and has
weight 1. The server adds Gaussian noise of standard deviation `noise_multiplier · clip` to the sums
(McMahan et al. 2018, arXiv 1710.06963).

Neighbouring federations differ in one client that is added or removed: its update is in the sums or
not, which changes them by at most `clip`. Everything else is equal for both and counts as public:
which clients are asked, which deliver, how many clients hold each expert, and therefore the
divisors of the sums. If one client replaces another, the sums change by twice as much: in this case
compute ε with half the noise multiplier.

The guarantee covers the parameters ψ and θ after every round. It does not cover the feedback from
which the server learns the fitness, so the assignment is private only under a policy that uses no
feedback (`random`, `round_robin`, `static`, `full`). Nor does it cover losses, usage, label shares,
private parameters, or the mean and deviation by which examples are standardised.

The noise is drawn from random bits of the operating system, which are new in every round and are
not stored (`draw_secret`). JAX's generator is not cryptographic, its keys have 64 bits, and its
normal numbers have single precision: ε is not proven against an attacker who can search the keys or
exploit the precision. Noise from the run's own key can be reproduced by anyone who knows the seed,
so such a run only simulates privacy.
"""

from __future__ import annotations

import math
import secrets

import jax
import numpy as np

from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Array, Key, Plan


def draw_secret() -> np.ndarray:
    """Draws (2,) uint32 random bits from the operating system, for `Plan.secret`."""
    return np.frombuffer(secrets.token_bytes(8), np.uint32)


def noise_key(plan: Plan, own: Key, simulated: bool, number: Array | int) -> Key:
    """Returns the key of a round's noise.

    Args:
      plan: the round's plan.
      own: key derived from the run's key.
      simulated: whether to use `own` instead of the plan's secret.
      number: the number of the round. Two rounds with one plan, and so one secret, have different
        noise: the same noise could be subtracted.

    Raises:
      InputError: the plan has no secret.
    """
    if simulated:
        return own
    if plan.secret is None:
        remedy = "this plan has no secret to draw it from (on the device none has): simulate it"
        raise InputError("simulated_noise", simulated, remedy)
    drawn = jax.random.wrap_key_data(plan.secret, impl="threefry2x32")
    return jax.random.fold_in(drawn, number)


def epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Computes ε of (ε, δ)-differential privacy after T rounds, by zero-concentrated privacy.

    A round is one Gaussian mechanism with `ρ = 1 / (2 z²)`. The values of ρ add up over rounds, and
    `ε = ρ + 2 √(ρ ln(1/δ))` (Bun and Steinke 2016, arXiv 1605.02658, propositions 1.3 and 1.6 and
    lemma 1.7). ψ and the experts are one mechanism, because an update is clipped as a whole. The
    bound assumes that every client takes part in every round: sampling of cohorts does not lower ε.
    A round that is repeated because a run was killed before saving it is not counted twice.

    Args:
      noise_multiplier: z, standard deviation of the noise over the clip norm.
      rounds: T.
      delta: δ; choose it below one over the number of clients.
    """
    rho = rounds / (2 * noise_multiplier**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))
