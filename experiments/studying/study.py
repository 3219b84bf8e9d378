"""A study: methods × data sets × partitions × variants × seeds; each combination is one run."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.cli import flat_fields, nearest
from experiments.user_files import call_in_file
from flexmoe_jax.errors import InputError

Overrides = Mapping[str, object]
"""Dotted config field to value."""
Axis = Mapping[str, Overrides]
"""One axis of a study: name, which is also part of a path, to the config fields that it sets."""

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


@dataclass(frozen=True)
class Trial:
    """One run that a study asks for.

    Attributes:
      dataset: name on the study's axis of data sets.
      partition: name on its axis of partitions.
      variant: (axis, name) for every further axis.
      method: name on its axis of methods.
      seed: seed of the run.
      overrides: all fields that the axes set on top of the study's config, and the seed.
    """

    dataset: str
    partition: str
    variant: tuple[tuple[str, str], ...]
    method: str
    seed: int
    overrides: Overrides = field(compare=False, default_factory=dict)

    @property
    def name(self) -> str:
        """Path of its folder within the study's: `emnist_digits/k_class_4/flex/seed_0`."""
        variant = [f"{axis}_{value}" for axis, value in self.variant]
        return "/".join([self.dataset, self.partition, *variant, self.method, f"seed_{self.seed}"])


@dataclass(frozen=True)
class Study:
    """A grid of runs.

    If two axes set the same field, the later of data sets, partitions, variants, methods wins.

    Attributes:
      name: name of the study.
      config: the `get_config` of a config file; it gives all fields that no axis sets.
      methods: methods to compare.
      datasets: data sets to learn.
      partitions: ways to distribute the examples over clients.
      seeds: each seed determines a partition, an initialisation and all later random choices; they
        are the same for all methods.
      variants: axis name to further axis, as `{"capacity": {"2": {"clients.capacity": 2}}}`.
      reference: the method that the others are compared with; empty for `flex` if there is one,
        else for the first method.
    """

    name: str
    config: Callable[[], ConfigDict]
    methods: Axis
    datasets: Axis
    partitions: Axis
    seeds: Sequence[int]
    variants: Mapping[str, Axis] = field(default_factory=dict)
    reference: str = ""

    def __post_init__(self) -> None:
        """Checks that the study has runs, and that names can be folder names.

        Raises:
          InputError: an axis is empty, or a name, seed or reference cannot be used.
        """
        axes = {
            "methods": self.methods,
            "datasets": self.datasets,
            "partitions": self.partitions,
            **{f"variants.{axis}": values for axis, values in self.variants.items()},
        }
        for axis, values in {**axes, "seeds": self.seeds}.items():
            if not values:
                raise InputError(axis, values, "give at least one")
        for axis, names in {**axes, "variants": self.variants, "name": [self.name]}.items():
            for name in names:
                if not isinstance(name, str) or not _NAME.fullmatch(name):
                    remedy = "names folders: use letters, digits and _ . + - alone"
                    raise InputError(axis, name, remedy)
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError("seeds", list(self.seeds), "name each once")
        choose_reference(self.reference, list(self.methods), "reference")

    @property
    def config_file(self) -> Path:
        """The config file that defines `config`."""
        return Path(inspect.getfile(self.config))

    def trials(self) -> list[Trial]:
        """Lists all runs; all combinations with one seed come before those with the next seed."""
        variants = [
            tuple(zip(self.variants, names, strict=True))
            for names in itertools.product(*self.variants.values())
        ]
        grid = itertools.product(self.seeds, self.datasets, self.partitions, variants, self.methods)
        return [
            Trial(
                dataset,
                partition,
                variant,
                method,
                seed,
                overrides={
                    **self.datasets[dataset],
                    **self.partitions[partition],
                    **{
                        f: v for axis, name in variant for f, v in self.variants[axis][name].items()
                    },
                    **self.methods[method],
                    "seed": seed,
                },
            )
            for seed, dataset, partition, variant, method in grid
        ]

    def config_of(self, trial: Trial) -> ConfigDict:
        """Builds the config of a run.

        Raises:
          InputError: an override names no field, or its value does not fit the field.
        """
        config = self.config()
        override(config, trial.overrides)
        return config

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The flat config before any axis sets fields, with values as in config.json."""
        return flat_fields(ConfigDict(json.loads(self.config().to_json())))

    def fields_of(self, trial: Trial) -> dict[str, Any]:
        """Returns the flat config of a run, with values as in its config.json."""
        plain: dict[str, Any] = json.loads(json.dumps(dict(trial.overrides)))
        return self.fields | plain

    def check(self) -> None:
        """Checks the fields that every axis sets.

        Raises:
          InputError: an override names no field, or its value does not fit the field.
        """
        config = self.config()
        for axis in (self.datasets, self.partitions, *self.variants.values(), self.methods):
            for overrides in axis.values():
                override(config, overrides)


def choose_reference(given: str, methods: Sequence[str], field: str) -> str:
    """Returns the method that all others are compared with.

    Args:
      given: its name; if empty, `flex` is chosen or, if there is no `flex`, the first method.
      methods: methods of the study.
      field: option or field that gave the name, for the error message.

    Raises:
      InputError: the study has no such method.
    """
    if given and given not in methods:
        raise InputError(field, given, f"choose one of {', '.join(methods)}")
    return given or ("flex" if "flex" in methods else next(iter(methods), ""))


def override(config: ConfigDict, overrides: Overrides) -> None:
    """Sets fields of a config.

    Raises:
      InputError: there is no such field, or the value does not fit the field.
    """
    fields = flat_fields(config)
    for name, value in overrides.items():
        if name not in fields:
            near = nearest(name, fields)
            raise InputError(name, value, f"no such field; did you mean {near}?")
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            kind = type(fields[name]).__name__
            remedy = f"does not fit this field, which is of type {kind}"
            raise InputError(name, value, remedy) from error


def read_study(path: str | Path) -> Study:
    """Loads a study file, and checks the fields that it sets.

    Args:
      path: path of a file that defines `get_study() -> Study`.

    Raises:
      InputError: there is no such file, it defines no study, or an override cannot be used.
    """
    study = call_in_file("--study", Path(path), "get_study", examples="studies")
    if not isinstance(study, Study):
        kind = type(study).__name__
        remedy = f"get_study() returns a {kind}, not a Study; experiments/studies/ holds examples"
        raise InputError("--study", path, remedy)
    if study.config.__name__ != "get_config":
        raise InputError("config", study.config.__name__, "give the get_config of a config file")
    study.check()
    return study
