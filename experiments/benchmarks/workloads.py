"""What clients train in the benchmarks: models, synthetic data, rounds, and their arithmetic."""

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


Net = Callable[[Convolution, int], nn.Module]
"""(a convolution's implementation, experts E or 0) -> what a client trains."""


@dataclass(frozen=True)
class Workload:
    """One epoch of local training for each client of a cohort.

    Attributes:
      net: what clients train.
      shape: of what goes in: an image (height, width, channels), or (tokens,).
      clients: P, all of them in the cohort.
      examples: N of each client.
      batch: B.
      experts: E, with gates; 0 for the model without them.
      capacity: of them that each client holds.
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
        """Whether tokens go in, of which the next is told."""
        return len(self.shape) == 1

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Of clients: Adam for text, as `configs/languages.py` has it."""
        return optax.adam(0.003) if self.of_text else optax.sgd(LEARNING_RATE)


def classify(backbone: Callable[[Convolution], nn.Module]) -> Net:
    """Classifiers of pictures, around a backbone made for a convolution's implementation."""

    def net(conv: Convolution, experts: int) -> nn.Module:
        made = backbone(conv)
        return models.MoEClassifier(made, CLASSES, experts) if experts else DenseClassifier(made)

    return net


def decode(depth: int, width: int, hidden: int) -> Net:
    """Decoders of bytes, with four heads, and experts in every block."""

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
"""W1 logistic regression, W2 MLP, W3 small CNN, W4 ConvNet (b64: in larger batches), M1 experts and
gates on the same ConvNet, M2 on ResNet-8; T1 a decoder of bytes, T1M with experts of the same size
in sum as its layers, T2 a larger one."""


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
    local = client.LocalTraining(workload.optimizer, batch_size=workload.batch, balance=0.0)
    return _make_rounds(workload, mesh, local, models.conv_auto, block_size=0)


def make_naive_rounds(workload: Workload) -> Rounds:
    """The same rounds as `vmap` over all clients on one device, with XLA's own convolution."""
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
    """Noise for every client, and what is done to it first."""
    parts = np.split(np.arange(workload.clients * workload.examples), workload.clients)
    if workload.of_text:
        shape = (workload.clients * workload.examples, workload.shape[0] + 1)
        text = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        return data.join({"tokens": text}, parts), lambda tokens: tokens
    height, width, channels = workload.shape
    dataset = draw_dataset(workload.clients * workload.examples, (height, width, channels))
    return data.build_clients(dataset, parts), data.standardise(dataset.train_images)


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
    module: nn.Module,
    clients: data.ClientData,
    capacity: np.ndarray,
    *,
    prepare: Prepare,
    local: client.LocalTraining,
) -> Federation:
    """A federation with the policy `flex`, of a classifier or a decoder."""
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
    """Floating-point operations of a round's training, counted from the shapes of the layers.

    Forward, two for each multiplication of a matrix product or convolution; backward, twice as many
    again, less the gradient for images, which nobody needs. Of the experts only the one that an
    example or a token is routed to counts; of attention, all pairs of tokens.
    """
    kind = jnp.int32 if workload.of_text else jnp.float32
    held = workload.capacity if workload.experts else 0
    module = workload.net(models.conv_lax, held)
    layers = _count_layers(module, jax.ShapeDtypeStruct((1, *workload.shape), kind))
    unneeded = 0 if workload.of_text else layers[0]
    return 2 * (3 * sum(layers) - unneeded) * workload.clients * workload.examples


def _count_layers(model: nn.Module, image: jax.ShapeDtypeStruct) -> list[int]:
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
