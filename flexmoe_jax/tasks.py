"""Learning tasks: losses and metrics of a model's outputs, unit by unit.

A unit is the smallest thing with its own loss: an image, a token of a text, a row of numbers. All
functions here are pure functions of outputs and a batch, with leading axes (B, U...). For images
there are no axes `U`.

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
    """A learning task; to define your own, make a record of these functions.

    Attributes:
      name: name of the task.
      inputs: (batch) -> the model's inputs.
      loss: (outputs, batch) -> loss (B, U...) of each unit, in nats if outputs are logits.
      hits: (outputs, batch) -> (B, U...) in [0, 1], correctness of each unit; None if the task does
        not define correctness.
      weight: (batch) -> (B, U...) how much each unit counts, at least 0: 1 for all in most tasks,
        and 0 for padding inside an example.
      mean: two functions for the joint prediction of several models. The first maps outputs to the
        values that are averaged; the second maps the average back to outputs.
      labels: (batch) -> (B,) the class of each example; None if examples have no class.
      adjust: (outputs, log of label shares (Y,)) -> outputs of a client that knows its own label
        shares (Bayes' rule); None if examples have no class.
      check: (named arrays, example shape of the outputs) -> None; raises `InputError` if they do
        not fit the task.
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


# Probabilities are averaged; the logarithm of their mean gives logits again.
_PROBABILITIES = jax.nn.softmax, _log


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy (...,) in nats of logits (..., Y) and classes (...,)."""
    # One-hot rather than indexing: gathering one entry per row, and scattering its gradient back,
    # is slow on a CPU.
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, one_hot)


def _likeliest(logits: Array) -> Array:
    # The first index of the maximum, as in `argmax`. XLA's argmax reduces pairs, which is slow on a
    # CPU.
    greatest = logits.max(axis=-1, keepdims=True)
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    index = index.reshape(*[1] * (logits.ndim - 1), -1)
    return jnp.where(logits < greatest, jnp.int32(logits.shape[-1]), index).min(axis=-1)


def classification(inputs: str = "images", labels: str = "labels") -> Task:
    """Makes the task in which each example has one of Y classes; outputs are logits (B, Y)."""

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
    """Makes the task to predict each token of a text; outputs are logits (B, S, vocabulary).

    The array holds S + 1 tokens per example: the first S are the inputs, the last S the targets. A
    token below 0 is padding and has weight 0.
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
    """Makes the task to predict numbers of each example; loss: half the summed squared error."""

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
}
"""Functions that make a task, by the values of the option `task.name`. No data source of the
launcher has the targets of a regression."""


def _require(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        held = ", ".join(arrays) or "none"
        raise InputError("task", name, f"the examples have no such array; they have {held}")
    # As a NumPy array: if JAX compares a uint8 array with 256, it converts 256 to uint8, too.
    return np.asarray(arrays[name])
