"""Local training: what a client does with its own examples in a round.

Nothing here knows of other clients, nor of the server: a simulation maps these functions over many
clients, and a real client calls them.

Axis legend: `N` examples of a client, `B` batch, `U` units of an example, `S` local steps, `K`
expert slots, `L` MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Float, Int

from flexmoe_jax.client.losses import balance_loss, router_loss, router_z_loss
from flexmoe_jax.client.units import fractions, weights_of
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.client import LocalLoss, LocalWork
from flexmoe_jax.options.execution import ExecutionOptions
from flexmoe_jax.tasks import Batch, Task
from flexmoe_jax.types import Array, Download, Feedback, Key, Params, PyTree, Routing

Sizes = TypeVar("Sizes", Array, np.ndarray)
"""Whole numbers, on the device or on the host."""

Routings = dict[str, Routing]
Held = dict[str, Array]
Apply = Callable[[Params, PyTree, Held], tuple[PyTree, Routings]]
"""(params, what the model takes (B, ...), held by layer (K,)) -> outputs and routings by layer."""

Augment = Callable[[Batch, Array], Batch]
"""(batch, random bits (B,) uint32) -> the batch with its inputs changed at random."""

# Bytes of a tile's largest array that a core still works on in its cache, and batches that are not
# worth cutting: every tile adds a gradient as large as the model.
_CACHED, _WHOLE = 5 * 2**18, 12


@dataclass(frozen=True)
class LocalTraining(LocalWork, LocalLoss):
    """How a client trains; see the two records for the other options.

    Attributes:
      optimizer: optax transform over a client's `Params`, started anew each round.
      tile: examples whose gradient is taken at once, to stay in cache; the batch's gradient is the
        sum over its tiles. 0 for automatic: on CPU, for batches above 12, as many as fit by the
        largest array that the model makes of one; the batch elsewhere. With a balance loss it is
        always the batch, over which that loss is defined.
      decay: number of the round -> factor on every step of it, as optax's schedules; None for 1.
      augment: random change of every batch; None for none.
    """

    optimizer: optax.GradientTransformation
    tile: int = ExecutionOptions.tile
    decay: optax.Schedule | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        """Refuses values outside their ranges, and what is no optimiser."""
        super().__post_init__()
        check_transform("optimizer", self.optimizer)

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


def check_transform(field: str, value: object) -> None:
    """Refuses what is no optax transform.

    Raises:
      InputError: naming the field.
    """
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise InputError(field, value, "give an optax transform, as optax.sgd(0.1)")


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
      rows: (S, B) int32 rows of the arrays of examples, -1 for none.
      bits: (S, B) uint32 random bits for their augmentation; None without one.
    """

    rows: Array
    bits: Array | None = None


def draw_batches(
    local: LocalTraining, key: Key, index: Int[Array, " N"], size: Int[Array, ""]
) -> Batches:
    """What a client trains on in a round: its examples in a new order every epoch, cut to batches.

    Args:
      local: how clients train.
      key: of the client in this round.
      index: (N,) rows of its examples in the arrays, then padding.
      size: () how many it has.

    Returns:
      S steps, those of a client with N examples; rows are -1 where a batch is not full and from the
      client's own last step on.
    """
    padded = index.shape[0]
    numbers = partial(jnp.arange, dtype=jnp.int32)
    # The padding comes last, so that it does not move what the examples before it draw.
    rank = jax.random.uniform(key, (padded, local.epochs), jnp.float32).T
    order = jnp.argsort(jnp.where(numbers(padded)[None] < size, rank, jnp.inf), axis=1)
    step = numbers(int(local.steps(np.asarray(padded))))[:, None]
    epoch, batch = jnp.divmod(step, jnp.maximum(local.steps_per_epoch(size), 1))
    place = batch * local.batch_size + numbers(local.batch_size)[None]
    rows = index[order[epoch.clip(max=local.epochs - 1), place.clip(max=padded - 1)]]
    rows = jnp.where((step < local.steps(size)) & (place < size), rows, -1).astype(jnp.int32)
    if local.augment is None:
        return Batches(rows)
    return Batches(rows, jax.random.bits(jax.random.fold_in(key, 0), rows.shape, jnp.uint32))


class Trained(NamedTuple):
    """A client in the middle of its local training, and at its end.

    Attributes:
      params: current parameters, experts and gate cut to the K slots.
      optimizer: the local optimiser's state.
      feedback: running sums per slot, (L, K).
      loss: () running sum of the loss.
      units: () running count of units trained on.
      examples: () running count of examples trained on.
    """

    params: Params
    optimizer: PyTree
    feedback: Feedback
    loss: Array
    units: Array
    examples: Array


class Learner(NamedTuple):
    """What a client needs to train: the model, the task and how.

    Attributes:
      apply: the model.
      task: what is learnt.
      local: how.
      layers: the L MoE layers.
    """

    apply: Apply
    task: Task
    local: LocalTraining
    layers: tuple[str, ...]


def train(
    learner: Learner,
    start: Params,
    arrays: Batch,
    batches: Batches,
    held: Held,
    down: Download,
    log_share: Float[Array, " Y"] | None = None,
) -> Trained:
    """Trains a client for so many steps; every batch is scored before the step that learns from it.

    Args:
      learner: model, task and training.
      start: parameters at the start, experts and gate cut to the K slots.
      arrays: named examples, leaves (M, ...), of which the batches name rows.
      batches: of the round.
      held: (K,) bool by MoE layer, slots that hold an expert.
      down: what the server sent: how many steps, and in which round.
      log_share: (Y,) logarithm of the client's label shares, which never leaves it; None for none.
    """
    # (G, K), of which G is 1 or L.
    of_layers = jnp.broadcast_to(down.slots, (len(learner.layers), down.slots.shape[-1]))
    slots = dict(zip(learner.layers, of_layers, strict=True))
    known = Known(arrays, held, log_share if learner.local.prior else None, slots)
    zeros = jnp.zeros((len(learner.layers), down.slots.shape[-1]), jnp.float32)
    nothing = jnp.zeros((), jnp.float32)
    optimizer = learner.local.optimizer.init(start)
    begun = Trained(start, optimizer, Feedback(zeros, zeros, zeros), nothing, nothing, nothing)

    def step(t: Array, state: Trained) -> Trained:
        batch = jax.tree.map(lambda x: x[t], batches)
        return _step(learner, known, down.round, state, batch)

    return lax.fori_loop(0, down.steps, step, begun)


class Known(NamedTuple):
    """What stays the same through a client's training: examples, slots held, label shares.

    `slots` says which experts the slots (K,) of each layer hold, for the router; None without one.
    """

    arrays: Batch
    held: Held
    log_share: Array | None
    slots: Held | None = None


def _step(
    learner: Learner, known: Known, round_index: Array, state: Trained, chosen: Batches
) -> Trained:
    local = learner.local
    batch, valid = take_batch(known.arrays, chosen.rows)
    if local.augment is not None:
        assert chosen.bits is not None
        batch = local.augment(batch, chosen.bits)
    slope, seen = _gradient(learner, state.params, batch, valid, known)
    with jax.numpy_dtype_promotion("standard"):  # optax takes counts times floats
        updates, optimizer = local.optimizer.update(slope, state.optimizer, state.params)
        decay = None if local.decay is None else local.decay(round_index)
    if decay is not None:
        updates = optax.tree.scale(jnp.asarray(decay, jnp.float32), updates)
    return Trained(
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer,
        feedback=jax.tree.map(jnp.add, state.feedback, seen.feedback),
        loss=state.loss + seen.loss,
        units=state.units + seen.units,
        examples=state.examples + valid.sum(),
    )


def take_batch(arrays: Batch, rows: Int[Array, " B"]) -> tuple[Batch, Float[Array, " B"]]:
    """The rows (B,) of named examples, -1 for none, and 1.0 for each that is one."""
    valid, there = (rows >= 0).astype(jnp.float32), jnp.maximum(rows, 0)
    return {n: x.at[there].get(mode="promise_in_bounds") for n, x in arrays.items()}, valid


class Seen(NamedTuple):
    """Sums over the units of a batch: feedback (L, K), loss () and units ()."""

    feedback: Feedback
    loss: Array
    units: Array


def _gradient(
    learner: Learner, params: Params, batch: Batch, valid: Array, known: Known
) -> tuple[PyTree, Seen]:
    """Gradient of the batch's mean loss, a tile of its examples at a time."""
    loss = partial(objective, learner, known)
    take = jax.grad(loss, has_aux=True)
    first = jax.tree.map(lambda x: x[:1], (batch, valid))
    tiles = learner.local.tiles(partial(largest_array, loss, params, *first))
    if tiles == 1:
        return take(params, batch, valid)
    cut = jax.tree.map(lambda x: x.reshape(tiles, -1, *x.shape[1:]), (batch, valid))
    count = jnp.maximum(weights_of(learner.task, batch, valid).sum(), 1.0)

    def add(total: tuple[PyTree, Seen], tile: tuple[Batch, Array]) -> tuple[tuple, None]:
        part, seen = take(params, *tile)
        share = seen.units / count
        slope = jax.tree.map(lambda t, g: t + share * g, total[0], part)
        return (slope, jax.tree.map(jnp.add, total[1], seen)), None

    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(take, params, *jax.tree.map(lambda x: x[0], cut)),
    )
    return lax.scan(add, nothing, cut)[0]


def objective(
    learner: Learner, known: Known, params: Params, batch: Batch, valid: Float[Array, " B"]
) -> tuple[Float[Array, ""], Seen]:
    """What a client's steps make small on a batch, of whose rows (B,) some are padding."""
    task, local, held = learner.task, learner.local, known.held
    outputs, routings = learner.apply(params, task.inputs(batch), held)
    if known.log_share is not None and task.adjust is not None:
        outputs = task.adjust(outputs, local.prior * known.log_share)
    weight = weights_of(task, batch, valid)
    losses = task.loss(outputs, batch).astype(jnp.float32)
    units = weight.sum()
    loss = (losses * weight).sum() / jnp.maximum(units, 1.0)
    for name in learner.layers if local.balance or local.z else ():
        routing, counted = _flat(routings[name], weight)
        if local.balance:
            loss += local.balance * balance_loss(routing, held[name], counted)
        if local.z:
            loss += local.z * router_z_loss(routing, held[name], counted)
    for name in learner.layers:
        if routings[name].router is not None and known.slots is not None:
            loss += router_loss(*_flat(routings[name], weight), known.slots[name])
    hits = None if task.hits is None else task.hits(outputs, batch).astype(jnp.float32)
    each = [_feedback(routings[name].selected, losses, hits, weight) for name in learner.layers]
    none = jnp.zeros((0, 1), jnp.float32)
    stacked = [jnp.stack(sums) if sums else none for sums in zip(*each, strict=True)] or [none] * 3
    return loss, Seen(Feedback(*stacked), (losses * weight).sum(), units)


def _feedback(selected: Array, losses: Array, hits: Array | None, weight: Array) -> Feedback:
    """(K,) sums of a layer: a unit that is routed in parts counts in parts."""
    share = fractions(selected, weight)  # (units, K)
    correct = jnp.zeros(share.shape[1:], jnp.float32) if hits is None else hits.ravel() @ share
    return Feedback(share.sum(axis=0), correct, losses.ravel() @ share)


def _flat(routing: Routing, weight: Array) -> tuple[Routing, Array]:
    """A routing with one leading axis, and the weight of each of what is routed."""
    leading = routing.selected.shape[:-1]
    inner = weight.reshape(*weight.shape, *[1] * (len(leading) - weight.ndim))
    counted = jnp.broadcast_to(inner, leading) if inner.ndim == len(leading) else weight
    if weight.ndim > len(leading):
        counted = weight.max(axis=tuple(range(len(leading), weight.ndim)))
    flat: Routing = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), routing)
    return flat, counted.ravel()


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
