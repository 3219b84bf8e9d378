"""Server aggregation: combines the clients' updates of ψ and of every expert into one.

An aggregator is a record of functions, so that updates can be added block by block while the cohort
trains. A mean keeps running sums and needs the memory of one block; a robust aggregator keeps all
updates.

Axis legend: `P` clients of the round's plan, `p` clients of a block, `E` experts, `K` expert slots,
`L` MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from flexmoe_jax.options.server import Aggregation
from flexmoe_jax.types import Array, Key, PyTree


class Arrived(NamedTuple):
    """A block of admitted updates and their weights.

    Attributes:
      shared: Δψ, leaves (p, ...).
      experts: Δθ of the experts held, by MoE layer, leaves (p, K, ...).
      slots: by MoE layer (p, K) int32 the expert that each slot holds; E for an empty slot.
      weight: (p,) weight of each client in ψ; 0 for a client that delivered nothing.
      usage: by MoE layer (p, K) weight of each client in θ_e.
    """

    shared: PyTree
    experts: PyTree
    slots: dict[str, Array]
    weight: Array
    usage: dict[str, Array]


class Sums(NamedTuple):
    """Weighted sums of a round's updates, with the sums of their weights.

    Attributes:
      shared: Σ_c n_c Δψ_c.
      shared_weight: () Σ_c n_c.
      experts: Σ_c u_ce Δθ_ce by MoE layer, leaves (E, ...).
      expert_weight: by MoE layer (E,) Σ_c u_ce.
    """

    shared: PyTree
    shared_weight: Array
    experts: PyTree
    expert_weight: dict[str, Array]


class Due(NamedTuple):
    """The deliveries that a round's plan expects; they do not depend on any client's data.

    Attributes:
      clients: () number of clients expected to deliver.
      holders: by MoE layer (E,), number of these clients that hold each expert.
      key: key for the noise of differential privacy.
    """

    clients: Array
    holders: dict[str, Array]
    key: Key


class Aggregator(NamedTuple):
    """The functions with which the server aggregates updates.

    Attributes:
      zero: (ψ, θ, P, K) -> empty total, with room for P clients with K slots each.
      add: (total, block of `Arrived`) -> total with the block added.
      merge: (total, name or names of mesh axes) -> total over all devices along these axes.
      drop: (total, late (P,) bool) -> (total without the late updates, (P,) bool the clients that
        were removed). Late updates turn out to be too long only when all have arrived. From a sum,
        only all updates together can be removed.
      mean: (total, due) -> `Sums`; the server moves by these sums divided by their weights.
      by_part: whether totals are `Sums`, to which ψ, and each expert, is added without regard to
        the others. Only then can the experts' part be split over devices.
    """

    zero: Callable[[PyTree, PyTree, int, int], Any]
    add: Callable[[Any, Arrived], Any]
    merge: Callable[[Any, Any], Any]
    drop: Callable[[Any, Array], tuple[Any, Array]]
    mean: Callable[[Any, Due], Sums]
    by_part: bool = False


def mean() -> Aggregator:
    """Makes the aggregator of weighted means: by units (ψ) and usage (θ_e), as in FLEX-MoE."""

    def zero(shared: PyTree, experts: PyTree, rows: int, slots: int) -> Sums:
        # In half precision, a long sum would stand still or overflow.
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
            (shared, experts),
        )
        none = {layer: jnp.zeros(count_of(stack), jnp.float32) for layer, stack in experts.items()}
        return Sums(zeros[0], jnp.zeros((), jnp.float32), zeros[1], none)

    def add(sums: Sums, block: Arrived) -> Sums:
        experts, weights = {}, {}
        for layer, total in sums.experts.items():
            usage, slots = block.usage[layer], block.slots[layer]
            held = jax.nn.one_hot(slots, count_of(total), dtype=usage.dtype)
            weight = jnp.einsum("pk,pke->pke", usage, held)
            experts[layer] = _add("pke,pk...->e...", total, weight, block.experts[layer])
            weights[layer] = sums.expert_weight[layer] + weight.sum(axis=(0, 1))
        return Sums(
            shared=_add("p,p...->...", sums.shared, block.weight, block.shared),
            shared_weight=sums.shared_weight + block.weight.sum(),
            experts=experts,
            expert_weight=weights,
        )

    def drop(sums: Sums, late: Array) -> tuple[Sums, Array]:
        weights = sums.shared_weight, sums.expert_weight
        weights = jax.tree.map(lambda w: jnp.where(late.any(), 0.0, w), weights)
        left = sums._replace(shared_weight=weights[0], expert_weight=weights[1])
        return left, jnp.broadcast_to(late.any(), late.shape)

    return Aggregator(zero, add, lax.psum, drop, lambda sums, due: sums, by_part=True)


def private(deviation: float) -> Aggregator:
    """Makes the aggregator of means with Gaussian noise, for differential privacy.

    The divisors of the sums do not depend on any client's data.

    Args:
      deviation: standard deviation of the noise on the sums of the clipped updates, each with
        weight 1; in units of the parameters.
    """
    plain = mean()

    def noised(sums: Sums, due: Due) -> Sums:
        exact = sums.shared, sums.experts
        noise = optax.tree.random_like(due.key, exact, jax.random.normal)
        shared, experts = optax.tree.add_scale(exact, deviation, noise)
        holders = {layer: due.holders[layer] for layer in experts}
        return Sums(shared, due.clients, experts, holders)

    return plain._replace(mean=noised)


class Collected(NamedTuple):
    """All updates so far: the number of filled rows, and `Arrived` with room for P clients."""

    rows: Array
    updates: Arrived


Centre = Callable[[PyTree, Array], PyTree]
"""(values, leaves (P, ...), weights (P,), 0 for missing values) -> centre of the values."""


def collect(centre: Centre) -> Aggregator:
    """Makes an aggregator that keeps all updates and takes the centre for ψ and for each expert.

    Updates that are not finite are left out. The sums are the centres times the total weights.
    """

    def zero(shared: PyTree, experts: PyTree, rows: int, slots: int) -> Collected:
        def room(tree: PyTree, *size: int) -> PyTree:
            skip = len(size) - 1
            return jax.tree.map(lambda x: jnp.zeros((*size, *x.shape[skip:]), x.dtype), tree)

        empty = {layer: count_of(stack) for layer, stack in experts.items()}
        none = Arrived(
            shared=room(shared, rows),
            experts=room(experts, rows, slots),
            slots={layer: jnp.full((rows, slots), e, jnp.int32) for layer, e in empty.items()},
            weight=jnp.zeros(rows, jnp.float32),
            usage={layer: jnp.zeros((rows, slots), jnp.float32) for layer in empty},
        )
        return Collected(jnp.zeros((), jnp.int32), none)

    def add(total: Collected, block: Arrived) -> Collected:
        def put(room: Array, new: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(room, new.astype(room.dtype), total.rows, axis=0)

        rows = total.rows + block.weight.shape[0]
        return Collected(rows, jax.tree.map(put, total.updates, block))

    def merge(total: Collected, axis: Any) -> Collected:
        together = partial(lax.all_gather, axis_name=axis, tiled=True)
        return Collected(lax.psum(total.rows, axis), jax.tree.map(together, total.updates))

    def drop(total: Collected, late: Array) -> tuple[Collected, Array]:
        updates = total.updates
        usage = {layer: jnp.where(late[:, None], 0.0, u) for layer, u in updates.usage.items()}
        kept = updates._replace(weight=jnp.where(late, 0.0, updates.weight), usage=usage)
        return total._replace(updates=kept), late

    def central(total: Collected, due: Due) -> Sums:
        return _by_part(total.updates, due, centre)

    return Aggregator(zero, add, merge, drop, central)


def _by_part(updates: Arrived, due: Due, centre: Centre) -> Sums:
    """Returns sums whose means are the centres of the updates of ψ and of each expert."""
    whole = jax.vmap(_all_finite, axis_size=len(updates.weight))((updates.shared, updates.experts))
    shared, of_slots = jax.tree.map(
        lambda leaf: jnp.where(_along(whole, leaf), leaf, 0.0), (updates.shared, updates.experts)
    )

    def weigh(values: PyTree, weight: Array) -> tuple[PyTree, Array]:
        total = weight.sum()
        # The tree is empty if clients keep all experts, or all other parameters, to themselves.
        middle = centre(values, weight) if jax.tree.leaves(values) else values
        return jax.tree.map(lambda leaf: total * leaf, middle), total

    def of_expert(layer: str, count: int) -> tuple[PyTree, Array]:
        usage = jnp.where(whole[:, None], updates.usage[layer], 0.0)

        def one(e: Array) -> tuple[PyTree, Array]:
            holds = updates.slots[layer] == e  # (P, K), at most one slot of each client
            slot, used = holds.argmax(axis=1), jnp.where(holds, usage, 0.0).sum(axis=1)
            rows = jnp.arange(len(slot))
            return weigh(jax.tree.map(lambda leaf: leaf[rows, slot], of_slots[layer]), used)

        return lax.map(one, jnp.arange(count, dtype=jnp.int32))

    found = {layer: of_expert(layer, due.holders[layer].shape[0]) for layer in of_slots}
    return Sums(
        *weigh(shared, jnp.where(whole, updates.weight, 0.0)),
        {layer: total for layer, (total, _) in found.items()},
        {layer: weight for layer, (_, weight) in found.items()},
    )


def trimmed_mean(trim: float) -> Aggregator:
    """Makes the coordinate-wise trimmed mean over clients (Yin et al. 2018, arXiv 1803.01498).

    Of the `n` values of a coordinate, the `⌈trim · n⌉` smallest and largest are left out, but one
    value always remains, or two if `n` is even. The remaining values are averaged with equal
    weight. `trim = 0.5` is the median. ψ is averaged over all clients that delivered, θ_e over the
    clients that used expert e. One or two values are averaged without trimming.

    Args:
      trim: fraction cut off at each end, in [0, 0.5].

    Raises:
      InputError: `trim` is out of range.
    """
    if not isinstance(trim, jax.core.Tracer):
        Aggregation.check(trim=trim)

    def centre(values: PyTree, weight: Array) -> PyTree:
        present = weight > 0
        count = present.sum(dtype=jnp.int32)
        # A product slightly above an integer, because of rounding, counts as this integer.
        wanted = jnp.ceil(trim * count.astype(jnp.float32) * (1 - 1e-6)).astype(jnp.int32)
        cut = jnp.minimum(wanted, jnp.maximum(count - 1, 0) // 2)
        rank = jnp.arange(len(weight), dtype=jnp.int32)
        inside = (rank >= cut) & (rank < count - cut)

        def average(leaf: Array) -> Array:
            ranked = jnp.sort(jnp.where(_along(present, leaf), leaf, jnp.inf), axis=0)
            kept = jnp.where(_along(inside, leaf), ranked, 0.0).sum(axis=0)
            return kept / jnp.maximum(count - 2 * cut, 1).astype(kept.dtype)

        return jax.tree.map(average, values)

    return collect(centre)


def geometric_median(steps: int = 8) -> Aggregator:
    """Makes the geometric median over clients (Pillutla et al. 2019, arXiv 1912.13445: RFA).

    This is the point with the least sum of distances to the updates, weighted by units (ψ) and by
    usage (θ_e, each expert separately). Smoothed Weiszfeld steps `v ← Σ β_c Δ_c / Σ β_c` with
    `β_c = w_c / max(|Δ_c - v|, ν)` find it. It is robust while faulty clients have less than half
    of the weight. The steps start at 0 (no change), where an update counts by its direction and not
    by its length. Of two updates, the result is therefore near the shorter; a single update is
    returned unchanged.

    Args:
      steps: number of Weiszfeld steps.
    """

    def centre(values: PyTree, weight: Array) -> PyTree:
        lengths = jax.vmap(optax.tree.norm)
        # ν is a tenth of the median length: an update of length 0 must not dominate the others.
        ranked = jnp.sort(jnp.where(weight > 0, lengths(values), jnp.inf))
        smooth = jnp.maximum(0.1 * ranked[jnp.maximum((weight > 0).sum() - 1, 0) // 2], 1e-12)

        def step(_: Array, middle: PyTree) -> PyTree:
            distance = lengths(jax.tree.map(lambda v, m: v - m[None], values, middle))
            pull = weight / jnp.maximum(distance, smooth)
            pull /= jnp.maximum(pull.sum(), 1e-30)
            zero = jax.tree.map(jnp.zeros_like, middle)
            return _add("p,p...->...", zero, pull, values)

        return lax.fori_loop(0, steps, step, jax.tree.map(lambda x: jnp.zeros_like(x[0]), values))

    return collect(centre)


def _along(clients: Array, leaf: Array) -> Array:
    """Reshapes (P,) so that it broadcasts to a leaf (P, ...)."""
    return clients.reshape(-1, *[1] * (leaf.ndim - 1))


def _all_finite(tree: PyTree) -> Array:
    return jnp.asarray([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)], bool).all()


def count_of(stack: PyTree) -> int:
    """Returns E of a stack of experts, leaves (E, ...)."""
    return int(jax.tree.leaves(stack)[0].shape[0])


def _add(contraction: str, totals: PyTree, weight: Array, updates: PyTree) -> PyTree:
    # Full precision: the default on accelerators would round the updates to 10 bits or fewer.
    product = partial(jnp.einsum, contraction, precision=lax.Precision.HIGHEST)

    def add(total: Array, update: Array) -> Array:
        return total + product(weight, update).astype(total.dtype)

    return jax.tree.map(add, totals, updates)
