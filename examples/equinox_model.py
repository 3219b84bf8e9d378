"""An Equinox model with an MoE layer, trained in a federation."""

import equinox as eqx
import jax
import jax.numpy as jnp

from examples.shared import show_learning
from flexmoe_jax import models


class MoE(eqx.Module):
    """An MoE layer; every array of the MLP has the expert axis in front."""

    experts: eqx.nn.MLP
    gate: eqx.nn.Linear

    def __init__(self, features, experts, key):
        make = eqx.filter_vmap(lambda key: eqx.nn.MLP(features, features, 8, 1, key=key))
        self.experts = make(jax.random.split(key, experts))
        self.gate = eqx.nn.Linear(features, experts, key=key)

    def __call__(self, x, held):
        routing = models.route(jax.vmap(self.gate)(x), held)
        each = eqx.filter_vmap(lambda expert: jax.vmap(expert)(x))(self.experts)
        return jnp.einsum("be,ebd->bd", routing.combine, each), routing


class Net(eqx.Module):
    """A linear layer, a residual MoE layer, a linear layer."""

    first: eqx.nn.Linear
    moe: MoE
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first, self.moe = eqx.nn.Linear(64, 16, key=keys[0]), MoE(16, 4, keys[1])
        self.last = eqx.nn.Linear(16, 10, key=keys[2])

    def __call__(self, images, held):
        h = jax.nn.relu(jax.vmap(self.first)(images.reshape(-1, 64) / 128 - 1))
        mixed, routing = self.moe(h, held["moe"])
        return jax.vmap(self.last)(h + mixed), {"moe": routing}


_, static = eqx.partition(Net(jax.random.key(0)), eqx.is_array)
model = models.from_functions(
    init=lambda key, images: eqx.filter(Net(key), eqx.is_array),
    apply=lambda params, images, held: eqx.combine(params, static)(images, held),
    rules={"moe/experts/*": models.EXPERT, "moe/gate/*": models.GATE},
)

if __name__ == "__main__":
    show_learning(model)
