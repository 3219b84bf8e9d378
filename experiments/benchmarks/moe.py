"""Suite `moe`: the cost of a mixture of experts, and three ways to compute its experts.

The line `client` has the seconds of training on one example, with experts and gate and without them
(same backbone and head), and their ratio. The lines `layer` have the seconds of the expert layer
alone, forward and backward with top-1 routing, on one device. `dense` computes every expert on
every example, `ragged` computes each expert on its own examples, with `lax.ragged_dot`.
`chosen` is what the framework does: `dense`, or each expert on its own examples in blocks.
`ratio` is `chosen` over `dense`; `held` is K, `batch` is B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.process import Figures, refuse_words
from experiments.benchmarks.timing import compiled, interleave, set_up
from experiments.benchmarks.workloads import WORKLOADS, Workload, make_rounds
from flexmoe_jax.models import expert_mlp
from flexmoe_jax.simulation import client_mesh
from flexmoe_jax.types import Array, PyTree

_FEATURES, _HIDDEN = 64, 128
_HELD, _BATCHES = (2, 4, 8), (16, 64, 512)
_REPEATS = 200

Layer = Callable[[PyTree, Array, Array, Array], Array]
"""(experts, leaves (K, ...), x (B, D), chosen expert (B,), its probability (B,)) -> (B, D)."""


def run(words: list[str]) -> Iterator[Figures]:
    """Yields the figures of a client, then those of the layer by K and B.

    Raises:
      InputError: words are given.
    """
    refuse_words("moe", words)
    set_up()
    yield measure_client(WORKLOADS["M1"], WORKLOADS["W4"])
    for held in _HELD:
        for batch in _BATCHES:
            yield measure_layer(held, batch)


def measure_client(mixture: Workload, plain: Workload) -> Figures:
    """Times rounds of two workloads that differ only in their experts."""
    mesh = client_mesh()
    both = interleave([make_rounds(mixture, mesh), make_rounds(plain, mesh)])
    examples = plain.clients * plain.examples
    seconds, without = (min(taken) / examples for taken in both)
    return {
        "suite": "moe",
        "case": "client",
        "seconds_per_example": seconds,
        "seconds_per_example_without_experts": without,
        "ratio": seconds / without,
        "devices": mesh.size,
    }


def measure_layer(held: int, batch: int, repeats: int = _REPEATS) -> Figures:
    """Times the forms of the layer (D 64, H 128) in a loop of `repeats` gradient steps."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    experts = {
        "w_in": draw(held, _FEATURES, _HIDDEN) / 8,
        "b_in": draw(held, _HIDDEN),
        "w_out": draw(held, _HIDDEN, _FEATURES) / 8,
        "b_out": draw(held, _FEATURES),
    }
    chosen = rng.integers(0, held, batch, np.int32)
    start = experts, draw(batch, _FEATURES), rng.random(batch, np.float32)

    def train(layer: Layer) -> Callable[[], object]:
        def steps(start: tuple[PyTree, Array, Array]) -> tuple[PyTree, Array, Array]:
            def step(_: Array, state: tuple[PyTree, Array, Array]) -> tuple[PyTree, Array, Array]:
                def loss(experts: PyTree, x: Array, probability: Array) -> Array:
                    return (layer(experts, x, jnp.asarray(chosen), probability) ** 2).mean()

                slope = jax.grad(loss, (0, 1, 2))(*state)
                moved: tuple[PyTree, Array, Array] = jax.tree.map(
                    lambda value, change: value - 1e-3 * change, state, slope
                )
                return moved

            return lax.fori_loop(0, repeats, step, start)

        return compiled(steps, start)

    taken = interleave([train(dense_layer), train(ragged_layer), train(chosen_layer)])
    dense, ragged, chose = (min(seconds) / repeats for seconds in taken)
    return {
        "suite": "moe",
        "case": "layer",
        "held": held,
        "batch": batch,
        "features": _FEATURES,
        "hidden": _HIDDEN,
        "dense_seconds": dense,
        "ragged_seconds": ragged,
        "chosen_seconds": chose,
        "ratio": chose / dense,
    }


def dense_layer(experts: PyTree, x: Array, chosen: Array, probability: Array) -> Array:
    """Computes every expert on every example."""
    combine = probability[:, None] * jax.nn.one_hot(chosen, experts["b_in"].shape[0])
    return expert_mlp(experts, x, combine)


def chosen_layer(experts: PyTree, x: Array, chosen: Array, probability: Array) -> Array:
    """Computes the experts in the form that the sizes call for, as `MoELayer` does."""
    combine = probability[:, None] * jax.nn.one_hot(chosen, experts["b_in"].shape[0])
    return expert_mlp(experts, x, combine, top_k=1)


def ragged_layer(experts: PyTree, x: Array, chosen: Array, probability: Array) -> Array:
    """Computes each expert only on the examples routed to it, after sorting them by expert."""
    order = jnp.argsort(chosen)
    owner = chosen[order]
    sizes = jnp.bincount(chosen, length=experts["b_in"].shape[0])
    hidden = lax.ragged_dot(x[order], experts["w_in"], sizes) + experts["b_in"][owner]
    output = lax.ragged_dot(jax.nn.relu(hidden), experts["w_out"], sizes) + experts["b_out"][owner]
    weighted = probability[order, None] * output
    return jnp.zeros_like(weighted).at[order].set(weighted, unique_indices=True)
