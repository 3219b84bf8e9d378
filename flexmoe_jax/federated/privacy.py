"""Central differential privacy of what the server learns from a cohort (DP-FedAvg).

Every client's whole update, ψ and its experts together, is cut to an L2 norm `clip` and counts with
weight 1; the server adds Gaussian noise of deviation `noise_multiplier · clip` to the sums (McMahan
et al. 2018, arXiv 1710.06963).

Neighbouring federations differ in one client that is added or removed: its update is in the sums or
is not, which moves them by at most `clip`. All else is the same for both and counts as public: who
is asked, who delivers, how many clients hold which expert, and so what the sums are divided by. One
client put in another's place moves the sums by twice as much: read ε at half the noise multiplier.

The guarantee covers the parameters ψ and θ after every round. It does not cover the feedback from
which the fitness is learnt, so the assignment is private only under a policy that asks for none
(`random`, `round_robin`, `static`, `full`), nor losses, usage, label shares, private parameters, or
the mean and deviation by which examples are standardised.

The noise is drawn from random bits of the operating system, new in every round and kept nowhere
(`draw_secret`). JAX's generator is not a cryptographic one, its keys have 64 bits, and its normal
numbers are those of single precision: against someone who can search or exploit that, ε is not
proven. Noise from the run's own key can be drawn again by whoever knows the seed: a simulation.
"""

from __future__ import annotations

import math
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexmoe_jax.errors import InputError
from flexmoe_jax.federated.aggregate import Sums
from flexmoe_jax.types import Key, Plan


def draw_secret() -> np.ndarray:
    """(2,) uint32 random bits of the operating system, for `Plan.secret`."""
    return np.frombuffer(secrets.token_bytes(8), np.uint32)


def noise_key(plan: Plan, own: Key, simulated: bool) -> Key:
    """The key of a round's noise.

    Args:
      plan: of the round.
      own: key from the run's.
      simulated: whether to take that one, and not the plan's secret.

    Raises:
      InputError: the plan has no secret.
    """
    if simulated:
        return own
    if plan.secret is None:
        remedy = "this plan has no secret to draw it from (on the device none has): simulate it"
        raise InputError("simulated_noise", simulated, remedy)
    return jax.random.wrap_key_data(plan.secret, impl="threefry2x32")


def privatise(sums: Sums, plan: Plan, key: Key, deviation: float) -> Sums:
    """Adds noise to the sums, and weighs them by numbers that no client's data decides.

    Args:
      sums: of updates that were cut, each with weight 1.
      plan: of the round.
      key: of the noise.
      deviation: of the noise, in units of the parameters.

    Returns:
      The sums; their weights are how many clients were to deliver, and how many of each expert.
    """
    total = optax.tree.add_scale(
        (sums.shared, sums.experts),
        deviation,
        optax.tree.random_like(key, (sums.shared, sums.experts), jax.random.normal),
    )
    due = (plan.steps > 0).astype(jnp.float32)
    per_expert = jnp.zeros_like(sums.expert_weight)
    return Sums(
        shared=total[0],
        shared_weight=due.sum(),
        experts=total[1],
        expert_weight=per_expert.at[plan.slots].add(due[:, None], mode="drop"),
    )


def epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """ε of (ε, δ)-differential privacy after some rounds, by zero-concentrated privacy.

    A round is one Gaussian mechanism, of `ρ = 1 / (2 z²)`; these add up over rounds, and
    `ε = ρ + 2 √(ρ ln(1/δ))` (Bun and Steinke 2016, arXiv 1605.02658, propositions 1.3 and 1.6 and
    lemma 1.7). ψ and the experts are one mechanism, since an update is cut as a whole. Every client
    counts as one of every round: that a cohort is only a part of all is not counted in favour. A
    round that is done again, since a run was killed before it was saved, is not counted twice.

    Args:
      noise_multiplier: z, deviation of the noise over the clip norm.
      rounds: T.
      delta: δ, below one over the number of clients.
    """
    rho = rounds / (2 * noise_multiplier**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))
