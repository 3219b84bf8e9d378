"""Computes a stack of experts: all of them on every example, or each on its own examples.

The second form sorts the examples by expert and goes through them in blocks of one expert. So its
work does not grow with the stack, only with the experts that an example uses. No example is
dropped: the number of blocks is data. It runs on CPUs.

Axes: `B` examples or tokens, `D` features, `H` hidden units, `E` experts, `N` rows: one for each
example and each of the experts that it uses, and a block more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from flexmoe_jax.models.dense import kernel_gradient, product, unless_vmapped
from flexmoe_jax.types import Array, PyTree

# Rows of a block; and the part of all pairs of example and expert up to which it pays to compute
# them alone. On average, half a block of each expert is empty.
_BLOCK, _WORTH = 32, 0.6


def expert_mlp(
    experts: PyTree, x: Float[Array, "B D"], combine: Float[Array, "B E"], top_k: int = 0
) -> Float[Array, "B D"]:
    """Computes Σ_e combine_e · expert_e(x) for stacked experts D→H→D.

    Args:
      experts: `{"w_in": (E, D, H), "b_in": (E, H), "w_out": (E, H, D), "b_out": (E, D)}`.
      x: (B, D).
      combine: (B, E) weights of the experts, 0 for those that an example does not use.
      top_k: the most experts that an example uses, 0 if it is not known. If it is known, and few
        against E, a CPU computes only those; weights of 0 then get no gradient.

    Returns:
      (B, D).
    """
    if top_k and _pays(x, combine.shape[1], top_k):
        return _own_rows(experts, x, combine, top_k)
    return _all_pairs(experts, x, combine)


def _pays(x: Array, experts: int, top_k: int) -> bool:
    """Whether `_own_rows` is faster than `_all_pairs` (docs/speed.md)."""
    # The size is unknown while a model is exported, to any platform.
    if jax.default_backend() != "cpu" or x.dtype != jnp.float32 or not isinstance(x.shape[0], int):
        return False
    return x.shape[0] * top_k + experts * _BLOCK / 2 <= _WORTH * x.shape[0] * experts


def _all_pairs(experts: PyTree, x: Array, combine: Array) -> Array:
    """Computes all experts on all examples.

    Side by side, the experts form one layer of E·H hidden units, and each example weights the units
    by expert. This takes two matrix products, whatever the number of experts.
    """
    count, features, width = experts["w_in"].shape
    w_in = jnp.swapaxes(experts["w_in"], 0, 1).reshape(features, count * width)
    hidden = jax.nn.relu(product(x, w_in) + experts["b_in"].reshape(1, -1))
    # In the type of the weights, because their gradient is a sum over hidden units.
    weighed = hidden.astype(combine.dtype).reshape(-1, count, width) * combine[:, :, None]
    w_out = experts["w_out"].reshape(count * width, features)
    output = product(weighed.reshape(-1, count * width).astype(x.dtype), w_out)
    return output + combine.astype(x.dtype) @ experts["b_out"]


class _Rows(NamedTuple):
    """Examples sorted by expert.

    Attributes:
      x: (N, D).
      weight: (N,).
      expert: (B, top_k) the experts of each example.
      place: (B·top_k,) where the row of each example and expert is.
      order: (B·top_k,) the inverse of `place`.
      start: (E,) an expert's first row.
      end: (E,) the row after its last.
    """

    x: Array
    weight: Array
    expert: Array
    place: Array
    order: Array
    start: Array
    end: Array


def _sort(x: Array, combine: Array, top_k: int) -> _Rows:
    weight, expert = lax.top_k(combine, top_k)
    order = jnp.argsort(expert.ravel(), stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    end = jnp.cumsum(jnp.bincount(expert.ravel(), length=combine.shape[1])).astype(order.dtype)
    start = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])
    return _Rows(
        _spread(x, order, top_k),
        _spread(weight.ravel(), order, 1),
        expert,
        place,
        order,
        start,
        end,
    )


def _spread(values: Array, order: Array, top_k: int) -> Array:
    """Lays out the rows of (B, ...) by expert, (N, ...)."""
    rows = values.at[order // top_k].get(mode="promise_in_bounds")
    return jnp.pad(rows, ((0, _BLOCK),) + ((0, 0),) * (rows.ndim - 1))


def _gather(rows: Array, place: Array, top_k: int) -> Array:
    """Lays out rows (N, ...) by example, (B, top_k, ...)."""
    found = rows.at[place].get(mode="promise_in_bounds")
    return found.reshape(-1, top_k, *rows.shape[1:])


def _block(values: Array, at: Array) -> Array:
    return lax.dynamic_slice_in_dim(values, at, _BLOCK)


def _in_blocks(start: Array, end: Array, body: Callable[[Array, Any], Any], state: Any) -> Any:
    """Carries the state through an expert's blocks.

    The last one reaches into the rows of the next expert, which comes after and writes these anew.
    """
    blocks = (end - start + _BLOCK - 1) // _BLOCK
    return lax.fori_loop(0, blocks, lambda n, state: body(start + n * _BLOCK, state), state)


def _write(values: Array, block: Array, at: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(values, block, at, 0)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _own_rows(experts: PyTree, x: Array, combine: Array, top_k: int) -> Array:
    """Computes each expert on its own examples; all pairs under `jax.vmap`."""
    return _forward(experts, x, combine, top_k)[0]


def _forward(
    experts: PyTree, x: Array, combine: Array, top_k: int
) -> tuple[Array, tuple[PyTree, Array, Array, tuple[_Rows, Array]]]:
    width = experts["b_in"].shape[1]

    def alone(experts: PyTree, x: Array, combine: Array) -> tuple[Array, tuple[_Rows, Array]]:
        rows = _sort(x, combine, top_k)

        def of_expert(state: tuple[Array, Array], of: Any) -> tuple[tuple[Array, Array], None]:
            expert, start, end = of

            def body(at: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
                hidden = jax.nn.relu(_block(rows.x, at) @ expert["w_in"] + expert["b_in"])
                output = hidden @ expert["w_out"] + expert["b_out"]
                output = (output * _block(rows.weight, at)[:, None]).astype(x.dtype)
                return _write(state[0], output, at), _write(state[1], hidden, at)

            return _in_blocks(start, end, body, state), None

        begun = jnp.zeros_like(rows.x), jnp.zeros((rows.x.shape[0], width), x.dtype)
        (output, hidden), _ = lax.scan(of_expert, begun, (experts, rows.start, rows.end))
        return _gather(output, rows.place, top_k).sum(axis=1), (rows, hidden)

    def vmapped(experts: PyTree, x: Array, combine: Array) -> tuple[Array, Any]:
        kept = jax.eval_shape(alone, experts, x, combine)[1]
        unused = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), kept)
        return _all_pairs(experts, x, combine), unused

    output, kept = unless_vmapped(alone, vmapped)(experts, x, combine)
    return output, (experts, x, combine, kept)


def _backward(
    top_k: int, residuals: tuple[PyTree, Array, Array, tuple[_Rows, Array]], dy: Array
) -> tuple[PyTree, Array, Array]:
    def alone(experts: PyTree, x: Array, combine: Array, kept: Any, dy: Array) -> Any:
        rows, hidden = kept
        into_rows, ahead = _spread(dy, rows.order, top_k), jnp.arange(_BLOCK)
        # Laid out anew, once for all blocks.
        back = lax.optimization_barrier(
            {name: experts[name].swapaxes(1, 2) for name in ("w_in", "w_out")}
        )

        def of_expert(state: tuple[Array, Array], of: Any) -> tuple[tuple[Array, Array], PyTree]:
            expert, back, start, end = of

            def body(at: Array, state: tuple[Array, Array, PyTree]) -> tuple[Array, Array, PyTree]:
                to_x, to_weight, slope = state
                d, h = _block(into_rows, at), _block(hidden, at)
                own = at + ahead < end
                weight = jnp.where(own, _block(rows.weight, at), 0.0)[:, None]
                d_hidden = d @ back["w_out"]
                d_weight = (d_hidden * h).sum(axis=1) + d @ expert["b_out"]
                d_hidden, d = jnp.where(h > 0, weight * d_hidden, 0.0), weight * d
                step = {
                    "w_in": kernel_gradient(_block(rows.x, at), d_hidden),
                    "b_in": d_hidden.sum(axis=0),
                    "w_out": kernel_gradient(h, d),
                    "b_out": d.sum(axis=0),
                }
                to_x = _write(to_x, d_hidden @ back["w_in"], at)
                return to_x, _write(to_weight, d_weight, at), jax.tree.map(jnp.add, slope, step)

            none = jax.tree.map(jnp.zeros_like, expert)
            to_x, to_weight, slope = _in_blocks(start, end, body, (*state, none))
            return (to_x, to_weight), slope

        begun = jnp.zeros_like(rows.x), jnp.zeros_like(rows.weight)
        of_experts = experts, back, rows.start, rows.end
        (to_x, to_weight), slope = lax.scan(of_expert, begun, of_experts)
        d_combine = _gather(to_weight, rows.place, top_k)[:, :, None] * jax.nn.one_hot(
            rows.expert, combine.shape[1], dtype=combine.dtype
        )
        used = jnp.where(combine != 0, d_combine.sum(axis=1), 0.0)
        return slope, _gather(to_x, rows.place, top_k).sum(axis=1), used

    def vmapped(experts: PyTree, x: Array, combine: Array, kept: Any, dy: Array) -> Any:
        slope, d_x, d_combine = jax.vjp(_all_pairs, experts, x, combine)[1](dy)
        return slope, d_x, jnp.where(combine != 0, d_combine, 0.0)

    found: tuple[PyTree, Array, Array] = unless_vmapped(alone, vmapped)(*residuals, dy)
    return found


_own_rows.defvjp(_forward, _backward)
