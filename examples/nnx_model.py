"""A Flax NNX model with an MoE layer, trained in a federation."""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.shared import show_learning
from flexmoe_jax import models


class MoE(nnx.Module):
    """An MoE layer: each expert is a matrix, and the gate has a row for each expert."""

    def __init__(self, features, experts, rngs):
        self.experts = nnx.Param(
            0.2 * jax.random.normal(rngs.params(), (experts, features, features))
        )
        self.gate = nnx.Param(0.02 * jax.random.normal(rngs.params(), (experts, features)))

    def __call__(self, x, held):
        routing = models.route(x @ self.gate.T, held)
        return jnp.einsum("be,edf,bd->bf", routing.combine, self.experts[...], x), routing


class Net(nnx.Module):
    """A linear layer, a residual MoE layer, a linear layer."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(64, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)
        self.moe = MoE(16, 4, rngs)

    def __call__(self, images, held):
        h = nnx.relu(self.first(images.reshape(-1, 64) / 128 - 1))
        mixed, routing = self.moe(h, held["moe"])
        return self.last(h + nnx.relu(mixed)), {"moe": routing}


graph = nnx.graphdef(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
model = models.from_functions(
    init=lambda key, images: nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(key)))),
    apply=lambda params, images, held: nnx.merge(graph, params)(images, held),
    rules={"moe/experts": models.EXPERT, "moe/gate": models.GATE},
)

if __name__ == "__main__":
    show_learning(model)
