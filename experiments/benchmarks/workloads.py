"""What clients train in the benchmarks: models, synthetic data, rounds, and their arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flexmoe_jax import data, federated, models
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.models.conv import Convolution
from flexmoe_jax.types import Array, Params, Plan, PyTree

CLASSES = 10
LEARNING_RATE = 0.1
_EXPERTS, _CAPACITY = 8, 2

Prepare = Callable[[Array], Array]


class SmallCNN(nn.Module):
    """Two 3×3 convolutions without padding, a maximum over 2×2, and a layer of 128 units.

    Attributes:
      conv: the convolution's implementation.
    """

    conv: Convolution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (B, h, w, channels) to (B, 128)."""
        x = nn.relu(models.Conv(32, padding="VALID", use_bias=True, conv=self.conv)(x))
        x = models.Conv(64, padding="VALID", use_bias=True, conv=self.conv)(x)
        x = nn.relu(models.max_pool(x))
        return nn.relu(models.Dense(128)(x.reshape(x.shape[0], -1)))


class DenseClassifier(nn.Module):
    """A backbone and a linear head, without experts.

    Attributes:
      backbone: Linen module (B, ...) -> (B, D).
    """

    backbone: nn.Module

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps images (B, h, w, channels) to class logits (B, Y)."""
        return models.Dense(CLASSES)(self.backbone(x))


@dataclass(frozen=True)
class Workload:
    """One epoch of local training for each client of a cohort.

    Attributes:
      backbone: made for a convolution's implementation.
      image: (height, width, channels).
      clients: P, all of them in the cohort.
      examples: N of each client.
      batch: B.
      mixture: with experts and gates (FLEX-MoE), or the backbone and a head alone.
    """

    backbone: Callable[[Convolution], nn.Module]
    image: tuple[int, int, int]
    clients: int = 50
    examples: int = 50
    batch: int = 10
    mixture: bool = False


def _convnet(conv: Convolution) -> nn.Module:
    return models.ConvNet(conv=conv)


WORKLOADS = {
    "W1": Workload(lambda conv: models.MLP(()), (28, 28, 1)),
    "W2": Workload(lambda conv: models.MLP((200, 200)), (28, 28, 1)),
    "W3": Workload(SmallCNN, (32, 32, 3)),
    "W4": Workload(_convnet, (32, 32, 3), 8, 64, 16),
    "W4b64": Workload(_convnet, (32, 32, 3), 8, 256, 64),
    "M1": Workload(_convnet, (32, 32, 3), 8, 64, 16, mixture=True),
    "M2": Workload(lambda conv: models.ResNet(conv=conv), (32, 32, 3), 8, 64, 16, mixture=True),
}
"""W1 logistic regression, W2 MLP, W3 small CNN, W4 ConvNet (b64: in larger batches), M1 experts and
gates on the same ConvNet, M2 on ResNet-8."""


class Rounds:
    """Rounds of training, one a call, each from the state that the one before left.

    Args:
      step: (state, client data, plan) -> (new state, anything); gives the state's memory away.
      state: parameters, or a federation's state.
      clients: their data.
      plan: of every round.
    """

    def __init__(
        self,
        step: Callable[[Any, data.ClientData, Plan], tuple[Any, Any]],
        state: PyTree,
        clients: data.ClientData,
        plan: Plan,
    ) -> None:
        """Compiles, so that no call does."""
        self._step = jax.jit(step, donate_argnums=0).lower(state, clients, plan).compile()
        self._state, self._clients, self._plan = state, clients, plan

    def __call__(self) -> Any:
        """Trains for a round; returns what the step reports beside the new state."""
        self._state, report = self._step(self._state, self._clients, self._plan)
        return report


def make_rounds(workload: Workload, mesh: Mesh) -> Rounds:
    """Rounds as the framework runs them."""
    local = federated.LocalTraining(optax.sgd(LEARNING_RATE), batch_size=workload.batch)
    return _make_rounds(workload, mesh, local, models.conv_auto, block_size=0)


def make_naive_rounds(workload: Workload) -> Rounds:
    """The same rounds as `vmap` over all clients on one device, with XLA's own convolution."""
    local = federated.LocalTraining(
        optax.sgd(LEARNING_RATE), batch_size=workload.batch, tile=workload.batch
    )
    mesh = federated.client_mesh(1)
    return _make_rounds(workload, mesh, local, models.conv_lax, block_size=workload.clients)


def _make_rounds(
    workload: Workload,
    mesh: Mesh,
    local: federated.LocalTraining,
    conv: Convolution,
    block_size: int,
) -> Rounds:
    dataset = draw_dataset(workload.clients * workload.examples, workload.image)
    parts = np.split(np.arange(len(dataset.train_labels)), workload.clients)
    clients = federated.replicate(data.build_clients(dataset, parts), mesh)
    prepare = data.standardise(dataset.train_images)
    make = _mixture_rounds if workload.mixture else _dense_rounds
    return make(workload.backbone(conv), clients, prepare, local, block_size, mesh)


def draw_dataset(examples: int, image: tuple[int, int, int], tests: int = 1) -> data.Dataset:
    """Noise with labels: so many examples to train on and to test."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples + tests, *image), np.uint8)
    labels = rng.integers(0, CLASSES, examples + tests, np.int32)
    return data.Dataset(
        name="noise",
        train_images=images[tests:],
        train_labels=labels[tests:],
        test_images=images[:tests],
        test_labels=labels[:tests],
        classes=tuple(map(str, range(CLASSES))),
    )


def make_federation(
    backbone: nn.Module,
    clients: data.ClientData,
    capacity: np.ndarray,
    *,
    prepare: Prepare,
    local: federated.LocalTraining,
    experts: int = _EXPERTS,
    block_size: int = 0,
    mesh: Mesh,
) -> federated.Algorithm:
    """A federation with the policy `flex` and settings that are otherwise the default."""
    return federated.flexmoe(
        models.MoEClassifier(backbone, CLASSES, experts),
        clients,
        prepare=prepare,
        capacity=capacity,
        policy=make_policy("flex"),
        load_model=federated.make_load_model("clients", np.asarray(clients.size), capacity),
        local=local,
        fitness=federated.FitnessOptions(),
        block_size=block_size,
        mesh=mesh,
    )


def _mixture_rounds(
    backbone: nn.Module,
    clients: data.ClientData,
    prepare: Prepare,
    local: federated.LocalTraining,
    block_size: int,
    mesh: Mesh,
) -> Rounds:
    count = clients.size.shape[0]
    algorithm = make_federation(
        backbone,
        clients,
        np.full(count, _CAPACITY),
        prepare=prepare,
        local=local,
        block_size=block_size,
        mesh=mesh,
    )
    cohort = np.arange(count, dtype=np.int32)
    state = algorithm.init(jax.random.key(0))
    plan = algorithm.plan(cohort, algorithm.assign(state, cohort))
    return Rounds(algorithm.round, state, clients, plan)


def _dense_rounds(
    backbone: nn.Module,
    clients: data.ClientData,
    prepare: Prepare,
    local: federated.LocalTraining,
    block_size: int,
    mesh: Mesh,
) -> Rounds:
    """The parts of a round that remain without experts: every client holds one number instead."""
    model = DenseClassifier(backbone)
    count = clients.size.shape[0]
    server = optax.sgd(1.0)
    block_size = federated.resolve_block_size(block_size, count, mesh.size)
    plan = federated.make_plan(
        np.arange(count, dtype=np.int32),
        np.ones((count, 1), bool),
        np.ones(1),
        steps=np.asarray(local.steps(clients.size)),
        slots=1,
        clients=count,
        block_size=block_size,
        devices=mesh.size,
    )
    experts, gates = {"none": jnp.zeros((1, 1))}, jnp.zeros((count, 1, 1))

    def apply(params: Params, images: Array, held: Array) -> tuple[Array, models.Routing]:
        logits: Any = model.apply(params.shared, prepare(images))
        alone = jnp.ones((images.shape[0], 1))
        return logits, models.Routing(alone, alone, alone.astype(bool), alone)

    def step(state: tuple, clients: data.ClientData, plan: Plan) -> tuple[tuple, Array]:
        shared, optimizers, key = state
        key, own = jax.random.split(key)
        result = federated.train_cohort(
            partial(federated.make_client, apply, local, slots=1),
            local,
            clients,
            shared,
            experts,
            gates,
            (),
            plan,
            jnp.zeros((), jnp.int32),
            own,
            block_size,
            mesh,
        )
        assert result.sums is not None
        new = federated.apply_sums(server, result.sums, shared, experts, *optimizers)
        return (new.shared, (new.shared_optimizer, new.expert_optimizer), key), result.loss

    shared = model.init(jax.random.key(0), prepare(clients.images[:1]))
    state = shared, federated.init_server(server, shared, experts), jax.random.key(1)
    return Rounds(step, *federated.replicate((state, clients, plan), mesh))


def training_flop(workload: Workload) -> int:
    """Floating-point operations of a round's training, counted from the shapes of the layers.

    Forward, two for each multiplication of a matrix product or convolution; backward, twice as many
    again, less the gradient for the images, which nobody needs. Of the experts only the one that an
    example is routed to counts.
    """
    backbone = workload.backbone(models.conv_lax)
    image = jax.ShapeDtypeStruct((1, *workload.image), jnp.float32)
    if workload.mixture:
        held = jax.ShapeDtypeStruct((_CAPACITY,), bool)
        mixture = models.MoEClassifier(backbone, CLASSES, _CAPACITY)
        layers = _count_layers(mixture, image, held)
    else:
        layers = _count_layers(DenseClassifier(backbone), image)
    per_example = 2 * (3 * sum(layers) - layers[0])
    return per_example * workload.clients * workload.examples


def _count_layers(model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> list[int]:
    """Multiplications of each layer for one example, the first layer first."""
    layers: list[int] = []

    def count(run: Callable, inputs: tuple, options: dict, context: Any) -> Any:
        output = run(*inputs, **options)
        layer = context.module
        if context.method_name != "__call__":
            return output
        if isinstance(layer, nn.Dense):
            layers.append(prod(inputs[0].shape) * layer.features)
        elif isinstance(layer, models.Conv):
            layers.append(prod(output.shape) * layer.kernel_size**2 * inputs[0].shape[-1])
        elif isinstance(layer, models.Gate):
            layers.append(prod(inputs[0].shape) * layer.count)
        elif isinstance(layer, models.Experts):
            layers.append(2 * prod(inputs[0].shape) * layer.hidden)
        return output

    with nn.intercept_methods(count):
        jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return layers
