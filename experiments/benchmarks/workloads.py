"""Workloads of the benchmarks: models, synthetic data, rounds, and their operation counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flexmoe_jax import client, data, models, simulation, tasks
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.federation import Federation
from flexmoe_jax.models.conv import Convolution
from flexmoe_jax.models.transformer import Attention
from flexmoe_jax.types import Array, Plan, PyTree

CLASSES = 10
LEARNING_RATE = 0.1

Prepare = Callable[[Array], Array]


class SmallCNN(nn.Module):
    """Two 3×3 convolutions without padding, a 2×2 maximum pooling, and a layer of 128 units.

    Attributes:
      conv: implementation of the convolution.
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


Net = Callable[[Convolution, int], nn.Module]
"""(implementation of the convolution, experts E or 0) -> the module that a client trains."""


@dataclass(frozen=True)
class Workload:
    """One epoch of local training for each client of a cohort.

    Attributes:
      net: makes the module that clients train.
      shape: shape of an input: an image (height, width, channels), or (tokens,).
      clients: P; all clients are in the cohort.
      examples: N of each client.
      batch: B.
      experts: E, with gates; 0 for the model without experts.
      capacity: number of experts that each client holds.
    """

    net: Net
    shape: tuple[int, ...]
    clients: int = 50
    examples: int = 50
    batch: int = 10
    experts: int = 0
    capacity: int = 1

    @property
    def of_text(self) -> bool:
        """Whether inputs are tokens, and the task is to predict the next token."""
        return len(self.shape) == 1

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The clients' optimiser: Adam for text, as in `configs/languages.py`, SGD for images."""
        return optax.adam(0.003) if self.of_text else optax.sgd(LEARNING_RATE)


def classify(backbone: Callable[[Convolution], nn.Module]) -> Net:
    """Returns a `Net` of image classifiers around a backbone made for a given convolution."""

    def net(conv: Convolution, experts: int) -> nn.Module:
        made = backbone(conv)
        return models.MoEClassifier(made, CLASSES, experts) if experts else DenseClassifier(made)

    return net


def decode(depth: int, width: int, hidden: int) -> Net:
    """Returns a `Net` of byte-level decoders with four heads and experts in every block."""

    def net(conv: Convolution, experts: int) -> nn.Module:
        del conv
        return models.Transformer(experts, depth, width, 4, hidden, router=experts > 0)

    return net


_convnet = classify(lambda conv: models.ConvNet(conv=conv))

WORKLOADS = {
    "W1": Workload(classify(lambda conv: models.MLP(())), (28, 28, 1)),
    "W2": Workload(classify(lambda conv: models.MLP((200, 200))), (28, 28, 1)),
    "W3": Workload(classify(SmallCNN), (32, 32, 3)),
    "W4": Workload(_convnet, (32, 32, 3), 8, 64, 16),
    "W4b64": Workload(_convnet, (32, 32, 3), 8, 256, 64),
    "M1": Workload(_convnet, (32, 32, 3), 8, 64, 16, experts=8, capacity=2),
    "M2": Workload(
        classify(lambda conv: models.ResNet(conv=conv)), (32, 32, 3), 8, 64, 16, 8, capacity=2
    ),
    "T1": Workload(decode(2, 96, hidden=256), (64,), 24, 80, 8),
    "T1M": Workload(decode(2, 96, hidden=128), (64,), 24, 80, 8, experts=8, capacity=2),
    "T2": Workload(decode(4, 256, hidden=256), (128,), 8, 16, 4, experts=16, capacity=4),
}
"""W1 is logistic regression, W2 an MLP, W3 a small CNN, W4 a ConvNet (b64: with larger batches).
M1 has experts and gates on the same ConvNet, M2 on ResNet-8. T1 is a decoder of bytes. T1M has
experts in place of its MLPs; the two that a client holds are together as large as one of T1's MLPs.
T2 is a larger decoder."""


class Rounds:
    """Training rounds: each call runs one round, from the state that the previous call left.

    Args:
      step: (state, client data, plan) -> (new state, anything); the state's memory is donated.
      state: parameters, or a federation's state.
      clients: the clients' data.
      plan: the plan of every round.
    """

    def __init__(
        self,
        step: Callable[[Any, data.ClientData, Plan], tuple[Any, Any]],
        state: PyTree,
        clients: data.ClientData,
        plan: Plan,
    ) -> None:
        """Compiles the step, so that calls do not."""
        self._step = jax.jit(step, donate_argnums=0).lower(state, clients, plan).compile()
        self._state, self._clients, self._plan = state, clients, plan

    def __call__(self) -> Any:
        """Trains for one round; returns the second output of the step."""
        self._state, report = self._step(self._state, self._clients, self._plan)
        return report


def make_rounds(workload: Workload, mesh: Mesh) -> Rounds:
    """Makes rounds as the framework runs them."""
    local = client.LocalTraining(workload.optimizer, batch_size=workload.batch, balance=0.0)
    return _make_rounds(workload, mesh, local, models.conv_auto, block_size=0)


def make_naive_rounds(workload: Workload) -> Rounds:
    """Makes the same rounds with `vmap` over all clients, one device and XLA's own convolution."""
    local = client.LocalTraining(
        workload.optimizer, batch_size=workload.batch, balance=0.0, tile=workload.batch
    )
    mesh = simulation.client_mesh(1)
    return _make_rounds(workload, mesh, local, models.conv_lax, block_size=workload.clients)


def _make_rounds(
    workload: Workload,
    mesh: Mesh,
    local: client.LocalTraining,
    conv: Convolution,
    block_size: int,
) -> Rounds:
    count = workload.clients
    drawn, prepare = _draw_clients(workload)
    clients = simulation.replicate(drawn, mesh)
    federation = make_federation(
        workload.net(conv, workload.experts),
        clients,
        np.full(count, workload.capacity),
        prepare=prepare,
        local=local,
    )
    simulated = simulation.simulate(federation, clients, block_size=block_size, mesh=mesh)
    state = simulated.init(jax.random.key(0))
    cohort = np.arange(count, dtype=np.int32)
    plan = simulated.plan(cohort, simulated.assign(state, cohort))
    return Rounds(simulated.round, state, clients, plan)


def _draw_clients(workload: Workload) -> tuple[data.ClientData, Prepare]:
    """Draws noise as the data of every client, and returns it with its preprocessing."""
    parts = np.split(np.arange(workload.clients * workload.examples), workload.clients)
    if workload.of_text:
        shape = (workload.clients * workload.examples, workload.shape[0] + 1)
        text = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        return data.join({"tokens": text}, parts), lambda tokens: tokens
    height, width, channels = workload.shape
    dataset = draw_dataset(workload.clients * workload.examples, (height, width, channels))
    return data.build_clients(dataset, parts), data.standardise(dataset.train_images)


def draw_dataset(examples: int, image: tuple[int, int, int], tests: int = 1) -> data.Dataset:
    """Draws noise with labels, with the given numbers of training and test examples."""
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
    module: nn.Module,
    clients: data.ClientData,
    capacity: np.ndarray,
    *,
    prepare: Prepare,
    local: client.LocalTraining,
) -> Federation:
    """Makes a federation of a classifier or a decoder, with the policy `flex`."""
    task = tasks.classification()
    if isinstance(module, models.Transformer):
        model, task = models.decoder(module), tasks.next_token()
    elif isinstance(module, models.MoEClassifier):
        model = models.classifier(module)
    else:
        model = models.from_linen(module)
    return Federation(
        model=model.after(prepare),
        sample={name: values[:2] for name, values in clients.arrays.items()},
        capacity=capacity,
        policy=make_policy("flex"),
        local=local,
        task=task,
    )


def training_flop(workload: Workload) -> int:
    """Counts the floating-point operations of a round's training, from the shapes of the layers.

    The forward pass has two operations for each multiplication of a matrix product or convolution.
    The backward pass has twice as many, less the gradient for images, which is not needed. Only the
    expert that an example or token is routed to is counted; attention counts all pairs of tokens.
    """
    kind = jnp.int32 if workload.of_text else jnp.float32
    held = workload.capacity if workload.experts else 0
    module = workload.net(models.conv_lax, held)
    layers = _count_layers(module, jax.ShapeDtypeStruct((1, *workload.shape), kind))
    unneeded = 0 if workload.of_text else layers[0]
    return 2 * (3 * sum(layers) - unneeded) * workload.clients * workload.examples


def _count_layers(model: nn.Module, image: jax.ShapeDtypeStruct) -> list[int]:
    """Counts the multiplications of each layer for one example, in the order of the layers."""
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
        elif isinstance(layer, Attention):
            layers.append(2 * prod(inputs[0].shape) * inputs[0].shape[1])
        elif isinstance(layer, models.Gate):
            layers.append(prod(inputs[0].shape) * layer.count)
        elif isinstance(layer, models.Experts):
            layers.append(2 * prod(inputs[0].shape) * layer.hidden)
        return output

    with nn.intercept_methods(count):
        jax.eval_shape(model.init, jax.random.key(0), image)
    return layers
