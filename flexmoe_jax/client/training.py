"""Local training of a client on its own examples in a round.

These functions know nothing about other clients or the server: a simulation maps them over many
clients, and a real client calls them directly.

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
from flexmoe_jax.client.units import fractions, mean_of, weights_of
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.client import LocalLoss, LocalWork
from flexmoe_jax.options.execution import ExecutionOptions
from flexmoe_jax.tasks import Batch, Task
from flexmoe_jax.types import Array, Download, Feedback, Key, Params, PyTree, Routing

Sizes = TypeVar("Sizes", Array, np.ndarray)
"""Integers, as an array on the device or on the host."""

Routings = dict[str, Routing]
Held = dict[str, Array]
Apply = Callable[[Params, PyTree, Held], tuple[PyTree, Routings]]
"""(params, model inputs (B, ...), held slots by layer (K,)) -> outputs and routings by layer."""

Augment = Callable[[Batch, Array], Batch]
"""(batch, random bits (B,) uint32) -> the batch with randomly changed inputs."""

# Bytes of a tile's largest array that still fits in a core's cache, and the largest batch that is
# not worth cutting: every tile adds a gradient as large as the model.
_CACHED, _WHOLE = 5 * 2**18, 12


@dataclass(frozen=True)
class LocalTraining(LocalWork, LocalLoss):
    """How a client trains; the two base classes describe the other options.

    Attributes:
      optimizer: optax transform over a client's `Params`; its state is initialised each round.
      tile: number of examples whose gradient is computed at once, to stay in cache. The batch's
        gradient is the sum over its tiles. 0 for automatic: on CPU, for batches above 12, as many
        examples as fit, by the largest array that the model computes for one example; elsewhere the
        whole batch. With a balance loss it is the batch, over which use is counted.
      decay: optax schedule, number of the round -> factor on its steps; None for a factor of 1.
      augment: random augmentation of every batch: (named arrays (B, ...), random bits (B,) uint32,
        new in every step) -> arrays of the same shapes; None for no augmentation.
    """

    optimizer: optax.GradientTransformation
    tile: int = ExecutionOptions.tile
    decay: optax.Schedule | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        """Checks that the values are in range and that `optimizer` is an optax transform."""
        super().__post_init__()
        check_transform("optimizer", self.optimizer)

    def tiles(self, example_bytes: Callable[[], int]) -> int:
        """Returns the smallest number of equal tiles such that no tile exceeds the limit.

        Args:
          example_bytes: returns the size of the largest array that the model computes for one
            example; called only if the size is needed.
        """
        most = self.tile or self.batch_size
        if self.balance:
            most = self.batch_size
        elif not self.tile and self.batch_size > _WHOLE and jax.default_backend() == "cpu":
            most = max(1, _CACHED // example_bytes())
        tiles = -(-self.batch_size // most)
        return next(n for n in range(tiles, self.batch_size + 1) if self.batch_size % n == 0)

    def steps(self, size: Sizes) -> Sizes:
        """Returns a client's local steps per round for `size` examples, elementwise, int32."""
        steps = self.epochs * self.steps_per_epoch(size)
        return steps.clip(max=self.max_steps) if self.max_steps else steps

    def examples(self, size: Sizes) -> Sizes:
        """Returns the examples that a client trains on in a round, counted once per step."""
        epochs, rest = divmod(self.steps(size), self.steps_per_epoch(size))
        return epochs * size + (rest * self.batch_size).clip(max=size)

    def steps_per_epoch(self, size: Sizes) -> Sizes:
        """Returns the number of batches in a pass over `size` examples; the last may be smaller."""
        return -(-size // self.batch_size)


def check_transform(field: str, value: object) -> None:
    """Checks that a value is an optax transform.

    Raises:
      InputError: it is not; the error names the field.
    """
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise InputError(field, value, "give an optax transform, as optax.sgd(0.1)")


def proximal(weight: float) -> optax.GradientTransformation:
    """Adds the gradient of `weight/2 · |p - p_start|²` (FedProx, arXiv 1812.06127).

    The penalty applies to the averaged parameters, ψ and θ, not to those that stay with the client.
    Chain this transform before the optimizer.

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
    """Scales the steps of a client's experts and gate, and leaves all other steps unchanged.

    An example's gradient reaches only the expert that the example was routed to, multiplied by the
    gate's probability. With K evenly used experts this is about 1/K² of the gradient of a dense
    layer in their place, and plain SGD does not correct for it. Chain this transform after the
    optimizer.

    Args:
      factor: factor on these steps; K² compensates for the smaller gradient.
    """
    mixture = Params(shared=False, experts=True, gate=True, private=False)
    return optax.masked(optax.scale(factor), mixture)


class Batches(NamedTuple):
    """The batches of a client's local steps.

    Attributes:
      rows: (S, B) int32 rows of the arrays of examples, -1 for padding.
      bits: (S, B) uint32 random bits for augmentation; None without augmentation.
    """

    rows: Array
    bits: Array | None = None


def draw_batches(
    local: LocalTraining, key: Key, index: Int[Array, " N"], size: Int[Array, ""]
) -> Batches:
    """Draws a client's batches of a round: its examples, in a new random order every epoch.

    Args:
      local: how clients train.
      key: the client's key for this round.
      index: (N,) rows of its examples in the arrays, then padding.
      size: () number of its examples.

    Returns:
      Batches for S steps, the number of steps of a client with N examples. Rows are -1 where a
      batch is not full, and in all steps after the client's own last step.
    """
    padded = index.shape[0]
    numbers = partial(jnp.arange, dtype=jnp.int32)
    # Padding comes last, so that it does not change the random numbers of the real examples.
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
    """The state of a client's local training, during and after it.

    Attributes:
      params: current parameters, with experts and gate reduced to the K slots.
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
    """The model, the task and the options that a client needs to train.

    Attributes:
      apply: runs the model.
      task: the learning task.
      local: how the client trains.
      layers: names of the L MoE layers.
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
    """Trains a client for `down.steps` steps; each batch is scored before the step trains on it.

    Args:
      learner: model, task and training options.
      start: parameters at the start, with experts and gate reduced to the K slots.
      arrays: named examples, leaves (M, ...); the batches refer to their rows.
      batches: batches of the round.
      held: (K,) bool by MoE layer, slots that hold an expert.
      down: the server's download, with the slots, the number of steps, and the round.
      log_share: (Y,) logarithm of the client's label shares, which never leaves it; None if unused.
    """

    def by_layer(of_groups: Array) -> Held:  # (G, K), where G is 1 or L.
        of_layers = jnp.broadcast_to(of_groups, (len(learner.layers), of_groups.shape[-1]))
        return dict(zip(learner.layers, of_layers, strict=True))

    known = Known(
        arrays,
        held,
        log_share if learner.local.prior else None,
        by_layer(down.slots),
        None if down.use is None else by_layer(down.use),
    )
    zeros = jnp.zeros((len(learner.layers), down.slots.shape[-1]), jnp.float32)
    nothing = jnp.zeros((), jnp.float32)
    optimizer = learner.local.optimizer.init(start)
    begun = Trained(start, optimizer, Feedback(zeros, zeros, zeros), nothing, nothing, nothing)

    def step(t: Array, state: Trained) -> Trained:
        batch = jax.tree.map(lambda x: x[t], batches)
        return _step(learner, known, down.round, state, batch)

    return lax.fori_loop(0, down.steps, step, begun)


class Known(NamedTuple):
    """The constants of a client's training: its examples, held slots and label shares.

    `slots` holds the expert numbers (K,) of each layer, for the router loss; None to leave it out.
    `use` holds the parts (K,) of the units that each expert should get; None for even parts.
    """

    arrays: Batch
    held: Held
    log_share: Array | None
    slots: Held | None = None
    use: Held | None = None


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
    """Returns the rows (B,) of named examples, and 1.0 for each real row, 0.0 for a row of -1.

    In place of a row of -1 stands the first row, so that nobody computes with another's examples.
    """
    valid = (rows >= 0).astype(jnp.float32)
    there = jnp.where(rows >= 0, rows, jnp.maximum(rows[0], 0))
    return {n: x.at[there].get(mode="promise_in_bounds") for n, x in arrays.items()}, valid


class Seen(NamedTuple):
    """Sums over the units of a batch: feedback (L, K), loss () and units ()."""

    feedback: Feedback
    loss: Array
    units: Array


def _gradient(
    learner: Learner, params: Params, batch: Batch, valid: Array, known: Known
) -> tuple[PyTree, Seen]:
    """Computes the gradient of the batch's mean loss, one tile of examples at a time."""
    loss = partial(objective, learner, known)
    take = jax.grad(loss, has_aux=True)
    first = jax.tree.map(lambda x: x[:1], (batch, valid))
    tiles = learner.local.tiles(partial(largest_array, loss, params, *first))
    if tiles == 1:
        return take(params, batch, valid)
    take = jax.jit(take)  # One trace for the shapes and for the tiles.
    cut = jax.tree.map(lambda x: x.reshape(tiles, -1, *x.shape[1:]), (batch, valid))
    units = weights_of(learner.task, batch, valid).sum()

    def add(total: tuple[PyTree, Seen], tile: tuple[Batch, Array]) -> tuple[tuple, None]:
        part, seen = take(params, *tile)
        share = mean_of(seen.units, units)
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
    """Computes the loss that a client minimises on a batch; only `valid` rows (B,) count."""
    task, local, held = learner.task, learner.local, known.held
    outputs, routings = learner.apply(params, task.inputs(batch), held)
    if known.log_share is not None and task.adjust is not None:
        outputs = task.adjust(outputs, local.prior * known.log_share)
    weight = weights_of(task, batch, valid)
    losses = task.loss(outputs, batch).astype(jnp.float32)
    losses = jnp.where(weight > 0, losses, 0.0)
    units = weight.sum()
    loss = mean_of((losses * weight).sum(), units)
    for name in learner.layers if local.balance or local.z else ():
        routing, counted = _flat(routings[name], weight)
        if local.balance:
            use = None if known.use is None else known.use[name]
            loss += local.balance * balance_loss(routing, held[name], counted, use)
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
    """Returns the feedback sums (K,) of a layer; a unit routed in parts counts in parts."""
    share = fractions(selected, weight)  # (units, K)
    right = jnp.zeros(losses.size, jnp.float32) if hits is None else hits.ravel()
    return Feedback(share.sum(axis=0), add_up(right, share), add_up(losses.ravel(), share))


def add_up(values: Array, part: Array) -> Array:
    """Returns the sums (K,) of values (B,) by the part (B, K) of each that belongs to a column."""
    # On accelerators the default precision would round the values to 10 bits.
    return jnp.matmul(values, part, precision=jax.lax.Precision.HIGHEST)


def _flat(routing: Routing, weight: Array) -> tuple[Routing, Array]:
    """Flattens a routing to one leading axis, and returns the weight of each routed item.

    An item larger than a unit, such as a whole text, weighs as much as its units together.
    """
    leading = routing.selected.shape[:-1]
    inner = weight.reshape(*weight.shape, *[1] * (len(leading) - weight.ndim))
    counted = jnp.broadcast_to(inner, leading) if inner.ndim == len(leading) else weight
    if weight.ndim > len(leading):
        counted = weight.sum(axis=tuple(range(len(leading), weight.ndim)))
    flat: Routing = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), routing)
    return flat, counted.ravel()


def largest_array(function: Callable[..., PyTree], *inputs: PyTree) -> int:
    """Returns the bytes of the largest intermediate array of a function of these inputs."""

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
