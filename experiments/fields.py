"""Checks of config fields that no other part of the project makes, and the clients' capacities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.cli import flat_fields, nearest
from experiments.configs import base
from flexmoe_jax.data import draw_newcomers
from flexmoe_jax.errors import InputError

# JAX counts in 32 bits.
_LARGEST = 2**31 - 1
# Fitness is kept in single precision, and scores are at most 1.
_GREATEST_FITNESS = 1e30
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def check_kinds(config: ConfigDict) -> None:
    """Refuses what a ConfigDict takes from code: new fields, None, true for 1, huge integers."""
    known, given = flat_fields(base.get_config()), flat_fields(config)
    for field in given.keys() - known.keys():
        remedy = f"no such field; did you mean {nearest(field, known)}?"
        raise InputError(field, given[field], remedy)
    for field, kind in _kinds(base.get_config()).items():
        value = _get(config, field)
        if value is None or isinstance(value, bool) != (kind is bool):
            raise InputError(field, value, f"give {_KINDS[kind]}")
        if kind is int and abs(value) > _LARGEST:
            raise InputError(field, value, f"choose at most {_LARGEST}")


def _kinds(config: ConfigDict, prefix: str = "") -> dict[str, type]:
    kinds: dict[str, type] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            kinds |= _kinds(value, f"{prefix}{name}.")
        elif config.get_type(name) in _KINDS:
            kinds[prefix + name] = config.get_type(name)
    return kinds


def check_numbers(config: ConfigDict) -> None:
    """Refuses numbers outside their range, for all fields that no other part checks."""
    at_least_one = (
        "rounds",
        "clients.count",
        "data.length",
        "partition.domains_per_client",
        "model.heads",
        "model.moe_every",
        "model.experts",
        "model.hidden",
        "model.top_k",
        "local.epochs",
        "local.batch_size",
        "eval.every",
        "eval.batch_size",
        "checkpoint.every",
        "checkpoint.keep",
    )
    not_negative = (
        "seed",
        "clients.per_round",
        "clients.newcomers",
        "partition.bytes_per_client",
        "execution.client_block_size",
        "execution.devices",
        "execution.tile",
        "model.shared_experts",
        "local.max_steps",
        "local.momentum",
        "local.clip_norm",
        "local.balance",
        "local.proximal",
        "local.z",
        "local.prior",
        "server.momentum",
        "server.norm_limit",
        "server.clip",
        "server.noise_multiplier",
        "edge.deadline",
    )
    positive = ("local.learning_rate", "local.expert_rate", "server.learning_rate", "fitness.alpha")
    ranges: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (at_least_one, lambda value: value >= 1, "choose 1 or more"),
        (not_negative, lambda value: 0 <= value < float("inf"), "choose 0 or more"),
        (positive, lambda value: 0 < value < float("inf"), "choose a number above 0"),
    )
    for fields, fits, remedy in ranges:
        for field in fields:
            value = _value(config, field)
            if not fits(value):
                raise InputError(field, value, remedy)
    # More would not fit into any memory, or would take it long to find out.
    for field, most in (("clients.count", 10_000_000), ("data.image_size", 4096)):
        if _value(config, field) > most:
            raise InputError(field, _value(config, field), f"choose at most {most}")
    widths = config.model.widths
    if widths is not None and not all(isinstance(width, int) and width >= 1 for width in widths):
        raise InputError("model.widths", widths, 'choose whole numbers of 1 or more: "(32, 64)"')
    if not 0 <= config.assignment.deficit_decay <= 1:
        raise InputError(
            "assignment.deficit_decay",
            config.assignment.deficit_decay,
            "choose a number in [0, 1]",
        )
    for field in ("edge.mean_on_rounds", "edge.over_select"):
        if not 1 <= _value(config, field) < float("inf"):
            raise InputError(field, _value(config, field), "choose a number of at least 1")
    for field in ("edge.dropout_before", "edge.dropout_during"):
        if not 0 <= _value(config, field) <= 1:
            raise InputError(field, _value(config, field), "choose a probability in [0, 1]")
    if not 0 < config.server.delta < 1:
        raise InputError("server.delta", config.server.delta, "choose a number between 0 and 1")
    if not 0 < config.fitness.beta <= 1:
        raise InputError("fitness.beta", config.fitness.beta, "choose a number in (0, 1]")
    for field in ("fitness.initial", "fitness.optimism"):
        if not abs(_value(config, field)) <= _GREATEST_FITNESS:
            remedy = f"choose a number of at most {_GREATEST_FITNESS:g}, either side of 0"
            raise InputError(field, _value(config, field), remedy)
    draw_newcomers(config.clients.count, config.clients.newcomers, config.seed)
    training = config.clients.count - config.clients.newcomers
    if config.clients.per_round > training:
        those = f"{training}, those of clients.count={config.clients.count} that are no newcomers"
        if not config.clients.newcomers:
            those = f"clients.count={training}"
        remedy = f"choose at most {those}, or 0 for all"
        raise InputError("clients.per_round", config.clients.per_round, remedy)
    if config.model.top_k > config.model.experts:
        raise InputError(
            "model.top_k",
            config.model.top_k,
            f"choose at most model.experts={config.model.experts}",
        )


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


def _value(config: ConfigDict, field: str) -> float:
    number: float = _get(config, field)
    return number


def _get(config: ConfigDict, field: str) -> Any:
    node: Any = config
    for name in field.split("."):
        node = getattr(node, name)
    return node
