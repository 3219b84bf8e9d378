"""Builds a real client's federation from the server's setup and the client's own examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from experiments.build import choices, make_task
from experiments.cli import flat_fields
from experiments.configs import base
from experiments.deploying.checks import Arrays
from experiments.fields import check_fields
from experiments.model import finished, model_maker
from flexmoe_jax import data
from flexmoe_jax.compiling import placed
from flexmoe_jax.deploy import Mine, Setup
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.types import Array


def join(name: str, arrays: Arrays, tests: Arrays | None, setup: Setup) -> tuple[Federation, Mine]:
    """Builds the federation for one client, and its own data; see `flexmoe_jax.deploy.Join`.

    Raises:
      InputError: the client's examples do not fit the federation's task, classes or model.
    """
    config = read_config(setup.config)
    labelled = config.task.name == "classification"
    classes = setup.classes if labelled else ()
    arrays = _numbered(arrays, classes)
    tests = None if tests is None else _numbered(tests, classes)
    prepare = _prepare(setup.prepare)
    sample = {key: np.resize(values[:2], (2, *values.shape[1:])) for key, values in arrays.items()}
    _check_shapes("train", arrays, setup.tests)
    if tests is not None:
        _check_shapes("test", tests, setup.tests)
    federation = Federation(
        model=finished(model_maker(config), config, len(setup.classes), prepare),
        sample=sample,
        capacity=np.array([setup.slots]),
        task=make_task(config.task.name),
        **choices(config, "clients"),
    )
    share = np.zeros(0, np.float32)
    if labelled:
        counts = np.bincount(arrays["labels"], minlength=len(classes))
        share = np.asarray(counts / counts.sum(), np.float32)
    federation.check_data(arrays, share[None])
    if tests is not None:
        federation.check(tests)
    return federation, Mine(name, placed(arrays), tests, share)


def read_config(text: str) -> ConfigDict:
    """Reads the config that a server sent as JSON.

    Raises:
      InputError: the text is not a valid config of this version.
    """
    try:
        given = flat_fields(ConfigDict(json.loads(text)))
    except ValueError as error:
        raise InputError("config", "of the server", f"cannot be read: {error}") from error
    config = base.get_config()
    known = flat_fields(config)
    for field, value in given.items():
        if field not in known:
            raise InputError(field, value, "no such field here: use the server's version")
        config.update_from_flattened_dict({field: value})
    check_fields(config)
    return config


def _numbered(arrays: Arrays, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Converts labels, which are names of classes, to the numbers of the federation's classes."""
    found = dict(arrays)
    if not classes:
        return found
    if "labels" not in found:
        raise InputError("train_labels", "none", "the federation learns labels: give them")
    shape = np.shape(found["labels"])
    if int(np.prod(shape)) != shape[0]:
        raise InputError("labels", f"shape {shape}", "give one label an example: (N,)")
    numbers = {name: i for i, name in enumerate(classes)}
    names = [str(label) for label in np.asarray(found["labels"]).ravel()]
    for label in names:
        if label not in numbers:
            some = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            raise InputError("labels", label, f"the federation's classes are {some}")
    found["labels"] = np.array([numbers[label] for label in names], np.int32)
    return found


def _prepare(named: Arrays) -> Callable[[Array], Array]:
    if not named:
        return lambda inputs: inputs
    return data.Standardisation(np.asarray(named["mean"]), np.asarray(named["factor"]))


def _check_shapes(part: str, own: Arrays, common: Arrays) -> None:
    """Rejects examples that differ in shape from the server's, or are no finite real numbers.

    Raises:
      InputError: naming the array.
    """
    for name, values in common.items():
        if name not in own:
            raise InputError(f"{part}_{name}", "none", f"the federation learns from {name}")
        mine, theirs = own[name].shape[1:], values.shape[1:]
        if mine != theirs:
            remedy = f"the federation's are of shape {theirs}"
            raise InputError(f"{part}_{name}", f"shape {mine}", remedy)
        if own[name].dtype.kind not in "biuf" or not np.isfinite(own[name]).all():
            remedy = "give real numbers, none of them NaN or infinite"
            raise InputError(f"{part}_{name}", str(own[name].dtype), remedy)
