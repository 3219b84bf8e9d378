"""Prices on expert load, found by minimising the Lagrangian dual of the assignment problem.

    D(λ, u) = Σ_c max { Σ_e (Q_ce - w_ce λ_e - z_c·u_e) x_ce : Σ_e x_ce = k_c, 0 ≤ x ≤ 1 }
              + Σ_e (L_e^max λ_e⁺ - L_e^min λ_e⁻),       |u| ≤ γ

is an upper bound on the value of an assignment for any λ and u (weak duality). Its minimum is the
relaxation's optimum. `u` prices the mix of an expert's holders: `γ |S| = max {u·S : |u| ≤ γ}`.

D is piecewise linear. It is smoothed with an entropy of temperature τ, which turns each choice
into a sigmoid. Newton steps minimise it jointly in λ and in the clients' thresholds t while τ
decreases. (The thresholds' block is diagonal and is eliminated.) Most steps run on a sample of the
clients: prices belong to the experts, and a sample determines them nearly as well.

The code gets the namespace from its arrays (the Python array API standard). NumPy processes NumPy
arrays, without JAX in memory. JAX processes JAX arrays, inside a jitted program or under `vmap`.

Axis legend: `C` clients, `E` experts, `F` features in a client's descriptor, `K` expert slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flexmoe_jax.assignment.certificate import Prices, effective_bounds
from flexmoe_jax.assignment.problem import FloatArray, Problem
from flexmoe_jax.assignment.tiles import gram, solve_symmetric

Array = Any  # numpy.ndarray or jax.Array

# Of each stage: the sample (every n-th client), first and last temperature, and number of steps.
_STAGES = ((16, 0.5, 1e-2, 16), (4, 1e-2, 3e-3, 4), (1, 3e-3, 1e-4, 8))
_FINE = _STAGES[-1][2]
# Smallest sample of clients, enough to estimate prices; and pairs that fit into a core's cache.
_SAMPLE, _CACHED = 512, 2**16
# A step moves no price by more than this many temperatures: Newton's model is accurate that far.
_TRUST = 3.0


def ascend_prices(
    fitness: Array,
    capacity: Array,
    load_min: Array,
    load_max: Array,
    load_weight: Array,
    descriptor: Array,
    diversity: Array | float = 0.0,
    slots: int | None = None,
) -> Prices:
    """Computes nearly optimal prices; pure, and with JAX arrays works under `jit` and `vmap`.

    Args:
      fitness: [C, E], of a floating type.
      capacity: [C], of a floating type: the type of sums over all clients.
      load_min: [E].
      load_max: [E]; may be infinite.
      load_weight: [C, E].
      descriptor: [C, F] deviations `z` from the population's mean; F may be 0.
      diversity: γ ≥ 0, cost of one unit of the holders' deviation.
      slots: a static upper limit on all capacities (smaller is faster); default E.
    """
    xp = fitness.__array_namespace__()
    clients, _ = fitness.shape
    dtype = fitness.dtype
    tiny = float(np.finfo(dtype).tiny)
    centred = fitness - fitness.mean(axis=1, keepdims=True)
    span = xp.maximum(xp.max(xp.abs(centred)) * 2, tiny**0.5)
    unit = xp.maximum(load_weight.mean(), tiny**0.5)
    worth, weight = centred / span, (load_weight / unit).astype(dtype)
    low, high = _consistent(capacity, load_min / unit, load_max / unit, weight)
    share = xp.asarray(diversity, dtype=dtype) / span
    prices = Prices(xp.zeros_like(low), xp.zeros((low.shape[0], descriptor.shape[1]), dtype=dtype))
    total = xp.maximum(xp.sum(weight.mean(axis=1) * capacity), tiny)
    for most, warm, cold, steps in _STAGES:
        part = slice(None, None, max(1, min(most, clients // _SAMPLE)))
        scale = xp.sum(weight[part].mean(axis=1) * capacity[part]) / total
        sample = _Sample(
            worth[part],
            capacity[part],
            low * scale,
            high * scale,
            weight[part],
            descriptor[part],
            share,
        )
        temperatures = np.geomspace(warm, cold, steps).astype(dtype)
        prices = _newton(sample, slots, prices, temperatures)
    # A price below the last temperature is noise. Zero leaves the load free within its bounds.
    load = xp.where(xp.abs(prices.load) > _FINE, prices.load, 0.0)
    return Prices(load * span / unit, prices.mix * span)


def estimate_prices(problem: Problem) -> FloatArray:
    """Computes nearly optimal prices [E] per unit of load with NumPy, in single precision."""
    low, high = effective_bounds(problem)
    prices = ascend_prices(
        problem.fitness.astype(np.float32),
        problem.capacity.astype(np.float64),
        low.astype(np.float32),
        high.astype(np.float32),
        np.broadcast_to(problem.weights.astype(np.float32), problem.fitness.shape),
        problem.deviation.astype(np.float32),
        problem.diversity,
        max(1, int(problem.capacity.max(initial=0))),
    )
    return np.asarray(prices.load, np.float64)


def reduced_fitness(fitness: Array, load_weight: Array, descriptor: Array, prices: Prices) -> Array:
    """Computes the fitness, [C, E], minus the prices of load and mix."""
    reduced = fitness - load_weight * prices.load[None]
    return reduced - gram(descriptor.T, prices.mix.T) if descriptor.shape[1] else reduced


def _consistent(
    capacity: Array, load_min: Array, load_max: Array, weight: Array
) -> tuple[Array, Array]:
    """Moves the bounds into the reachable range, and so that their sums enclose the total load."""
    xp = weight.__array_namespace__()
    reach = xp.sum(xp.where(capacity[:, None] > 0, weight, 0.0), axis=0)
    low, high = xp.clip(load_min, 0.0, reach), xp.clip(load_max, 0.0, reach)
    total, experts = xp.sum(weight.mean(axis=1) * capacity), low.shape[0]
    low = low - xp.maximum(low.sum() - total, 0.0) / experts
    high = high + xp.maximum(total - high.sum(), 0.0) / experts
    return low, high


class _Sample(NamedTuple):
    """The data of the dual problem of a sample of clients, in units near 1.

    Attributes:
      worth: [C, E] fitness.
      capacity: [C].
      low: [E] minimum load, scaled to these clients.
      high: [E] maximum load, scaled to these clients.
      weight: [C, E] load of each holder.
      descriptor: [C, F].
      share: maximum of a price of the mix.
    """

    worth: Array
    capacity: Array
    low: Array
    high: Array
    weight: Array
    descriptor: Array
    share: Array


def _newton(sample: _Sample, slots: int | None, start: Prices, temperatures: Array) -> Prices:
    """Takes one Newton step on the smoothed dual for each temperature in turn."""
    worth, capacity, low, high, weight, descriptor, share = sample
    xp = worth.__array_namespace__()
    experts = worth.shape[1]
    # Clients without a choice have no threshold; they only add a constant load.
    choosing = ((capacity > 0) & (capacity < experts)).astype(worth.dtype)
    constant = xp.sum(weight * ((capacity == experts).astype(worth.dtype))[:, None], axis=0)
    wanted = capacity * choosing
    reduced = reduced_fitness(worth, weight, descriptor, start)
    threshold = _thresholds(reduced, capacity, slots or experts)

    def step(state: tuple[Prices, Array], tau: Array) -> tuple[Prices, Array]:
        (load, mix, _), t = state
        soft = _sigmoid(load / tau)
        grad_load = low + (high - low) * soft - constant
        schur = xp.diag((high - low) * soft * (1 - soft) / tau)
        pulls, moves = [], []
        mixed, curve = xp.zeros_like(mix), xp.zeros_like(mix)
        for block in _blocks(worth):
            w, z = weight[block], descriptor[block]
            reduced = reduced_fitness(worth[block], w, z, Prices(load, mix))
            p = _sigmoid((reduced - t[block, None]) / tau) * choosing[block, None]
            slope = p * (1 - p) / tau
            pull = w * slope
            grad_t = wanted[block] - p.sum(axis=1)
            curve_t = slope.sum(axis=1) + 1e-6
            eased = pull / curve_t[:, None]
            grad_load = (
                grad_load - xp.einsum("ce,ce->e", w, p) - xp.einsum("ce,c->e", eased, grad_t)
            )
            schur = schur + xp.diag(xp.einsum("ce,ce->e", w, pull)) - gram(eased, pull)
            pulls.append(eased)
            moves.append(-grad_t / curve_t)
            if descriptor.shape[1]:
                mixed = mixed + gram(p, z)
                curve = curve + gram(slope, z**2)
        ridge = 1e-4 * xp.trace(schur) / experts + 1e-9
        move = -solve_symmetric(schur + ridge * xp.eye(experts, dtype=worth.dtype), grad_load)
        move = xp.clip(move, -_TRUST * tau, _TRUST * tau)
        move_t = xp.concat(
            [of - xp.einsum("ce,e->c", eased, move) for of, eased in zip(moves, pulls, strict=True)]
        )
        t = t + xp.clip(move_t, -_TRUST * tau, _TRUST * tau)
        if descriptor.shape[1]:
            # Only the mix's own curvature, without the cross terms; half a step keeps this safe.
            shift = xp.clip(0.5 * mixed / (curve + 1e-6), -_TRUST * tau, _TRUST * tau)
            mix = xp.clip(mix + shift, -share, share)
        return Prices(load + move, mix), t

    return _scan(step, (start, threshold), temperatures)[0]


def _thresholds(reduced: Array, capacity: Array, slots: int) -> Array:
    """Computes the midpoint [C] between each client's worst taken and best rejected expert."""
    xp = reduced.__array_namespace__()
    ordered = _largest(reduced, min(reduced.shape[1], slots + 1))
    place = capacity.astype(xp.int32)[:, None]
    last = xp.clip(place - 1, 0, ordered.shape[1] - 1)
    after = xp.clip(place, 0, ordered.shape[1] - 1)
    ends = xp.take_along_axis(ordered, last, axis=1) + xp.take_along_axis(ordered, after, axis=1)
    return 0.5 * ends[:, 0]


def _blocks(values: Array) -> list[slice]:
    """Splits the rows into blocks that stay in cache with NumPy; XLA needs no blocks."""
    rows, columns = values.shape
    height = max(1, _CACHED // columns) if isinstance(values, np.ndarray) else max(1, rows)
    return [slice(first, first + height) for first in range(0, max(1, rows), height)]


def _sigmoid(z: Array) -> Array:
    return 0.5 * (1 + z.__array_namespace__().tanh(0.5 * z))


def _largest(values: Array, count: int) -> Array:
    """Returns the `count` largest values of each row in decreasing order."""
    if isinstance(values, np.ndarray):
        largest = -np.partition(-values, count - 1, axis=1)[:, :count]
        return -np.sort(-largest, axis=1)
    import jax

    return jax.lax.top_k(values, count)[0]


def _scan(step: Callable[[Any, Array], Any], state: Any, temperatures: FloatArray) -> Any:
    """Carries the state through one step for each temperature."""
    if isinstance(state[1], np.ndarray):
        for tau in temperatures:
            state = step(state, tau)
        return state
    import jax

    return jax.lax.scan(lambda state, tau: (step(state, tau), None), state, temperatures)[0]
