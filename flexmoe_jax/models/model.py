"""What the framework asks of a model: pure functions, whatever library it is written in.

Axis legend: `B` batch, `E` experts, `K` expert slots, `L` MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flexmoe_jax.errors import InputError
from flexmoe_jax.models.ownership import ROOT, mark_paths
from flexmoe_jax.options.models import ModelOptions
from flexmoe_jax.types import Array, Key, PyTree, Routing

Held = Mapping[str, Array]
"""MoE layer to the experts or slots (E,) or (K,) bool that may be used."""
Routings = dict[str, Routing]
"""MoE layer to where its inputs went."""


class Model(NamedTuple):
    """A model with any number of MoE layers, as pure functions of its parameters.

    Its stacks of experts take their size from the parameters that are there, so that one model runs
    on all E experts and on the K that a client holds.

    Attributes:
      init: (key, inputs (B, ...)) -> parameters, those of experts and gates `Marked`.
      trunk: (parameters, inputs) -> features that do not depend on any expert or gate, for what all
        clients compute alike.
      head: (parameters, features, held) -> (outputs, routings).
    """

    init: Callable[[Key, PyTree], PyTree]
    trunk: Callable[[PyTree, PyTree], PyTree]
    head: Callable[[PyTree, PyTree, Held], tuple[PyTree, Routings]]

    def after(self, prepare: Callable[[PyTree], PyTree]) -> Model:
        """The same model of inputs that go through a function first, as a standardisation."""
        return self._replace(
            init=lambda key, inputs: self.init(key, prepare(inputs)),
            trunk=lambda params, inputs: self.trunk(params, prepare(inputs)),
        )

    def computed_in(self, dtype: str) -> Model:
        """The same model, with its products in another precision; parameters stay as they are.

        Inputs and features are cast, and the modules here compute in the type of what reaches
        them, except where it would cost accuracy: gates, norms and outputs are in single precision.

        Args:
          dtype: `float32` or `bfloat16`.

        Raises:
          InputError: another type.
        """
        ModelOptions.check(dtype=dtype)

        def cast(tree: PyTree) -> PyTree:
            return jax.tree.map(
                lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
            )

        return self._replace(
            trunk=lambda params, inputs: self.trunk(params, cast(inputs)),
            head=lambda params, features, held: self.head(params, cast(features), held),
        )

    def apply(self, params: PyTree, inputs: PyTree, held: Held) -> tuple[PyTree, Routings]:
        """The whole model."""
        return self.head(params, self.trunk(params, inputs), held)


def from_functions(
    init: Callable[[Key, PyTree], PyTree],
    apply: Callable[[PyTree, PyTree, Held], tuple[PyTree, Routings]],
    rules: Mapping[str, str],
) -> Model:
    """A model of any library as a model: plain functions, and who owns what by paths.

    Args:
      init: (key, inputs (B, ...)) -> parameters, any pytree of arrays.
      apply: (parameters, inputs, held) -> (outputs, routings); see `Model`.
      rules: which parameters are of experts and of gates; see `mark_paths`. All of these lead with
        the expert axis.
    """

    def init_marked(key: Key, inputs: PyTree) -> PyTree:
        return mark_paths(init(key, inputs), rules)

    return Model(init_marked, lambda params, inputs: inputs, apply)


def from_linen(module: nn.Module, *, trunk: str = "", head: str = "__call__") -> Model:
    """A Linen module as a model: its `MoELayer`s, wherever they stand, find their masks.

    Args:
      module: of parameters alone (no batch statistics, no dropout), with MoE layers.
      trunk: method from inputs to features; empty for none.
      head: method from features to outputs.

    Raises:
      InputError: when it is initialised or run, if it keeps more than parameters.
    """

    def init(key: Key, inputs: PyTree) -> PyTree:
        made: Any = module.init(key, inputs)
        others = ", ".join(name for name in made if name not in ("params", "routing"))
        if others:
            remedy = "a model is made of parameters alone, without batch statistics or other state"
            raise InputError("model", f"{type(module).__name__} with {others}", remedy)
        return made["params"]

    def run_trunk(params: PyTree, inputs: PyTree) -> PyTree:
        return module.apply({"params": params}, inputs, method=trunk) if trunk else inputs

    def run_head(params: PyTree, features: PyTree, held: Held) -> tuple[PyTree, Routings]:
        masks = {(*place, "mask"): m for layer, m in held.items() for place in _places(layer)}
        variables = {"params": params, "held": _unflatten(masks)}
        outputs, kept = module.apply(variables, features, method=head, mutable=["routing"])
        found = {
            "/".join(path[:-1]) or ROOT: sown[0]
            for path, sown in _flatten(kept.get("routing", {})).items()
        }
        return outputs, found

    return Model(init, run_trunk, run_head)


def _places(layer: str) -> list[tuple[str, ...]]:
    """Where a layer may stand: the one at the top may also be a module of that name."""
    return [tuple(layer.split("/")), *([()] if layer == ROOT else [])]


# Flax leaves them without types.
_flatten: Any = flatten_dict
_unflatten: Any = unflatten_dict
