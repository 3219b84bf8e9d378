"""Whole models as experts: a client holds one model and trains all of it.

Axis legend: `B` batch, `E` whole models, `K` slots of a client.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from flexmoe_jax.errors import InputError
from flexmoe_jax.models.model import Held, Model, Routings
from flexmoe_jax.models.moe import route
from flexmoe_jax.models.ownership import EXPERT, GATE, ROOT, Marked, lay_out
from flexmoe_jax.types import Array, Key, PyTree


def clustered(model: Model, experts: int) -> Model:
    """Makes a model whose experts are whole models of the given kind, initialised independently.

    If each client holds one expert, chosen by its loss on the client's examples, the federation is
    IFCA (Ghosh et al. 2020, arXiv 2006.04088): clients that the same model fits train it together.
    If a client holds several experts, its output is their mean, weighted by a gate.

    Args:
      model: the model of each expert: without MoE layers, or with one expert in each.
      experts: E.

    Raises:
      InputError: at initialisation, if the given model has several experts itself.
    """

    def init(key: Key, inputs: PyTree) -> PyTree:
        _inside(model, inputs)

        def draw(one: Key) -> PyTree:
            drawn: PyTree = nn.meta.unbox(model.init(one, inputs))
            return drawn

        whole = jax.vmap(draw)(jax.random.split(key, experts))
        return {
            "expert": jax.tree.map(lambda leaf: Marked(leaf, EXPERT), whole),
            "gate": {"bias": Marked(jnp.zeros(experts), GATE)},
        }

    def head(params: PyTree, inputs: PyTree, held: Held) -> tuple[PyTree, Routings]:
        params = nn.meta.unbox(params)
        bias = params["gate"]["bias"]
        mask = held.get(ROOT, jnp.ones(bias.shape, bool))
        examples = jax.tree.leaves(inputs)[0].shape[0]
        logits = jnp.broadcast_to(bias, (examples, *bias.shape))
        routing = route(logits, mask, top_k=len(bias))
        inside = _inside(model, inputs)
        if len(bias) == 1:
            one = jax.tree.map(lambda leaf: leaf[0], params["expert"])
            return model.apply(one, inputs, inside)[0], {ROOT: routing}
        each = jax.vmap(lambda one: model.apply(one, inputs, inside)[0])(params["expert"])

        def mean(outputs: Array) -> Array:  # (K, B, ...)
            return jnp.einsum("bk,kb...->b...", routing.combine, outputs)

        return jax.tree.map(mean, each), {ROOT: routing}

    return Model(init, lambda params, inputs: inputs, head)


def _inside(model: Model, inputs: PyTree) -> dict[str, Array]:
    """Returns the `held` mask of each MoE layer of a model that has one expert per layer.

    Raises:
      InputError: the model has several experts.
    """
    layout = lay_out(jax.eval_shape(model.init, jax.random.key(0), inputs))
    if layout.experts != 1:
        remedy = "an expert that is a whole model has no more than one itself"
        raise InputError("model.experts", layout.experts, remedy)
    return {layer: jnp.ones(1, bool) for layer in layout.layers}
