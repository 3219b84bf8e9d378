"""Checks that need no JAX: a config for real clients, and a client's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flexmoe_jax.errors import InputError
from flexmoe_jax.npz import open_npz
from flexmoe_jax.options import ClientsOptions, EdgeOptions, FaultsOptions, FitnessOptions
from flexmoe_jax.reading import UnreadableError

_TRAIN, _TEST = "train_", "test_"
Arrays = Mapping[str, Any]
"""Named arrays of examples, each of shape (N, ...)."""


def check_deployable(config: ConfigDict) -> None:
    """Rejects options that cannot be used with real clients.

    Raises:
      InputError: naming the field, the value and the remedy.
    """
    for record in (EdgeOptions, FaultsOptions):
        for name, rule in record.rules().items():
            field = record.field(name)
            value = config[record.section][name]
            if name != "cache" and value != rule.default:
                remedy = f"is played in simulations alone; real clients need {rule.default!r}"
                raise InputError(field, value, remedy)
    needs: dict[str, object] = {
        "clients.newcomers": 0,
        "eval.fine_tune": False,
        "fitness.probe": FitnessOptions.probe,
        "assignment.diversity": 0.0,
        "clients.sampling": ClientsOptions.sampling,
    }
    for field, needed in needs.items():
        group, name = field.split(".")
        if config[group][name] != needed:
            remedy = f"is not built for real clients yet: give {needed!r}"
            raise InputError(field, config[group][name], remedy)
    if config.fitness.profile == "given":
        remedy = "of real clients nothing is known beforehand: give 'updates' or 'beyond_labels'"
        raise InputError("fitness.profile", "given", remedy)


def read_examples(path: Path, length: int = 0) -> tuple[Arrays, Arrays | None]:
    """Reads a client's training examples by name, and its own test examples if it has any.

    Args:
      path: an `.npz` file of arrays `train_images` and `train_labels`, or `train_tokens`, or any
        others that the task takes, with `test_` arrays of the same names if there are tests. Or a
        folder of texts, `*.txt`; the last tenth of each text is then for testing.
      length: number of tokens in an example of a text.

    Raises:
      InputError: the file or folder cannot be read, or does not hold such arrays.
    """
    if path.is_dir():
        return _read_texts(path, length)
    try:
        with open_npz(path) as archive:
            arrays = {name: archive.read(name) for name in archive.names}
    except (UnreadableError, OSError) as error:
        raise InputError("--data", path, f"cannot be read: {error}") from error
    train = {n.removeprefix(_TRAIN): x for n, x in arrays.items() if n.startswith(_TRAIN)}
    tests = {n.removeprefix(_TEST): x for n, x in arrays.items() if n.startswith(_TEST)}
    for part, found in ((_TRAIN, train), (_TEST, tests)):
        lengths = {len(x) if x.ndim else 0 for x in found.values()}
        if len(lengths) > 1 or lengths == {0}:
            remedy = "give every array as many entries, one an example"
            raise InputError(f"{part}*", sorted(lengths), remedy)
    if not train:
        remedy = "holds no training examples: give train_images and train_labels, or train_tokens"
        raise InputError("--data", path, remedy)
    if tests and set(tests) != set(train):
        remedy = f"give as many arrays as for training: {', '.join(sorted(train))}"
        raise InputError("test_*", sorted(tests), remedy)
    return train, tests or None


def _read_texts(folder: Path, length: int) -> tuple[Arrays, Arrays | None]:
    from flexmoe_jax import data

    try:
        train, tests = data.read_corpus(folder).windows(length)
    except InputError as error:
        flag = "--length" if error.field == "data.length" else "--data"
        raise InputError(flag, error.value, error.remedy) from error
    return {"tokens": train}, {"tokens": tests} if len(tests) else None
