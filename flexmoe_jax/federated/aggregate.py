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

    Of `n` values of a coordinate the `⌈trim · n⌉` least and greatest are left out, as long as one
    value is left, or two of an even number; the others are averaged with equal weight.
    `trim = 0.5` is the median. ψ is averaged over all clients that delivered, θ_e over those that
    used expert e. One or two values have no outlier: they are averaged as they are.

    Args:
      updates: of the cohort; those that are not all numbers are left out.
      experts: E.
      trim: part cut off at either end, in [0, 0.5].

    Returns:
      Sums whose mean is the trimmed mean, as `apply_sums` takes them.
    """

    def centre(values: PyTree, weight: Array) -> PyTree:
        present = weight > 0
        count = present.sum()
        # A product just above a whole number, by rounding, is that number.
        cut = jnp.minimum(
            jnp.ceil(trim * count * (1 - 1e-6)), jnp.maximum(count - 1, 0) // 2
        ).astype(count.dtype)
        inside = (jnp.arange(len(weight)) >= cut) & (jnp.arange(len(weight)) < count - cut)

        def mean(leaf: Array) -> Array:
            ranked = jnp.sort(jnp.where(_along(present, leaf), leaf, jnp.inf), axis=0)
            kept = jnp.where(_along(inside, leaf), ranked, 0.0).sum(axis=0)
            return kept / jnp.maximum(count - 2 * cut, 1)

        return jax.tree.map(mean, values)

    return _by_part(updates, experts, centre)


def geometric_median(updates: Updates, experts: int, steps: int = 8) -> Sums:
    """Geometric median over clients (Pillutla et al. 2019, arXiv 1912.13445: RFA).

    The point with the least sum of distances to the updates, weighed by examples (ψ) and by usage
    (θ_e, each expert by itself), found by smoothed Weiszfeld steps `v ← Σ β_c Δ_c / Σ β_c` with
    `β_c = w_c / max(|Δ_c - v|, ν)`. It holds while faulty clients have less than half of the
    weight. It starts at no change at all, where an update counts by its direction and not by its
    length; so of two updates it stays near the shorter, and one alone is taken as it is.

    Args:
      updates: of the cohort; those that are not all numbers are left out.
      experts: E.
      steps: Weiszfeld steps.

    Returns:
      Sums whose mean is the median, as `apply_sums` takes them.
    """

    def centre(values: PyTree, weight: Array) -> PyTree:
        lengths = jax.vmap(optax.tree.norm)
        # ν, a tenth of the median length: an update of no length must not hold the others back.
        ranked = jnp.sort(jnp.where(weight > 0, lengths(values), jnp.inf))
        smooth = jnp.maximum(0.1 * ranked[jnp.maximum((weight > 0).sum() - 1, 0) // 2], 1e-12)

        def step(_: int, middle: PyTree) -> PyTree:
            distance = lengths(jax.tree.map(jnp.subtract, values, middle))
            pull = weight / jnp.maximum(distance, smooth)
            pull /= jnp.maximum(pull.sum(), 1e-30)
            zero = jax.tree.map(jnp.zeros_like, middle)
            return _add("p,p...->...", zero, pull, values)

        return lax.fori_loop(0, steps, step, jax.tree.map(lambda x: jnp.zeros_like(x[0]), values))

    return _by_part(updates, experts, centre)


def _by_part(updates: Updates, experts: int, centre: Callable[[PyTree, Array], PyTree]) -> Sums:
    """Sums whose means are the centres of ψ's updates, and of each expert's.

    Args:
      updates: of the cohort.
      experts: E.
      centre: of values, leaves (P, ...), with weights (P,), 0 for those that are not there.
    """
    whole = jnp.ones(updates.examples.shape, bool)
    for leaf in jax.tree.leaves((updates.shared, updates.experts)):
        whole &= jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)
    shared, of_slots = jax.tree.map(
        lambda leaf: jnp.where(_along(whole, leaf), leaf, 0.0), (updates.shared, updates.experts)
    )
    usage = jnp.where(whole[:, None], updates.usage, 0.0)
    examples = jnp.where(whole, updates.examples, 0.0)

    def weigh(values: PyTree, weight: Array) -> tuple[PyTree, Array]:
        total = weight.sum()
        # Clients may keep all experts, or all else, to themselves.
        middle = centre(values, weight) if jax.tree.leaves(values) else values
        return jax.tree.map(lambda leaf: total * leaf, middle), total

    def of_expert(e: Array) -> tuple[PyTree, Array]:
        holds = updates.slots == e  # (P, K), at most one slot of each client
        slot = holds.argmax(axis=1)
        used = jnp.where(holds, usage, 0.0).sum(axis=1)
        return weigh(jax.tree.map(lambda leaf: leaf[jnp.arange(len(slot)), slot], of_slots), used)

    expert_sums, expert_weight = lax.map(of_expert, jnp.arange(experts))
    return Sums(*weigh(shared, examples), expert_sums, expert_weight)


def _along(clients: Array, leaf: Array) -> Array:
    """(P,) in the shape of a leaf (P, ...), to be broadcast."""
    return clients.reshape(-1, *[1] * (leaf.ndim - 1))


def all_finite(tree: PyTree) -> Array:
    """() bool, whether every number of a tree is one."""
    return jnp.asarray([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)], bool).all()


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
