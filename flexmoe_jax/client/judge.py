"""What a model's outputs are worth on test examples: sums by class, or over some of them.

Axis legend: `B` batch, `U` units of an example, `Y` classes (one column for all examples where they
have no class).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from flexmoe_jax.tasks import Batch, Task
from flexmoe_jax.types import Array, PyTree, Tally


class Judge:
    """Sums up what outputs are worth on a batch of test examples.

    Args:
      task: what is learnt.
      arrays: named examples, leaves (B, ...).
      valid: (B,) bool; False marks padding.
      classes: Y; 0 where examples have none.
    """

    def __init__(self, task: Task, arrays: Batch, valid: Bool[Array, " B"], classes: int) -> None:
        """Weighs the examples."""
        self._task, self._arrays = task, arrays
        real = valid.astype(jnp.float32)
        weight = task.weight(arrays).astype(jnp.float32)
        self._weight = weight * real.reshape(-1, *[1] * (weight.ndim - 1))
        column = jnp.ones((real.size, 1), jnp.float32)
        if task.labels is not None and classes:
            column = jax.nn.one_hot(task.labels(arrays), classes, dtype=jnp.float32)
        self._column = column

    def by_class(self, outputs: PyTree) -> Tally:
        """(Y,) sums by class."""
        return jax.tree.map(lambda x: x @ self._column, self._of_examples(outputs))

    def of_rows(self, outputs: PyTree, chosen: Bool[Array, " B"]) -> Tally:
        """() sums over the examples chosen (B,) bool."""
        return jax.tree.map(lambda x: jnp.where(chosen, x, 0.0).sum(), self._of_examples(outputs))

    def all_rows(self, outputs: PyTree) -> Tally:
        """() sums over all examples."""
        return jax.tree.map(jnp.sum, self._of_examples(outputs))

    def units(self) -> Float[Array, " B"]:
        """(B,) units of each example."""
        return self._weight.reshape(self._weight.shape[0], -1).sum(axis=1)

    def units_by_class(self) -> Float[Array, " Y"]:
        """(Y,) units of each class."""
        return self.units() @ self._column

    def _of_examples(self, outputs: PyTree) -> Tally:
        """(B,) sums over the units of each example."""

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
    """Personal figures from a common test set: means over its classes, weighted by label shares.

    Args:
      by_class: (..., Y) sums of each client's model.
      units: (Y,) test units of each class.
      share: (..., Y) of each client's training examples.

    Returns:
      (...) sums whose quotients by the weights are the means; and these weights, the part of a
      client's label shares whose classes the test set has.
    """
    of_each = jnp.broadcast_to(units, share.shape)
    known = jnp.where(of_each > 0, share, 0.0)
    factor = known / jnp.maximum(of_each, 1.0)
    return jax.tree.map(lambda x: (x * factor).sum(axis=-1), by_class), known.sum(axis=-1)
