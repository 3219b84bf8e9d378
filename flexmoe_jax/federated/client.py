"""Local training: one client's part of a round, as three pure functions.

Nothing here knows of other clients: `execute` maps these functions over blocks of clients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

from flexmoe_jax.data import Augmentation, ClientData
from flexmoe_jax.models import Routing, balance_loss, router_z_loss
from flexmoe_jax.types import Array, Feedback, Key, Params, PyTree

Sizes = TypeVar("Sizes", Array, np.ndarray)
"""Whole numbers, on the device or on the host."""

Apply = Callable[[Params, Array, Array], tuple[Array, Routing]]
"""(params, uint8 images (B, ...), held (K,)) -> class logits (B, Y) and routing."""


# Bytes of a tile's largest array that a core still works on in its cache, and batches that are not
# worth cutting: every tile adds a gradient as large as the model.
_CACHED, _WHOLE = 5 * 2**18, 12


class LocalTraining(NamedTuple):
    """How a client trains.

    Attributes:
      optimizer: optax transform over a client's `Params`, started anew each round.
      epochs: passes over the client's examples in a round.
      batch_size: B.
      max_steps: cap on the local steps of a round; 0 for none.
      balance: weight of the Switch-style balance loss over the experts held.
      z: weight of the router z-loss.
      tile: examples whose gradient is taken at once, to stay in cache; the batch's gradient is the
        sum over its tiles. 0 for automatic: on CPU, for batches above 12, as many as fit by the
        largest array that the model makes of one; the batch elsewhere. With a balance loss it is
        always the batch, over which that loss is defined.
      decay: number of the round -> factor on every step of it, as optax's schedules; None for 1.
      augment: random change of the images of every batch; None for none.
    """

    optimizer: optax.GradientTransformation
    epochs: int = 1
    batch_size: int = 32
    max_steps: int = 0
    balance: float = 0.0
    z: float = 0.0
    tile: int = 0
    decay: optax.Schedule | None = None
    augment: Augmentation | None = None

    def tiles(self, example_bytes: Callable[[], int]) -> int:
        """Number of equal tiles of a batch: as few as make none larger than asked for.

        Args:
          example_bytes: tells the size of the largest array that the model makes of one example;
            called only where that counts.
        """
        most = self.tile or self.batch_size
        if self.balance:
            most = self.batch_size
        elif not self.tile and self.batch_size > _WHOLE and jax.default_backend() == "cpu":
            most = max(1, _CACHED // example_bytes())
        tiles = -(-self.batch_size // most)
        return next(n for n in range(tiles, self.batch_size + 1) if self.batch_size % n == 0)

    def steps(self, size: Sizes) -> Sizes:
        """Local steps of a round for a client of `size` examples, elementwise, int32."""
        steps = self.epochs * self.steps_per_epoch(size)
        return steps.clip(max=self.max_steps) if self.max_steps else steps

    def examples(self, size: Sizes) -> Sizes:
        """Examples that a client of `size` trains on in a round, counted once a step."""
        epochs, rest = divmod(self.steps(size), self.steps_per_epoch(size))
        return epochs * size + (rest * self.batch_size).clip(max=size)

    def steps_per_epoch(self, size: Sizes) -> Sizes:
        """Batches that it takes to see `size` examples once; the last may be smaller."""
        return -(-size // self.batch_size)


def proximal(weight: float) -> optax.GradientTransformation:
    """Adds the gradient of `weight/2 · |p - p_start|²` (FedProx, arXiv 1812.06127).

    It holds back what is averaged, ψ and θ, and not what stays with the client. To be chained
    before the optimizer.

    Args:
      weight: μ of FedProx.
    """

    def update(
        updates: Params, start: Params, params: Params | None = None
    ) -> tuple[Params, Params]:
        assert params is not None

        def pull(part: str) -> PyTree:
            return jax.tree.map(
                lambda g, p, s: g + weight * (p - s),
                *(getattr(tree, part) for tree in (updates, params, start)),
            )

        return updates._replace(shared=pull("shared"), experts=pull("experts")), start

    return optax.GradientTransformation(lambda params: params, update)


def scale_experts(factor: float) -> optax.GradientTransformation:
    """Scales the steps of a client's experts and gate, and leaves the rest as it is.

    An example's gradient reaches only the expert that it was routed to, times the gate's
    probability: with K experts in even use about 1/K² of what a dense layer in their place gets,
    which plain SGD takes as it comes. To be chained after the optimizer.

    Args:
      factor: on their steps; K² makes up for the above.
    """
    mixture = Params(shared=False, experts=True, gate=True, private=False)
    return optax.masked(optax.scale(factor), mixture)


class Batches(NamedTuple):
    """What a client trains on, step by step.

    Attributes:
      rows: (T, B) int32 rows of the data set, -1 for none.
      bits: (T, B) uint32 random bits for their augmentation; None without one.
    """

    rows: Array
    bits: Array | None = None


class ClientState(NamedTuple):
    """A client in the middle of its local training.

    Attributes:
      params: current parameters, experts and gate cut to the K slots.
      optimizer: the local optimiser's state.
      feedback: running sums per slot, (K,).
      loss: () running sum of the cross-entropy.
      examples: () running count of examples trained on.
    """

    params: Params
    optimizer: PyTree
    feedback: Feedback
    loss: Array
    examples: Array


class ClientUpdate(NamedTuple):
    """What training leaves behind: deltas for the server, a gate for the client.

    Attributes:
      shared: change of ψ.
      experts: change of each held expert, leaves (K, ...).
      gate: the new gate, leaves (K, ...).
      private: what else the client keeps to itself.
      feedback: (K,) sums per slot.
      loss: () mean cross-entropy per example, in nats; 0 if nothing was trained.
      examples: () examples trained on.
    """

    shared: PyTree
    experts: PyTree
    gate: PyTree
    private: PyTree
    feedback: Feedback
    loss: Array
    examples: Array


class Client(NamedTuple):
    """Local training of one client.

    Attributes:
      init: params -> ClientState.
      step: (ClientState, one step's `Batches`, leaves (B,), held (K,)) -> ClientState.
      final: (params at the start, ClientState) -> ClientUpdate.
    """

    init: Callable[[Params], ClientState]
    step: Callable[[ClientState, Batches, Array], ClientState]
    final: Callable[[Params, ClientState], ClientUpdate]


def make_client(
    apply: Apply, local: LocalTraining, data: ClientData, round_index: Array | int, slots: int
) -> Client:
    """Builds the local training of a client that draws its examples from `data`.

    Args:
      apply: the model.
      local: how clients train.
      data: all clients' examples.
      round_index: rounds completed.
      slots: K.
    """

    def init(params: Params) -> ClientState:
        zeros = jnp.zeros(slots, jnp.float32)
        return ClientState(
            params=params,
            optimizer=local.optimizer.init(params),
            feedback=Feedback(zeros, zeros, zeros),
            loss=jnp.zeros((), jnp.float32),
            examples=jnp.zeros((), jnp.float32),
        )

    def objective(
        params: Params, images: Array, labels: Array, valid: Array, held: Array
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        logits, routing = apply(params, images, held)
        # Not by the label's place in a row: taking one entry out of each, and putting its gradient
        # back, is slow on a CPU.
        losses = optax.softmax_cross_entropy(
            logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        )
        loss = jnp.dot(losses, valid) / jnp.maximum(valid.sum(), 1.0)
        if local.balance:
            loss += local.balance * balance_loss(routing, held, valid)
        if local.z:
            loss += local.z * router_z_loss(routing, held, valid)
        return loss, (losses, logits.argmax(axis=-1) == labels, routing.selected)

    def gradient(params: Params, batch: tuple[Array, ...], held: Array) -> tuple[PyTree, tuple]:
        """Gradient of the batch's mean loss, a tile of its examples at a time."""
        take = jax.grad(objective, has_aux=True)
        first = jax.tree.map(lambda x: x[:1], batch)
        tiles = local.tiles(partial(largest_array, objective, params, *first, held))
        if tiles == 1:
            return take(params, *batch, held)
        cut = jax.tree.map(lambda x: x.reshape(tiles, -1, *x.shape[1:]), batch)
        count = jnp.maximum(batch[2].sum(), 1.0)

        def add(total: PyTree, tile: tuple[Array, ...]) -> tuple[PyTree, tuple]:
            part, seen = take(params, *tile, held)
            weight = tile[2].sum() / count
            return jax.tree.map(lambda t, g: t + weight * g, total, part), seen

        total, seen = lax.scan(add, jax.tree.map(jnp.zeros_like, params), cut)
        return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)

    def step(state: ClientState, batch: Batches, held: Array) -> ClientState:
        valid = (batch.rows >= 0).astype(jnp.float32)
        images, labels = (
            x.at[jnp.maximum(batch.rows, 0)].get(mode="promise_in_bounds")
            for x in (data.images, data.labels)
        )
        if local.augment is not None:
            assert batch.bits is not None
            images = local.augment(images, batch.bits)
        slope, (losses, correct, selected) = gradient(state.params, (images, labels, valid), held)
        updates, optimizer = local.optimizer.update(slope, state.optimizer, state.params)
        if local.decay is not None:
            updates = optax.tree.scale(local.decay(round_index), updates)
        routed = selected * valid[:, None]  # (B, K)
        return ClientState(
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer,
            feedback=Feedback(
                usage=state.feedback.usage + routed.sum(axis=0),
                correct=state.feedback.correct + correct @ routed,
                loss=state.feedback.loss + losses @ routed,
            ),
            loss=state.loss + losses @ valid,
            examples=state.examples + valid.sum(),
        )

    def final(params: Params, state: ClientState) -> ClientUpdate:
        return ClientUpdate(
            shared=jax.tree.map(jnp.subtract, state.params.shared, params.shared),
            experts=jax.tree.map(jnp.subtract, state.params.experts, params.experts),
            gate=state.params.gate,
            private=state.params.private,
            feedback=state.feedback,
            loss=state.loss / jnp.maximum(state.examples, 1.0),
            examples=state.examples,
        )

    return Client(init, step, final)


def largest_array(function: Callable[..., PyTree], *inputs: PyTree) -> int:
    """Bytes of the largest array that a function of these inputs computes on its way."""

    def largest(jaxpr: Jaxpr) -> int:
        inner = jax.tree.leaves(
            [list(equation.params.values()) for equation in jaxpr.eqns],
            is_leaf=lambda leaf: isinstance(leaf, Jaxpr | ClosedJaxpr),
        )
        within = [getattr(leaf, "jaxpr", leaf) for leaf in inner]
        made: list[Any] = [result.aval for equation in jaxpr.eqns for result in equation.outvars]
        sizes = [array.size * array.dtype.itemsize for array in made if hasattr(array, "size")]
        return max([*sizes, *(largest(leaf) for leaf in within if isinstance(leaf, Jaxpr))])

    return largest(jax.make_jaxpr(function)(*inputs).jaxpr)


def draw_batches(local: LocalTraining, key: Key, index: Array, size: Array) -> Batches:
    """What a client trains on in a round: its examples in a new order every epoch, cut to batches.

    Args:
      local: how clients train.
      key: of the client in this round.
      index: (N,) rows of its examples in the data set, then padding.
      size: () how many it has.

    Returns:
      T steps, those of a client with N examples; rows are -1 where a batch is not full and from the
      client's own last step on.
    """
    padded = index.shape[0]
    # The padding comes last, so that it does not move what the examples before it draw.
    rank = jax.random.uniform(key, (padded, local.epochs), jnp.float32).T
    order = jnp.argsort(jnp.where(jnp.arange(padded) < size, rank, jnp.inf), axis=1)
    step = jnp.arange(int(local.steps(np.asarray(padded))))[:, None]
    epoch, batch = jnp.divmod(step, jnp.maximum(local.steps_per_epoch(size), 1))
    place = batch * local.batch_size + jnp.arange(local.batch_size)
    rows = index[order[epoch.clip(max=local.epochs - 1), place.clip(max=padded - 1)]]
    rows = jnp.where((step < local.steps(size)) & (place < size), rows, -1).astype(jnp.int32)
    if local.augment is None:
        return Batches(rows)
    return Batches(rows, jax.random.bits(jax.random.fold_in(key, 0), rows.shape, jnp.uint32))
