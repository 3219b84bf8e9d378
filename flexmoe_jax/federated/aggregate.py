"""Server aggregation: weighted means that are summed block by block.

Sums are kept apart from their weights until the end, so that a cohort of any size needs the memory
of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from flexmoe_jax.types import Array, PyTree


class Sums(NamedTuple):
    """Running sums of a round's updates.

    Attributes:
      shared: Σ_c n_c Δψ_c.
      shared_weight: () Σ_c n_c.
      experts: Σ_c u_ce Δθ_ce, leaves (E, ...).
      expert_weight: (E,) Σ_c u_ce.
    """

    shared: PyTree
    shared_weight: Array
    experts: PyTree
    expert_weight: Array


def init_sums(shared: PyTree, experts: PyTree, count: int) -> Sums:
    """Zero sums for ψ and θ (leaves (E, ...)) of these shapes, with E = `count`."""
    zeros = jax.tree.map(jnp.zeros_like, (shared, experts))
    none = jnp.zeros(count, jnp.float32)
    return Sums(zeros[0], none.sum(), zeros[1], none)


def add_updates(
    sums: Sums, shared: PyTree, experts: PyTree, slots: Array, examples: Array, usage: Array
) -> Sums:
    """Adds the updates of a block of clients.

    Args:
      sums: so far.
      shared: Δψ_c, leaves (P, ...).
      experts: Δθ_ce of the experts held, leaves (P, K, ...).
      slots: (P, K) int32 which expert each slot holds; E for an empty slot, which adds nothing.
      examples: (P,) n_c, the weight of each client in ψ.
      usage: (P, K) u_ce, the weight of each client in θ_e.

    Returns:
      The sums with the block added.
    """
    chex.assert_rank(examples, 1)
    chex.assert_equal_shape([slots, usage])
    held = jax.nn.one_hot(slots, sums.expert_weight.shape[0], dtype=usage.dtype)
    weight = jnp.einsum("pk,pke->pke", usage, held)
    return Sums(
        shared=_add("p,p...->...", sums.shared, examples, shared),
        shared_weight=sums.shared_weight + examples.sum(),
        experts=_add("pke,pk...->e...", sums.experts, weight, experts),
        expert_weight=sums.expert_weight + weight.sum(axis=(0, 1)),
    )


def _add(contraction: str, totals: PyTree, weight: Array, updates: PyTree) -> PyTree:
    # Full precision: on accelerators the default would round the updates to 10 bits or fewer.
    product = partial(jnp.einsum, contraction, precision=lax.Precision.HIGHEST)
    return jax.tree.map(lambda total, update: total + product(weight, update), totals, updates)


class Updates(NamedTuple):
    """All updates of a cohort, side by side, for aggregators that need to see them together.

    Attributes:
      shared: Δψ_c, leaves (P, ...).
      experts: Δθ_ce of the experts held, leaves (P, K, ...).
      slots: (P, K) int32 which expert each slot holds; E for an empty slot.
      examples: (P,) n_c; 0 for those that delivered nothing.
      usage: (P, K) u_ce.
    """

    shared: PyTree
    experts: PyTree
    slots: Array
    examples: Array
    usage: Array


Aggregator = Callable[[Updates, int], Sums]
"""(updates of a cohort, E) -> sums whose means the server moves by."""


def trimmed_mean(updates: Updates, experts: int, trim: float) -> Sums:
    """Coordinate-wise trimmed mean over clients (Yin et al. 2018, arXiv 1803.01498).

    Of `n` values of a coordinate the `⌊trim · n⌋` least and greatest are left out and the others
    averaged with equal weight; `trim = 0.5` is the median. ψ is averaged over all clients that
    delivered, θ_e over those that used expert e.

    Args:
      updates: of the cohort.
      experts: E.
      trim: part cut off at either end, in [0, 0.5].

    Returns:
      Sums whose mean is the trimmed mean, as `apply_sums` takes them.
    """

    def mean(values: Array, present: Array, total: Array) -> Array:
        count = present.sum()
        cut = jnp.minimum(jnp.floor(trim * count), jnp.maximum(count - 1, 0) // 2)
        among = present.reshape(-1, *[1] * (values.ndim - 1))
        ranked = jnp.sort(jnp.where(among, values, jnp.inf), axis=0)
        rank = jnp.arange(values.shape[0]).reshape(among.shape)
        inside = (rank >= cut) & (rank < count - cut)
        kept = jnp.where(inside, ranked, 0.0).sum(axis=0)
        return total * kept / jnp.maximum(count - 2 * cut, 1)

    delivered = updates.examples > 0
    total = updates.examples.sum()

    def of_expert(e: Array) -> tuple[PyTree, Array]:
        holds = updates.slots == e  # (P, K), at most one slot of each client
        used = (jnp.where(holds, updates.usage, 0.0)).sum(axis=1)
        rows, slot = jnp.arange(len(used)), holds.argmax(axis=1)
        weight = used.sum()
        return jax.tree.map(
            lambda leaf: mean(leaf[rows, slot], used > 0, weight), updates.experts
        ), weight

    expert_sums, expert_weight = lax.map(of_expert, jnp.arange(experts))
    shared = jax.tree.map(lambda leaf: mean(leaf, delivered, total), updates.shared)
    return Sums(shared, total, expert_sums, expert_weight)


class Aggregated(NamedTuple):
    """The server's parameters after a round, with the state of its optimisers."""

    shared: PyTree
    experts: PyTree
    shared_optimizer: PyTree
    expert_optimizer: PyTree


def init_server(
    server: optax.GradientTransformation, shared: PyTree, experts: PyTree
) -> tuple[PyTree, PyTree]:
    """Optimiser state of ψ, and one of its own for each expert (leaves (E, ...))."""
    return server.init(shared), jax.vmap(server.init)(experts) if experts else ()


def apply_sums(
    server: optax.GradientTransformation,
    sums: Sums,
    shared: PyTree,
    experts: PyTree,
    shared_optimizer: PyTree,
    expert_optimizer: PyTree,
) -> Aggregated:
    """Moves ψ and θ by the mean updates, taken as pseudo-gradients (Reddi et al. 2021).

    With `optax.sgd(1.0)`: ψ ← ψ + Σ n_c Δψ_c / Σ n_c and θ_e ← θ_e + Σ u_ce Δθ_ce / Σ u_ce
    (FLEX-MoE). An expert that nobody used keeps its value and its optimiser state bit for bit.

    Args:
      server: any optax transform.
      sums: of all the round's updates.
      shared: ψ.
      experts: θ, leaves (E, ...).
      shared_optimizer: from `init_server`, or from the round before.
      expert_optimizer: the same, leaves (E, ...).

    Returns:
      The new parameters and optimiser states.
    """

    def move(total: PyTree, weight: Array, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        gradient = jax.tree.map(lambda t: -t / jnp.where(weight > 0, weight, 1.0), total)
        updates, stepped = server.update(gradient, state, params)
        moved = optax.apply_updates(params, updates), stepped
        return jax.tree.map(
            lambda new, old: jnp.where(weight > 0, new, old), moved, (params, state)
        )

    new_shared, new_shared_optimizer = move(
        sums.shared, sums.shared_weight, shared, shared_optimizer
    )
    # Where clients keep all experts to themselves there are none to move.
    new_experts, new_expert_optimizer = (
        jax.vmap(move)(sums.experts, sums.expert_weight, experts, expert_optimizer)
        if experts
        else (experts, expert_optimizer)
    )
    return Aggregated(new_shared, new_experts, new_shared_optimizer, new_expert_optimizer)
