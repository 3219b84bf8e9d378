"""Checks that the settings of a federation fit together, and that data fit a federation.

Axis legend: `C` clients, `B` examples, `M` training examples, `U` units, `Y` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax import tasks
from flexmoe_jax.assignment import NamedPolicy
from flexmoe_jax.client import Codec, Compressor, LocalTraining
from flexmoe_jax.client.training import check_transform
from flexmoe_jax.errors import InputError, check_range, printable
from flexmoe_jax.models import Model, Ownership, check_capacity
from flexmoe_jax.options.assignment import AssignmentOptions
from flexmoe_jax.server import Admission, Aggregator, FitnessOptions, LoadModel

if TYPE_CHECKING:
    from flexmoe_jax.federation.federation import Federation

_KINDS: dict[str, tuple[Any, str]] = {
    "model": (Model, "a models.Model, as models.from_linen(module) makes it"),
    "local": (LocalTraining, "a client.LocalTraining, as client.LocalTraining(optax.sgd(0.1))"),
    "task": (tasks.Task, "a tasks.Task, as tasks.classification()"),
    "ownership": (Ownership, "a models.Ownership"),
    "codec": (Codec, 'a client.Codec, as client.Codec(client.make_compressor("int8"))'),
    "admission": (Admission, "a server.Admission"),
    "aggregator": ((Aggregator, NoneType), "a server.Aggregator, as server.mean(), or None"),
    "fitness": (FitnessOptions, "a server.FitnessOptions"),
    "load": ((LoadModel, NoneType), "a server.LoadModel, as server.make_load_model makes it"),
}


def check_settings(federation: Federation) -> None:
    """Checks that the settings of a federation fit together.

    Raises:
      InputError: a setting of the wrong type or out of range, or settings that do not fit.
    """
    _check_kinds(federation)
    AssignmentOptions.check(layers=federation.layers, deficit_decay=federation.deficit_decay)
    given = np.asarray(federation.capacity)
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer) or not given.size:
        raise InputError("capacity", federation.capacity, "give whole numbers, one a client: (C,)")
    experts = federation.layout.experts
    check_range("capacity", given, 0, experts, "the number of experts")
    check_capacity(federation.layout, given.tolist())
    if federation.aggregator is not None and federation.admission.private:
        multiplier = federation.admission.noise_multiplier
        remedy = "its noise goes into the default aggregator, the mean: give no other one"
        raise InputError("admission.noise_multiplier", multiplier, remedy)
    if federation.fitness.sketched and federation.admission.private:
        remedy = "what it keeps of single updates is not private: give 0"
        raise InputError("fitness.affinity", federation.fitness.affinity, remedy)
    _check_share(federation)
    _check_task(federation)
    _check_outputs(federation)


def check_data(federation: Federation, arrays: Mapping[str, Any], label_share: Any) -> None:
    """Checks that the clients' data fit a federation.

    Args:
      federation: the configuration of the federation.
      arrays: named training examples, leaves (M, ...).
      label_share: (C, Y) label shares of each client.

    Raises:
      InputError: the number of clients is wrong; the task cannot take the examples; or clients
        add label shares to the model's outputs, and their classes are not the model's.
    """
    clients, classes = label_share.shape
    if clients != federation.clients:
        remedy = f"give one for each of the {clients} clients"
        raise InputError("capacity", np.asarray(federation.capacity).tolist(), remedy)
    outputs, _ = federation.outputs
    federation.task.check(arrays, jax.tree.map(lambda x: x.shape[1:], outputs))
    _check_units(federation, arrays)
    if federation.task.adjust is None or not (federation.prior or federation.local.prior):
        return
    share = jax.ShapeDtypeStruct((classes,), np.float32)
    try:
        adjusted = jax.eval_shape(federation.task.adjust, outputs, share)
    except (TypeError, ValueError):
        adjusted = None
    if adjusted != outputs:
        remedy = (
            "not the model's: give data.join counts=data.label_counts(...), or take no prior: "
            "Federation(prior=False)"
        )
        raise InputError("label_share", f"{classes} classes", remedy)


def _check_kinds(federation: Federation) -> None:
    """Checks the types of the settings: records and functions, not names or modules."""
    for name, (kind, remedy) in _KINDS.items():
        value = getattr(federation, name)
        if not isinstance(value, kind):
            raise InputError(name, printable(value, 60), f"give {remedy}")
    if not callable(federation.policy):
        remedy = 'give a function Request -> Solution, as assignment.make_policy("flex")'
        raise InputError("policy", federation.policy, remedy)
    check_transform("optimizer", federation.optimizer)
    _check_functions(federation)
    if isinstance(federation.ownership.private, str):
        remedy = f"give a tuple of paths: ({federation.ownership.private!r},)"
        raise InputError("ownership.private", federation.ownership.private, remedy)


def _check_functions(federation: Federation) -> None:
    """Checks that records of functions hold functions."""
    task, aggregator = federation.task, federation.aggregator
    if not isinstance(federation.codec.compressor, Compressor):
        remedy = 'give a client.Compressor, as client.make_compressor("int8")'
        raise InputError("codec.compressor", printable(federation.codec.compressor, 60), remedy)
    if not (isinstance(task.mean, tuple) and len(task.mean) == 2 and all(map(callable, task.mean))):
        remedy = "give two functions: outputs to what is averaged, and back"
        raise InputError("task.mean", printable(task.mean, 60), remedy)
    names = "inputs", "loss", "weight", "check"
    needed = {f"task.{name}": getattr(task, name) for name in names}
    for name in ("zero", "add", "merge", "drop", "mean") if aggregator is not None else ():
        needed[f"aggregator.{name}"] = getattr(aggregator, name)
    for name, value in needed.items():
        if not callable(value):
            raise InputError(name, printable(value, 60), "give a function")


def _check_share(federation: Federation) -> None:
    """Checks that the policy aims at the shares by which deficits are counted."""
    if isinstance(federation.policy, NamedPolicy) and federation.policy.name == "flex":
        aims, equal = federation.policy.options.get("share"), np.ones(federation.layout.experts)
        here, there = (np.asarray(equal if x is None else x) for x in (federation.share, aims))
        if here.shape != there.shape or not np.allclose(here / here.sum(), there / there.sum()):
            remedy = "the policy aims at other shares: give make_policy the same share"
            raise InputError("share", federation.share, remedy)


def _check_task(federation: Federation) -> None:
    """Checks that the task has what the settings need."""
    if federation.fitness.score == "accuracy" and federation.task.hits is None:
        remedy = 'the task says of no prediction that it is right: give "loss", or your own'
        raise InputError("fitness.score", "accuracy", remedy)
    if federation.local.prior and federation.task.adjust is None:
        remedy = "the task's outputs have no classes whose shares could be added: give 0"
        raise InputError("local.prior", federation.local.prior, remedy)
    if federation.fitness.sketched and "shared" not in federation.layout.owner:
        remedy = "it is inferred from updates of shared parameters, and there are none: give 0"
        raise InputError("fitness.affinity", federation.fitness.affinity, remedy)


def _check_outputs(federation: Federation) -> None:
    """Checks that the model can be trained and returns a routing for each MoE layer."""
    leaves = jax.tree.leaves(nn.meta.unbox(federation.shapes))
    for path, leaf in zip(federation.layout.paths, leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            remedy = "a model is made of floating-point parameters alone"
            raise InputError("model", f"{path} of {leaf.dtype}", remedy)
    _, routings = federation.outputs
    if sorted(routings) != sorted(federation.layout.layers):
        layers = ", ".join(federation.layout.layers)
        remedy = f"its parameters are marked for {layers}: return a Routing for each"
        raise InputError("model", f"routings of {', '.join(routings) or 'no layer'}", remedy)


def _check_units(federation: Federation, arrays: Mapping[str, Any]) -> None:
    """Checks that the task's functions return values for the same units (B, U...)."""
    outputs, _ = federation.outputs
    count = jax.tree.leaves(outputs)[0].shape[0]
    batch = {
        name: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) for name, x in arrays.items()
    }
    told = {"loss": federation.task.loss, "hits": federation.task.hits}
    try:
        weight = jax.eval_shape(federation.task.weight, batch).shape
        found = {
            name: jax.eval_shape(function, outputs, batch).shape
            for name, function in told.items()
            if function is not None
        }
    except InputError:
        raise
    except Exception as error:  # A task can raise any exception.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "loss and hits take (outputs, batch), weight takes a batch"
        raise InputError("task", reason[:300], remedy) from error
    for name, shape in {"weight": weight, **found}.items():
        if shape != weight or shape[:1] != (count,):
            remedy = f"give a number for each unit, (B, U...), as weight does: here {weight}"
            raise InputError(f"task.{name}", shape, remedy)
