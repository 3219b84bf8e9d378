"""Turns the fields of a config about devices and links into capacities and a network."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from flexmoe_jax import edge, federated, models
from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Array, PyTree


def model_shapes(
    model: models.MoEClassifier, prepare: Callable[[Array], Array], images: np.ndarray
) -> PyTree:
    """Shapes of the model's parameters, without computing anything.

    Raises:
      InputError: for a backbone that cannot be trained as the rounds train it.
    """

    def trace(x: Array) -> tuple[PyTree, PyTree]:
        params = model.init(jax.random.key(0), prepare(x), jnp.ones(model.experts, bool))["params"]
        # As the rounds do: from parameters alone.
        return params, model.apply({"params": params}, prepare(x), method="features")

    batch = jax.ShapeDtypeStruct((2, *images.shape[1:]), images.dtype)
    try:
        params, features = jax.eval_shape(trace, batch)
    except InputError:
        raise
    except Exception as error:  # A backbone that does not fit can fail in any way.
        reason = " ".join(str(error).split()).partition(" (https://flax")[0]
        raise _unfit(model, reason[:300]) from error
    if features.ndim != 2 or features.shape[0] != 2:
        raise _unfit(model, f"it turns images {batch.shape} into {features.shape}")
    return params


def _unfit(model: models.MoEClassifier, reason: str) -> InputError:
    """The refusal of a backbone, with what is asked of one."""
    contract = (
        "a backbone maps images (B, h, w, channels) to features (B, D) by its parameters alone, "
        "without batch statistics, other collections or random numbers"
    )
    return InputError("model.backbone", type(model.backbone).__name__, f"{reason}; {contract}")


def capacity_in_memory(
    model: models.MoEClassifier,
    prepare: Callable[[Array], Array],
    images: np.ndarray,
    devices: edge.Devices,
    config: ConfigDict,
) -> np.ndarray:
    """k_c (C,): how many experts each client's device has room to train."""
    alone = model.clone(experts=1)
    params = model_shapes(alone, prepare, images)
    batch = jax.ShapeDtypeStruct((config.local.batch_size, *images.shape[1:]), images.dtype)

    def activations(params: PyTree, x: Array) -> PyTree:
        _, kept = alone.apply(
            {"params": params}, prepare(x), jnp.ones(1, bool), capture_intermediates=True
        )
        return kept["intermediates"]

    expert = federated.tree_bytes(params["expert"])
    return edge.experts_in_memory(
        devices.memory,
        shared_bytes=federated.tree_bytes(params) - expert,
        expert_bytes=expert,
        optimizer_copies=2 if config.local.optimizer == "adam" else int(config.local.momentum > 0),
        activation_bytes=federated.tree_bytes(jax.eval_shape(activations, params, batch)),
        experts=model.experts,
        tiers=devices.tiers,
    )


def make_devices(options: ConfigDict, clients: int, seed: int) -> edge.Devices | None:
    """The clients' devices; None if the config names no mix of them."""
    tiers = edge.read_tiers(options.tiers) if options.tiers else edge.TIERS
    if options.mix:
        return edge.deal_devices(edge.parse_mix(options.mix), clients, seed, tiers)
    if options.deadline:
        remedy = "only devices take time: say which there are, in edge.mix"
        raise InputError("edge.deadline", options.deadline, remedy)
    return None


def make_network(
    config: ConfigDict, devices: edge.Devices | None, steps: np.ndarray, examples: np.ndarray
) -> federated.Network:
    """Who takes part in a round, and what arrives."""
    options = config.edge
    if config.clients.sampling not in ("uniform", "examples"):
        raise InputError(
            "clients.sampling", config.clients.sampling, "choose one of uniform, examples"
        )
    if options.late not in edge.LATE:
        raise InputError("edge.late", options.late, f"choose one of {', '.join(edge.LATE)}")
    if options.availability in ("independent", "markov") and devices is None:
        remedy = "devices say how often they are there: say which there are, in edge.mix"
        raise InputError("edge.availability", options.availability, remedy)
    availability = None
    if options.availability != "always":
        share = np.ones(config.clients.count) if devices is None else devices.availability
        availability = edge.make_availability(
            options.availability,
            share=share,
            mean_on_rounds=options.mean_on_rounds,
            seed=config.seed,
        )
    return federated.Network(
        clients=config.clients.count,
        per_round=config.clients.per_round or config.clients.count,
        steps=steps,
        examples=examples,
        seed=config.seed,
        over_select=options.over_select,
        weighted=config.clients.sampling == "examples",
        availability=availability,
        devices=devices,
        deadline=options.deadline or float("inf"),
        late=options.late,
        dropout_before=options.dropout_before,
        dropout_during=options.dropout_during,
        faults=federated.make_faults(config.faults.kind, config.faults.share),
    )
