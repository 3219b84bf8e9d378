"""Evaluation of a model's outputs on test examples: sums by class, or over some examples.

Axis legend: `B` batch, `U` units of an example, `Y` classes (one column for all examples if they
have no class).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from flexmoe_jax.client.training import add_up
from flexmoe_jax.client.units import mean_of
from flexmoe_jax.tasks import Batch, Task
from flexmoe_jax.types import Array, PyTree, Tally


class Judge:
    """Sums hits and losses of a model's outputs on a batch of test examples.

    Args:
      task: the learning task.
      arrays: named examples, leaves (B, ...).
      valid: (B,) bool; False marks padding.
      classes: Y; 0 if examples have no class.
    """

    def __init__(self, task: Task, arrays: Batch, valid: Bool[Array, " B"], classes: int) -> None:
        """Computes the weight and the class of each example."""
        self._task, self._arrays = task, arrays
        real = valid.astype(jnp.float32)
        weight = task.weight(arrays).astype(jnp.float32)
        self._weight = weight * real.reshape(-1, *[1] * (weight.ndim - 1))
        column = jnp.ones((real.size, 1), jnp.float32)
        if task.labels is not None and classes:
            column = jax.nn.one_hot(task.labels(arrays), classes, dtype=jnp.float32)
        self._column = column

    def by_class(self, outputs: PyTree) -> Tally:
        """Returns the sums (Y,) by class."""
        return jax.tree.map(lambda x: add_up(x, self._column), self._of_examples(outputs))

    def of_rows(self, outputs: PyTree, chosen: Bool[Array, " B"]) -> Tally:
        """Returns the sums () over the examples `chosen` (B,) bool."""
        return jax.tree.map(lambda x: jnp.where(chosen, x, 0.0).sum(), self._of_examples(outputs))

    def all_rows(self, outputs: PyTree) -> Tally:
        """Returns the sums () over all examples."""
        return jax.tree.map(jnp.sum, self._of_examples(outputs))

    def units(self) -> Float[Array, " B"]:
        """Returns the number of units (B,) of each example."""
        return self._weight.reshape(self._weight.shape[0], -1).sum(axis=1)

    def units_by_class(self) -> Float[Array, " Y"]:
        """Returns the number of units (Y,) of each class."""
        return add_up(self.units(), self._column)

    def _of_examples(self, outputs: PyTree) -> Tally:
        """Returns the sums (B,) over the units of each example."""

        def add_up(values: Array) -> Array:
            counted = jnp.where(self._weight > 0, self._weight * values.astype(jnp.float32), 0.0)
            return counted.reshape(counted.shape[0], -1).sum(axis=1)

        hits = self._task.hits
        return Tally(
            None if hits is None else add_up(hits(outputs, self._arrays)),
            add_up(self._task.loss(outputs, self._arrays)),
        )


def weigh_classes(
    by_class: Tally, units: Float[Array, " Y"], share: Float[Array, "*C Y"]
) -> tuple[Tally, Float[Array, "*C"]]:
    """Computes personal figures from a common test set: class means weighted by label shares.

    Args:
      by_class: (..., Y) sums of each client's model.
      units: (Y,) test units of each class.
      share: (..., Y) label shares of each client's training examples.

    Returns:
      Sums (...) and weights (...): a sum divided by its weight is the mean. The weight is the part
      of the client's label shares whose classes are in the test set.
    """
    of_each = jnp.broadcast_to(units, share.shape)
    known = jnp.where(of_each > 0, share, 0.0)
    factor = mean_of(known, of_each)
    return jax.tree.map(lambda x: (x * factor).sum(axis=-1), by_class), known.sum(axis=-1)
