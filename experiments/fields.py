"""Checks a config as a whole, and computes the clients' capacities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from ml_collections import ConfigDict

from experiments.cli import flat_fields, nearest
from experiments.options import RECORDS
from flexmoe_jax.errors import InputError
from flexmoe_jax.options import Admission, Aggregation, Options

Record = TypeVar("Record", bound=Options)


def read(record: type[Record], config: ConfigDict) -> Record:
    """Reads the options of a record from a config.

    Raises:
      InputError: a value does not fit its option.
    """
    return record.read(flat_fields(config))


def check_fields(config: ConfigDict) -> None:
    """Rejects unknown fields and invalid values, as far as this needs no data.

    Raises:
      InputError: naming the field, the value and the remedy.
    """
    given = flat_fields(config)
    known = [record.field(name) for record in RECORDS for name in record.rules()]
    for field in given.keys() - set(known):
        raise InputError(
            field, given[field], f"no such field; did you mean {nearest(field, known)}?"
        )
    for record in RECORDS:
        record.read(given)
    aggregation = Aggregation.read(given)
    if Admission.read(given).private and aggregation.aggregator != "mean":
        remedy = "its noise is reckoned for the mean: choose mean, or no noise_multiplier"
        raise InputError("server.aggregator", aggregation.aggregator, remedy)


def client_capacities(given: object, clients: int, experts: int, seed: int) -> np.ndarray:
    """Assigns capacities to clients.

    Args:
      given: a number, a range as "1-4", or a list of numbers. The values of a range or list are
        distributed evenly, in an order drawn from the seed.
      clients: C.
      experts: E.
      seed: seed of the run.

    Returns:
      (C,) int64 k_c.

    Raises:
      InputError: the value is none of these, or a capacity is below 1 or above E.
    """
    choices = _capacity_choices(given)
    if not all(1 <= choice <= experts for choice in choices):
        raise InputError("clients.capacity", given, f"choose 1 to model.experts={experts}")
    dealt = np.resize(np.asarray(choices, np.int64), clients)
    return np.random.default_rng([seed, 0xCA9AC]).permutation(dealt)


def load_model_name(load: str, capacity: object) -> str:
    """Returns the name of the load model that `assignment.load` selects.

    With equal capacities, `auto` counts the holders of each expert: their numbers then differ by at
    most one. With different capacities, a client with one expert puts its whole load on it, and a
    client with four puts a quarter on each. There `auto` weighs holders by their expected usage.
    """
    if load != "auto":
        return load
    if capacity == "memory":
        return "usage"
    # A long range costs nothing here: its second value already differs from the first.
    choices = _capacity_choices(capacity)
    return "clients" if all(choice == choices[0] for choice in choices) else "usage"


def _capacity_choices(given: object) -> Sequence[int]:
    ends = given.split("-") if isinstance(given, str) else []
    if len(ends) == 2 and all(end.isdecimal() and len(end) < 10 for end in ends):
        low, high = map(int, ends)
        if low > high:
            raise InputError("clients.capacity", given, f"turn the range around: {high}-{low}")
        return range(low, high + 1)
    if len(ends) == 1 and ends[0].isdecimal() and len(ends[0]) < 10:
        return [int(ends[0])]
    choices = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not choices or not all(isinstance(k, int) and not isinstance(k, bool) for k in choices):
        remedy = 'give a number (2), a range ("1-4"), a list ([1,2,4]) or "memory"'
        raise InputError("clients.capacity", given, remedy)
    return [k for k in choices if isinstance(k, int)]
