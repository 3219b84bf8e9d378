"""The interface of a model: pure functions, whatever library the model is written in.

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
"""MoE layer to a mask (E,) or (K,) bool of the experts or slots that may be used."""
Routings = dict[str, Routing]
"""MoE layer to the routing of its inputs."""


class Model(NamedTuple):
    """A model with any number of MoE layers, as pure functions of its parameters.

    The parameters determine the size of the stacks of experts, so the same model runs on all E
    experts and on the K experts that a client holds.

    Attributes:
      init: (key, inputs (B, ...)) -> parameters; those of experts and gates are `Marked`.
      trunk: (parameters, inputs) -> features that do not depend on any expert or gate, so that they
        can be the same for all clients.
      head: (parameters, features, held) -> (outputs, routings).
    """

    init: Callable[[Key, PyTree], PyTree]
    trunk: Callable[[PyTree, PyTree], PyTree]
    head: Callable[[PyTree, PyTree, Held], tuple[PyTree, Routings]]

    def after(self, prepare: Callable[[PyTree], PyTree]) -> Model:
        """Returns the same model with a function, such as a standardisation, applied to inputs."""
        return self._replace(
            init=lambda key, inputs: self.init(key, prepare(inputs)),
            trunk=lambda params, inputs: self.trunk(params, prepare(inputs)),
        )

    def computed_in(self, dtype: str) -> Model:
        """Returns the same model with its products in another precision; parameters are not cast.

        Inputs and features are cast. The modules of this package compute in the type of their
        inputs, except where that would reduce accuracy: gates, norms and outputs are in single
        precision.

        Args:
          dtype: `float32` or `bfloat16`.

        Raises:
          InputError: any other type.
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
        """Runs the whole model: the trunk, then the head."""
        return self.head(params, self.trunk(params, inputs), held)


def from_functions(
    init: Callable[[Key, PyTree], PyTree],
    apply: Callable[[PyTree, PyTree, Held], tuple[PyTree, Routings]],
    rules: Mapping[str, str],
) -> Model:
    """Makes a `Model` of plain functions from any library, with rules that mark parameters by path.

    Args:
      init: (key, inputs (B, ...)) -> parameters, any pytree of arrays.
      apply: (parameters, inputs, held) -> (outputs, routings); see `Model`.
      rules: which parameters belong to experts and to gates; see `mark_paths`. The first axis of
        all these parameters is the expert axis.
    """

    def init_marked(key: Key, inputs: PyTree) -> PyTree:
        return mark_paths(init(key, inputs), rules)

    return Model(jax.jit(init_marked), lambda params, inputs: inputs, apply)


def from_linen(module: nn.Module, *, trunk: str = "", head: str = "__call__") -> Model:
    """Makes a `Model` of a Linen module; its `MoELayer`s find their masks at any place in it.

    Args:
      module: has only parameters (no batch statistics, no dropout), and MoE layers.
      trunk: name of the method from inputs to features; empty for none.
      head: name of the method from features to outputs.

    Raises:
      InputError: when the model is initialised, if the module keeps more than parameters.
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
        found = {}
        for path, sown in _flatten(kept.get("routing", {})).items():
            layer = "/".join(path[:-1]) or ROOT
            if len(sown) > 1:
                remedy = "call each MoE layer once: the server learns from one routing of each"
                raise InputError("model", f"layer {layer}, called {len(sown)} times", remedy)
            found[layer] = sown[0]
        return outputs, found

    # A federation asks for shapes and for draws, inside other programs: one trace serves them all.
    return Model(jax.jit(init), run_trunk, run_head)


def _places(layer: str) -> list[tuple[str, ...]]:
    """Paths where a layer may be: the layer `ROOT` is the model, or a module with that name."""
    return [tuple(layer.split("/")), *([()] if layer == ROOT else [])]


# Flax does not type these functions.
_flatten: Any = flatten_dict
_unflatten: Any = unflatten_dict
