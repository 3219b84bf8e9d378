"""Central differential privacy of what the server learns from a cohort (DP-FedAvg).

Every client's whole update, ψ and its experts together, is cut to an L2 norm `clip` and counts with
weight 1; the server adds Gaussian noise of deviation `noise_multiplier · clip` to the sums (McMahan
et al. 2018, arXiv 1710.06963). Neighbouring federations differ in one client.

The guarantee covers the parameters ψ and θ. It does not cover the feedback from which the fitness
is learnt, so the assignment is private only under a policy that asks for none (`random`,
`round_robin`, `static`, `full`).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from flexmoe_jax.federated.aggregate import Sums
from flexmoe_jax.types import Key, Plan


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
    `ε = ρ + 2 √(ρ ln(1/δ))` (Bun and Steinke 2016, arXiv 1605.02658, propositions 1.3 and 1.6).
    That a cohort is only a part of all clients is not counted in favour.

    Args:
      noise_multiplier: z, deviation of the noise over the clip norm.
      rounds: T.
      delta: δ, below one over the number of clients.
    """
    rho = rounds / (2 * noise_multiplier**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))
