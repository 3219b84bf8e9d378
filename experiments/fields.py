"""Checks of a config as a whole, and the clients' capacities."""

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
    """The options of a config that a record has.

    Raises:
      InputError: one does not fit.
    """
    return record.read(flat_fields(config))


def check_fields(config: ConfigDict) -> None:
    """Refuses what needs no data to be seen: fields that are none, values that do not fit.

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
    """Deals capacities out to clients.

    Args:
      given: a number, a range as "1-4", or a list of numbers. A range or list is dealt out evenly,
        in an order drawn from the seed.
      clients: C.
      experts: E.
      seed: of the run.

    Returns:
      (C,) int64 k_c.

    Raises:
      InputError: for what is none of these, and for a capacity below 1 or above E.
    """
    choices = _capacity_choices(given)
    if not all(1 <= choice <= experts for choice in choices):
        raise InputError("clients.capacity", given, f"choose 1 to model.experts={experts}")
    dealt = np.resize(np.asarray(choices, np.int64), clients)
    return np.random.default_rng([seed, 0xCA9AC]).permutation(dealt)


def load_model_name(load: str, capacity: object) -> str:
    """The load model that `assignment.load` stands for, given `clients.capacity`.

    `auto` counts holders where capacities are equal, which makes their number even to the last one.
    Where capacities differ, a client of one expert puts all its load on it and one of four a
    quarter on each: there it weighs the use foreseen.
    """
    if load != "auto":
        return load
    if capacity == "memory":
        return "usage"
    # A range may be as long as it likes: its second is another already.
    choices = _capacity_choices(capacity)
    return "clients" if all(choice == choices[0] for choice in choices) else "usage"


def _capacity_choices(given: object) -> Sequence[int]:
    ends = given.split("-") if isinstance(given, str) else []
    if len(ends) == 2 and all(end.isdecimal() and len(end) < 10 for end in ends):
        low, high = map(int, ends)
        if low > high:
            raise InputError("clients.capacity", given, f"turn the range around: {high}-{low}")
        return range(low, high + 1)
    choices = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not choices or not all(isinstance(k, int) and not isinstance(k, bool) for k in choices):
        remedy = 'give a number (2), a range ("1-4"), a list ([1,2,4]) or "memory"'
        raise InputError("clients.capacity", given, remedy)
    return [k for k in choices if isinstance(k, int)]
