"""Prices on expert load: the Lagrangian dual of the assignment, minimised on the device.

    D(λ, u) = Σ_c max { Σ_e (Q_ce - w_ce λ_e - z_c·u_e) x_ce : Σ_e x_ce = k_c, 0 ≤ x ≤ 1 }
              + Σ_e (L_e^max λ_e⁺ - L_e^min λ_e⁻),       |u| ≤ γ

is an upper bound on the assignment's worth at any λ and u (weak duality); its least value is the
relaxation's optimum. `u` prices the mix of an expert's holders: `γ |S| = max {u·S : |u| ≤ γ}`.

D is piecewise linear. It is smoothed with an entropy of temperature τ, which turns each choice
into a sigmoid, and minimised by Newton steps in λ and in the clients' thresholds t together (the
thresholds' block is diagonal and is eliminated), while τ falls. Most steps run on a sample of the
clients, since prices belong to the experts and a sample knows them nearly as well.

Axis legend: `C` clients, `E` experts, `F` numbers that describe a client, `K` expert slots.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax.types import Array

_COARSE, _FINE = 1e-2, 1e-4
_COARSE_STEPS, _FINE_STEPS = 24, 12
# A step moves no price further than this many temperatures: Newton's model is good that far.
_TRUST = 3.0


class Prices(NamedTuple):
    """Dual variables.

    Attributes:
      load: [E] λ, worth per unit of load.
      mix: [E, F] u, worth per unit of the holders' deviation from the population.
    """

    load: Array
    mix: Array


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
    """Nearly optimal prices; pure, jit-able and vmappable.

    Args:
      fitness: [C, E], of a floating type.
      capacity: [C].
      load_min: [E].
      load_max: [E]; may be infinite.
      load_weight: [C, E].
      descriptor: [C, F] deviations `z` from the population's mean; F may be 0.
      diversity: γ ≥ 0, worth of one unit of the holders' deviation.
      slots: a static number that no capacity exceeds (the smaller the faster); default E.
    """
    clients, _ = fitness.shape
    dtype = fitness.dtype
    tiny = float(np.finfo(dtype).tiny)
    centred = fitness - fitness.mean(axis=1, keepdims=True)
    span = jnp.maximum(jnp.max(jnp.abs(centred)) * 2, tiny**0.5)
    unit = jnp.maximum(load_weight.mean(), tiny**0.5)
    worth, weight = centred / span, (load_weight / unit).astype(dtype)
    low, high = _consistent(capacity, load_min / unit, load_max / unit, weight)
    share = jnp.asarray(diversity, dtype) / span
    start = Prices(jnp.zeros_like(low), jnp.zeros((low.shape[0], descriptor.shape[1]), dtype))

    stride = max(1, min(16, clients // 512))
    part = slice(None, None, stride)
    scale = jnp.sum(weight[part].mean(1) * capacity[part]) / jnp.maximum(
        jnp.sum(weight.mean(1) * capacity), tiny
    )
    coarse = jnp.geomspace(0.5, _COARSE, _COARSE_STEPS, dtype=dtype)
    fine = jnp.geomspace(_COARSE, _FINE, _FINE_STEPS, dtype=dtype)
    sample = (worth[part], capacity[part], low * scale, high * scale, weight[part])
    prices = _newton(*sample, descriptor[part], share, slots, start, coarse)
    prices = _newton(worth, capacity, low, high, weight, descriptor, share, slots, prices, fine)
    # Below the last temperature a price is noise, and nil is the one that leaves bounds free.
    load = jnp.where(jnp.abs(prices.load) > _FINE, prices.load, 0.0)
    return Prices(load * span / unit, prices.mix * span)


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
    """`D(λ, u)` plus what rounding may have taken from the sum: a valid upper bound, scalar."""
    reduced = reduced_fitness(fitness, load_weight, descriptor, prices)
    best = jax.lax.top_k(reduced, slots or reduced.shape[1])[0]
    taken = jnp.where(jnp.arange(best.shape[1]) < capacity[:, None], best, 0.0)
    of_clients = taken.sum(axis=1)
    of_bounds = _price_of_bounds(prices.load, load_min, load_max)
    magnitude = jnp.abs(taken).sum() + jnp.abs(of_bounds).sum()
    terms = taken.shape[0] ** 0.5 + taken.shape[1]
    error = 2 * terms * float(np.finfo(fitness.dtype).eps) * magnitude
    return _two_level_sum(of_clients) + of_bounds.sum() + error


def reduced_fitness(fitness: Array, load_weight: Array, descriptor: Array, prices: Prices) -> Array:
    """What is left of the fitness, [C, E], once load and mix are paid for."""
    return fitness - load_weight * prices.load - descriptor @ prices.mix.T


def _price_of_bounds(load: Array, load_min: Array, load_max: Array) -> Array:
    above = jnp.where(load > 0, load_max * jnp.where(load > 0, load, 1.0), 0.0)
    below = jnp.where(load < 0, load_min * jnp.where(load < 0, load, 1.0), 0.0)
    return above + below


def _two_level_sum(values: Array) -> Array:
    """Sums blocks of about √C first, so that rounding errors grow with √C instead of C."""
    block = max(1, int(values.shape[0] ** 0.5))
    padded = jnp.pad(values, (0, -values.shape[0] % block))
    return padded.reshape(-1, block).sum(axis=1).sum()


def _consistent(
    capacity: Array, load_min: Array, load_max: Array, weight: Array
) -> tuple[Array, Array]:
    """Bounds brought within reach, and to sums that enclose the load that there is to share."""
    reach = jnp.sum(weight * (capacity > 0)[:, None], axis=0)
    low, high = jnp.clip(load_min, 0.0, reach), jnp.clip(load_max, 0.0, reach)
    total, experts = jnp.sum(weight.mean(axis=1) * capacity), low.shape[0]
    low = low - jnp.maximum(low.sum() - total, 0.0) / experts
    high = high + jnp.maximum(total - high.sum(), 0.0) / experts
    return low, high


def _newton(
    worth: Array,
    capacity: Array,
    low: Array,
    high: Array,
    weight: Array,
    descriptor: Array,
    share: Array,
    slots: int | None,
    start: Prices,
    temperatures: Array,
) -> Prices:
    """One Newton step on the smoothed dual for each temperature in turn."""
    experts = worth.shape[1]
    # Clients with nothing to choose have no threshold; they only add a constant load.
    choosing = ((capacity > 0) & (capacity < experts)).astype(worth.dtype)
    constant = jnp.sum(weight * ((capacity == experts).astype(worth.dtype))[:, None], axis=0)
    wanted = capacity * choosing
    reduced = reduced_fitness(worth, weight, descriptor, start)
    ordered = jax.lax.top_k(reduced, min(experts, (slots or experts) + 1))[0]
    last = jnp.clip(capacity - 1, 0, ordered.shape[1] - 1)[:, None]
    after = jnp.clip(capacity, 0, ordered.shape[1] - 1)[:, None]
    threshold = 0.5 * (
        jnp.take_along_axis(ordered, last, 1) + jnp.take_along_axis(ordered, after, 1)
    )

    def step(state: tuple[Prices, Array], tau: Array) -> tuple[tuple[Prices, Array], None]:
        (load, mix), t = state
        z = (worth - weight * load - descriptor @ mix.T - t[:, None]) / tau
        p = jax.nn.sigmoid(z) * choosing[:, None]
        slope = p * (1 - p) / tau
        pull = weight * slope
        soft = jax.nn.sigmoid(load / tau)
        grad_load = low + (high - low) * soft - constant - jnp.sum(weight * p, axis=0)
        grad_t = wanted - p.sum(axis=1)
        curve_t = slope.sum(axis=1) + 1e-6
        diagonal = jnp.sum(weight * pull, axis=0) + (high - low) * soft * (1 - soft) / tau
        schur = jnp.diag(diagonal) - (pull / curve_t[:, None]).T @ pull
        schur += jnp.eye(experts) * (1e-4 * diagonal.mean() + 1e-9)
        move = -jnp.linalg.solve(schur, grad_load - pull.T @ (grad_t / curve_t))
        move = jnp.clip(move, -_TRUST * tau, _TRUST * tau)
        move_t = -(grad_t + pull @ move) / curve_t
        t = t + jnp.clip(move_t, -_TRUST * tau, _TRUST * tau)
        if descriptor.shape[1]:
            # The mix's own curvature, without the cross terms: half a step stays on the safe side.
            curve = slope.T @ descriptor**2 + 1e-6
            shift = 0.5 * ((p.T @ descriptor) / curve)
            shift = jnp.clip(shift, -_TRUST * tau, _TRUST * tau)
            mix = jnp.clip(mix + shift, -share, share)
        return (Prices(load + move, mix), t), None

    (prices, _), _ = jax.lax.scan(step, (start, threshold[:, 0]), temperatures)
    return prices
