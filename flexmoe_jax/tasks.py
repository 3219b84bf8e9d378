"""What is learnt: how a model's outputs are judged, unit by unit.

A unit is what is judged by itself: a picture, a token of a text, a row of numbers. Everything here
is a pure function of outputs and a batch, with leading axes (B, U...); a picture has no `U`.

Axis legend: `B` batch, `U` units of an example, `Y` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Array, PyTree

__all__ = [
    "Batch",
    "Task",
    "classification",
    "cross_entropy",
    "next_token",
    "regression",
]

Batch = Mapping[str, Array]
"""Named arrays of a batch, leaves (B, ...)."""


class Task(NamedTuple):
    """What is learnt; a task of one's own is a record of such functions.

    Attributes:
      name: of the task.
      inputs: (batch) -> what the model takes.
      loss: (outputs, batch) -> loss (B, U...) of each unit, in nats where outputs are logits.
      hits: (outputs, batch) -> (B, U...) in [0, 1], how far each unit is right; None where nothing
        is right or wrong.
      weight: (batch) -> (B, U...) how much each unit counts: 1, or 0 for padding inside an example.
      mean: from and back to outputs: what of several models' outputs is averaged for their joint
        prediction, and outputs again from that average.
      labels: (batch) -> (B,) the class of each example; None where examples have none.
      adjust: (outputs, log of label shares (Y,)) -> outputs of a client that knows its own label
        shares (Bayes' rule); None where examples have no class.
      check: (named arrays, example shape of the outputs) -> None; refuses what does not fit.
    """

    name: str
    inputs: Callable[[Batch], PyTree]
    loss: Callable[[PyTree, Batch], Array]
    hits: Callable[[PyTree, Batch], Array] | None
    weight: Callable[[Batch], Array]
    mean: tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]
    labels: Callable[[Batch], Array] | None
    adjust: Callable[[PyTree, Array], PyTree] | None
    check: Callable[[Mapping[str, np.ndarray], tuple[int, ...]], None]


def _identity(outputs: PyTree) -> PyTree:
    return outputs


def _log(probability: Array) -> Array:
    return jnp.log(jnp.maximum(probability, 1e-30))


# The mean of probabilities, and its logarithm, which is logits again.
_PROBABILITIES = jax.nn.softmax, _log


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy (...,) in nats of logits (..., Y) and classes (...,)."""
    # Not by the label's place in a row: taking one entry out of each, and putting its gradient
    # back, is slow on a CPU.
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, one_hot)


def _likeliest(logits: Array) -> Array:
    # The first of the greatest, as `argmax` has it, whose reduction of pairs is slow on a CPU.
    greatest = logits.max(axis=-1, keepdims=True)
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    index = index.reshape(*[1] * (logits.ndim - 1), -1)
    return jnp.where(logits < greatest, jnp.int32(logits.shape[-1]), index).min(axis=-1)


def classification(inputs: str = "images", labels: str = "labels") -> Task:
    """Each example is of one of Y classes; outputs are logits (B, Y)."""

    def check(arrays: Mapping[str, np.ndarray], outputs: tuple[int, ...]) -> None:
        given = _require(arrays, labels)
        if not np.issubdtype(given.dtype, np.integer) or given.ndim != 1:
            found = f"{given.dtype} of shape {given.shape}"
            raise InputError(labels, found, "classification takes a whole number for each example")
        if len(outputs) != 1:
            raise InputError("model", outputs, "classification takes outputs (B, classes)")
        if given.size and not 0 <= given.min() <= given.max() < outputs[0]:
            worst = given.min() if given.min() < 0 else given.max()
            raise InputError(labels, worst, f"the model tells classes 0 to {outputs[0] - 1} apart")

    return Task(
        name="classification",
        inputs=lambda batch: batch[inputs],
        loss=lambda logits, batch: cross_entropy(logits, batch[labels]),
        hits=lambda logits, batch: _likeliest(logits) == batch[labels].astype(jnp.int32),
        weight=lambda batch: jnp.ones(batch[labels].shape, jnp.float32),
        mean=_PROBABILITIES,
        labels=lambda batch: batch[labels],
        adjust=lambda logits, log_share: logits + log_share[None],
        check=check,
    )


def next_token(tokens: str = "tokens") -> Task:
    """Each token of a text follows from those before it; outputs are logits (B, S, vocabulary).

    The array holds S + 1 tokens an example: the first S go in, the last S are to be told. A token
    below 0 is padding, and counts nothing.
    """

    def check(arrays: Mapping[str, np.ndarray], outputs: tuple[int, ...]) -> None:
        given = _require(arrays, tokens)
        if not np.issubdtype(given.dtype, np.integer) or given.ndim != 2 or given.shape[1] < 2:
            found = f"{given.dtype} of shape {given.shape}"
            raise InputError(tokens, found, "next_token takes whole numbers (M, tokens), 2 or more")
        if len(outputs) != 2 or outputs[0] != given.shape[1] - 1:
            remedy = f"next_token takes outputs (B, {given.shape[1] - 1}, vocabulary)"
            raise InputError("model", outputs, remedy)
        if given.size and given.max() >= outputs[1]:
            raise InputError(tokens, given.max(), f"the model's vocabulary has {outputs[1]}")

    def target(batch: Batch) -> Array:
        return jnp.maximum(batch[tokens][:, 1:].astype(jnp.int32), 0)

    return Task(
        name="next_token",
        inputs=lambda batch: jnp.maximum(batch[tokens][:, :-1].astype(jnp.int32), 0),
        loss=lambda logits, batch: cross_entropy(logits, target(batch)),
        hits=lambda logits, batch: _likeliest(logits) == target(batch),
        weight=lambda batch: (batch[tokens][:, 1:].astype(jnp.int32) >= 0).astype(jnp.float32),
        mean=_PROBABILITIES,
        labels=None,
        adjust=None,
        check=check,
    )


def regression(inputs: str = "images", targets: str = "labels") -> Task:
    """Each example has numbers to be told; the loss is half the squared distance, summed."""

    def check(arrays: Mapping[str, np.ndarray], outputs: tuple[int, ...]) -> None:
        given = _require(arrays, targets)
        if not np.issubdtype(given.dtype, np.floating) or not np.isfinite(given).all():
            found = f"{given.dtype} of shape {given.shape}"
            raise InputError(targets, found, "regression takes finite floating-point numbers")
        if outputs != (given.shape[1:] or (1,)):
            remedy = f"the targets of an example have shape {given.shape[1:] or (1,)}"
            raise InputError("model", outputs, remedy)

    def loss(outputs: Array, batch: Batch) -> Array:
        given = batch[targets].astype(outputs.dtype).reshape(outputs.shape)
        return 0.5 * jnp.square(outputs - given).reshape(outputs.shape[0], -1).sum(axis=1)

    return Task(
        name="regression",
        inputs=lambda batch: batch[inputs],
        loss=loss,
        hits=None,
        weight=lambda batch: jnp.ones(batch[targets].shape[0], jnp.float32),
        mean=(_identity, _identity),
        labels=None,
        adjust=None,
        check=check,
    )


TASKS: dict[str, Callable[[], Task]] = {
    "classification": classification,
    "next_token": next_token,
    "regression": regression,
}
"""Tasks by the name that `task.name` takes."""


def _require(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        held = ", ".join(arrays) or "none"
        raise InputError("task", name, f"the examples have no such array; they have {held}")
    # NumPy's: where JAX compares a byte with 256, that becomes a byte, too.
    return np.asarray(arrays[name])
