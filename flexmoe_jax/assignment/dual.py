"""Assignments from prices, computed entirely on the device.

Every client takes its best `k_c` experts at the prices of `prices.py`. The few loads that are then
outside their bounds are repaired by the cheapest swaps. Everything here is pure JAX: it runs inside
a jitted training loop, and under `vmap` over seeds or layers.

Axis legend: `C` clients, `E` experts, `F` features in a client's descriptor, `K` expert slots.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.assignment.certificate import Prices
from flexmoe_jax.assignment.prices import ascend_prices, reduced_fitness
from flexmoe_jax.types import Array

# Loads are sums of floats. A bound counts as met if it is missed by less than this fraction of the
# mean weight.
_SLIP = 1e-3


class DualSolution(NamedTuple):
    """The result of `dual_assign`.

    Attributes:
      assignment: [C, E] bool; each client holds exactly `k_c` experts.
      value: `Σ Q x`, minus the diversity term.
      bound: upper bound on the value of any assignment within the load bounds.
      load: [E] load of each expert.
      prices: the prices that prove the bound.
    """

    assignment: Array
    value: Array
    bound: Array
    load: Array
    prices: Prices


def dual_assign(
    fitness: Array,
    capacity: Array | int,
    load_min: Array | float,
    load_max: Array | float,
    load_weight: Array | float = 1.0,
    descriptor: Array | None = None,
    diversity: Array | float = 0.0,
    slots: int | None = None,
) -> DualSolution:
    """Assigns experts to clients; pure, and works under `jit` and `vmap`.

    With a scalar `load_weight`, the load bounds are met whenever they can be. With other weights,
    single swaps repair the bounds as far as they can. In practice this leaves at most a fraction
    of one client's weight, without a guarantee: compare `load` with the bounds.

    Args:
      fitness: [C, E], of a floating type.
      capacity: [C] int, or a scalar for all clients.
      load_min: [E], or a scalar for all experts.
      load_max: [E], or a scalar for all experts; may be infinite.
      load_weight: a scalar, [C] or [C, E].
      descriptor: [C, F] features of each client, or None; only the deviation from the mean counts.
      diversity: γ ≥ 0, cost of one unit of `Σ_e Σ_f |Σ_c x_ce (d_cf - mean_f)|`.
      slots: a static upper limit on all capacities (smaller is faster); default E.
    """
    (clients, experts), dtype = fitness.shape, fitness.dtype
    capacity = jnp.broadcast_to(jnp.asarray(capacity, jnp.int32), clients)
    diversity = jnp.asarray(diversity, dtype)
    given = jnp.asarray(load_weight, dtype)
    equal = given.ndim == 0
    weight = jnp.broadcast_to(given[:, None] if given.ndim == 1 else given, fitness.shape)
    low, high = (
        jnp.broadcast_to(jnp.asarray(bound, dtype), experts) for bound in (load_min, load_max)
    )
    z = jnp.zeros((clients, 0), dtype) if descriptor is None else jnp.asarray(descriptor, dtype)
    z = z - z.mean(axis=0, keepdims=True)
    prices = ascend_prices(fitness, capacity.astype(dtype), low, high, weight, z, diversity, slots)
    reduced = reduced_fitness(fitness, weight, z, prices)
    held = _take_top(reduced, capacity, slots or experts)
    # Stay inside the bounds by a margin that covers the error of single precision.
    inset = 0.0 if equal else jnp.minimum(_SLIP * weight.mean(), 0.25 * (high - low))
    low_in, high_in = low + inset, high - inset
    # An expert with a nonzero price belongs at the bound of that price (complementary slackness).
    play = 0.0 if equal else weight.mean()
    low_at = jnp.where(prices.load > 0, jnp.maximum(low_in, high_in - play), low_in)
    high_at = jnp.where(prices.load < 0, jnp.minimum(high_in, low_in + play), high_in)
    # First move the loads towards those bounds, then repair the true bounds.
    held, _ = jax.lax.scan(
        lambda held, ends: (_mend(reduced, weight, *ends, held), None),
        held,
        (jnp.stack([low_at, low_in]), jnp.stack([high_at, high_in])),
    )
    if equal:
        held = _mend_by_paths(reduced, given, low, high, held)
    load = _load(weight, held)
    mix = jnp.abs(held.T.astype(dtype) @ z).sum()
    value = jnp.sum(jnp.where(held, fitness, 0.0), axis=1).sum() - diversity * mix
    bound = dual_bound(fitness, capacity, low, high, weight, z, prices, slots)
    return DualSolution(held, value, bound, load, prices)


def dual_bound(
    fitness: Array,
    capacity: Array,
    load_min: Array,
    load_max: Array,
    load_weight: Array,
    descriptor: Array,
    prices: Prices,
    slots: int | None = None,
) -> Array:
    """Computes a valid upper bound (scalar): `D(λ, u)` plus its possible rounding error."""
    reduced = reduced_fitness(fitness, load_weight, descriptor, prices)
    best = jax.lax.top_k(reduced, slots or reduced.shape[1])[0]
    taken = jnp.where(_filled(capacity, best.shape[1]), best, 0.0)
    of_clients = taken.sum(axis=1)
    of_bounds = _price_of_bounds(prices.load, load_min, load_max)
    magnitude = jnp.abs(taken).sum() + jnp.abs(of_bounds).sum()
    terms = taken.shape[0] ** 0.5 + taken.shape[1]
    error = 2 * terms * float(np.finfo(fitness.dtype).eps) * magnitude
    return _two_level_sum(of_clients) + of_bounds.sum() + error


def _take_top(score: Array, capacity: Array, slots: int) -> Array:
    """Takes each client's `k_c` experts of highest score; returns [C, E] bool."""
    _, best = jax.lax.top_k(score, slots)
    rows = jnp.arange(score.shape[0])[:, None]
    return jnp.zeros(score.shape, bool).at[rows, best].max(_filled(capacity, slots))


def _filled(capacity: Array, slots: int) -> Array:
    """Tells which of its slots a client fills: the first `k_c`; [C, K] bool."""
    return jnp.arange(slots, dtype=capacity.dtype)[None] < capacity[:, None]


def _load(weight: Array, held: Array) -> Array:
    return jnp.sum(jnp.where(held, weight, 0.0), axis=0)


def _ends(low: Array, high: Array, load: Array, slip: Array) -> tuple[Array, Array]:
    """Selects the experts that give and that take holders while a bound is violated.

    Overloaded experts give first, to all that have room. After that, all experts that can spare
    load give to the underloaded ones.
    """
    over, under = load > high + slip, load < low - slip
    gives = jnp.where(over.any(), over, (load > low + slip) & under.any())
    takes = jnp.where(over.any(), load < high - slip, under)
    return gives, takes


def _mend(worth: Array, weight: Array, low: Array, high: Array, held: Array) -> Array:
    """Applies each client's cheapest single swap, many clients at once, until no swap helps."""
    clients = worth.shape[0]
    slip = _SLIP * weight.mean()

    def propose(held: Array) -> tuple[Array, Array, Array, Array]:
        load = _load(weight, held)
        gives, takes = _ends(low, high, load, slip)
        leaves = held & gives[None] & (load[None] - weight >= (low - slip)[None])
        enters = ~held & takes[None] & (load[None] + weight <= (high + slip)[None])
        least = jnp.where(leaves, worth, jnp.inf)
        most = jnp.where(enters, worth, -jnp.inf)
        return load, least.min(axis=1) - most.max(axis=1), least.argmin(1), most.argmax(1)

    def more(state: tuple[Array, Array]) -> Array:
        return state[1]

    def round_of_swaps(state: tuple[Array, Array]) -> tuple[Array, Array]:
        held, _ = state
        load, cost, source, target = propose(held)
        rows = jnp.arange(clients)
        possible = jnp.isfinite(cost)
        out = jnp.where(possible, weight[rows, source], 0.0)
        into = jnp.where(possible, weight[rows, target], 0.0)
        left, entered = (
            _running_sum(source, cost, out),
            _running_sum(target, cost, into),
        )
        over = load > high + slip
        anyone_over = over.any()
        # Stop once the bound is met: the swap that crosses the bound is the last one.
        shed = jnp.where(anyone_over, load - high, jnp.inf)[source]
        fill = jnp.where(anyone_over, jnp.inf, low - load)[target]
        accept = (
            possible
            & (left - out < shed - slip)
            & (entered - into < fill - slip)
            & (left <= (load - low)[source] + slip)
            & (entered <= (high - load)[target] + slip)
        )
        # Writing the old value where a swap is refused leaves it unchanged.
        held = held.at[rows, source].set(held[rows, source] & ~accept)
        held = held.at[rows, target].set(held[rows, target] | accept)
        return held, accept.any()

    held, _ = jax.lax.while_loop(more, round_of_swaps, (held, jnp.array(True)))
    return held


def _running_sum(group: Array, order: Array, amount: Array) -> Array:
    """Computes running sums [C] of the amounts within each group, by increasing `order`."""
    index = jnp.arange(group.shape[0])
    sorted_group, _, by = jax.lax.sort((group, order, index), num_keys=2)
    first = jnp.concatenate([jnp.ones(1, bool), sorted_group[1:] != sorted_group[:-1]])

    # The sum restarts at every group: a running sum over all clients would lose precision.
    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    _, running = jax.lax.associative_scan(join, (first, amount[by]))
    return jnp.zeros_like(amount).at[by].set(running)


def _mend_by_paths(worth: Array, unit: Array, low: Array, high: Array, held: Array) -> Array:
    """Swaps along the cheapest path of experts, to repair bounds that single swaps could not.

    With equal weights, whenever the bounds can be met, there is a path from an expert that must
    give to one that may take. So the loop ends when every bound is met or no repair is possible.
    """
    experts = worth.shape[1]
    slip = _SLIP * unit

    def ends(held: Array) -> tuple[Array, Array]:
        return _ends(low, high, unit * held.sum(axis=0, dtype=unit.dtype), slip)

    def more(state: tuple[Array, Array]) -> Array:
        held, moved = state
        gives, takes = ends(held)
        return moved & gives.any() & takes.any()

    def follow(state: tuple[Array, Array]) -> tuple[Array, Array]:
        held, _ = state
        gives, takes = ends(held)
        cost, best = _swap_costs(worth, held)
        # A gain below single precision could turn a path into a loop.
        distance, before = _shortest_paths(cost, gives, 1e-6 * jnp.abs(worth).max())
        reachable = jnp.where(takes, distance, jnp.inf)
        last = reachable.argmin()

        def back(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            held, node, steps = state
            client = best[before[node], node]
            held = held.at[client, before[node]].set(False).at[client, node].set(True)
            return held, before[node], steps + 1

        def on_the_way(state: tuple[Array, Array, Array]) -> Array:
            _, node, steps = state
            return (before[node] >= 0) & (steps < experts)

        found = jnp.isfinite(reachable[last])
        start = (held, jnp.where(found, last, gives.argmax()), jnp.array(0))
        walked, _, _ = jax.lax.while_loop(on_the_way, back, start)
        return jnp.where(found, walked, held), found

    held, _ = jax.lax.while_loop(more, follow, (held, jnp.array(True)))
    return held


def _swap_costs(worth: Array, held: Array) -> tuple[Array, Array]:
    """Finds the lowest cost of moving one client from e to f, and that client: both [E, E]."""

    def row(e: Array) -> tuple[Array, Array]:
        possible = held[:, e][:, None] & ~held
        loss = jnp.where(possible, worth[:, e][:, None] - worth, jnp.inf)
        return loss.min(axis=0), loss.argmin(axis=0)

    return jax.lax.map(row, jnp.arange(worth.shape[1]))


def _shortest_paths(cost: Array, gives: Array, least: Array) -> tuple[Array, Array]:
    """Bellman-Ford: [E] length of the shortest path from any giving expert, and the expert before.

    A path counts as shorter only if it gains more than `least`.
    """

    def relax(_: int, found: tuple[Array, Array]) -> tuple[Array, Array]:
        distance, before = found
        through = distance[:, None] + cost
        shortest = through.min(axis=0)
        closer = shortest < distance - least
        closer |= jnp.isinf(distance) & jnp.isfinite(shortest)
        return (
            jnp.where(closer, shortest, distance),
            jnp.where(closer, through.argmin(axis=0), before),
        )

    start = (jnp.where(gives, 0.0, jnp.inf), jnp.full(gives.shape, -1))
    return jax.lax.fori_loop(0, gives.shape[0], relax, start)


def _price_of_bounds(load: Array, load_min: Array, load_max: Array) -> Array:
    above = jnp.where(load > 0, load_max * jnp.where(load > 0, load, 1.0), 0.0)
    below = jnp.where(load < 0, load_min * jnp.where(load < 0, load, 1.0), 0.0)
    return above + below


def _two_level_sum(values: Array) -> Array:
    """Sums blocks of about √C first, so that rounding errors grow with √C instead of C."""
    block = max(1, int(values.shape[0] ** 0.5))
    padded = jnp.pad(values, (0, -values.shape[0] % block))
    return padded.reshape(-1, block).sum(axis=1).sum()
