"""Makes capacities and a network from the config's fields about devices and links."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.fields import read
from flexmoe_jax import edge, models, simulation
from flexmoe_jax.errors import InputError
from flexmoe_jax.options import EdgeOptions, FaultsOptions
from flexmoe_jax.types import Array, Params, PyTree


def capacity_in_memory(
    model: models.Model,
    sample: dict[str, np.ndarray],
    devices: edge.Devices | None,
    config: ConfigDict,
    ownership: models.Ownership,
) -> np.ndarray:
    """Returns k_c (C,): the number of experts that each client's device has memory to train."""
    assert devices is not None  # See `build.given_capacity`.
    (inputs,) = (sample[name] for name in ("images", "tokens") if name in sample)
    batch = jax.ShapeDtypeStruct((config.local.batch_size, *inputs.shape[1:]), inputs.dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    layout = models.lay_out(shapes, ownership)
    parts = layout.split(shapes)
    expert = jax.eval_shape(lambda e: jax.tree.map(lambda x: x[:1], e), parts.experts)
    gate = jax.eval_shape(lambda g: jax.tree.map(lambda x: x[:1], g), parts.gate)
    one, expert_bytes = parts._replace(experts=expert, gate=gate), simulation.tree_bytes(expert)
    return edge.experts_in_memory(
        devices.memory,
        shared_bytes=simulation.tree_bytes(one) - expert_bytes,
        expert_bytes=expert_bytes,
        optimizer_copies=2 if config.local.optimizer == "adam" else int(config.local.momentum > 0),
        activation_bytes=_activations(model, layout, one, batch),
        experts=config.model.experts,
        tiers=devices.tiers,
    )


def _activations(model: models.Model, layout: models.Layout, params: Params, batch: PyTree) -> int:
    """Returns the bytes of the outputs of all layers.

    This program keeps more for its backward pass: the windows of convolutions, stored as rows.
    They make convolutions fast here, but a small device would not keep them.
    """

    def outputs(params: Params, inputs: Array) -> list[PyTree]:
        found = []

        def note(run: Any, inputs: Any, options: Any, of: nn.module.InterceptorContext) -> Any:
            made = run(*inputs, **options)
            if of.method_name == "__call__":
                found.append(made)
            return made

        held = {layer: jnp.ones(1, bool) for layer in layout.layers}
        with nn.intercept_methods(note):
            model.apply(layout.merge(params), inputs, held)
        return found

    return simulation.tree_bytes(jax.eval_shape(outputs, params, batch))


def make_devices(options: EdgeOptions, clients: int, seed: int) -> edge.Devices | None:
    """Makes the clients' devices; None if the config names no mix of devices."""
    tiers = edge.read_tiers(options.tiers) if options.tiers else edge.TIERS
    if options.mix:
        return edge.deal_devices(edge.parse_mix(options.mix), clients, seed, tiers)
    if options.deadline:
        remedy = "only devices take time: say which there are, in edge.mix"
        raise InputError("edge.deadline", options.deadline, remedy)
    return None


def _among(availability: edge.Availability, clients: np.ndarray) -> edge.Availability:
    """Restricts an availability to some clients."""
    return lambda round_index: availability(round_index)[clients]


def make_network(
    config: ConfigDict,
    devices: edge.Devices | None,
    clients: np.ndarray,
    steps: np.ndarray,
    examples: np.ndarray,
    sizes: np.ndarray,
) -> simulation.Network:
    """Makes the network, which decides which clients take part and which updates arrive.

    Args:
      config: the config of the run.
      devices: devices of all clients, newcomers included; None if devices are not modelled.
      clients: (C,) numbers of the clients that train, among all clients.
      steps: (C,) local steps of each training client in a round.
      examples: (C,) examples that each trains on in a round, counted at every step.
      sizes: (C,) examples that each has.
    """
    options = read(EdgeOptions, config)
    if options.availability in ("independent", "markov") and devices is None:
        remedy = "devices say how often they are there: say which there are, in edge.mix"
        raise InputError("edge.availability", options.availability, remedy)
    availability = None
    if options.availability != "always":
        share = np.ones(config.clients.count) if devices is None else devices.availability
        of_all = edge.make_availability(
            options.availability,
            share=share,
            mean_on_rounds=options.mean_on_rounds,
            seed=config.seed,
        )
        availability = _among(of_all, clients)
    if devices is not None:
        devices = edge.Devices(devices.names, *(of_each[clients] for of_each in devices[1:]))
    return simulation.Network(
        clients=len(clients),
        per_round=config.clients.per_round or len(clients),
        steps=steps,
        examples=examples,
        seed=config.seed,
        sizes=sizes if config.clients.sampling == "examples" else None,
        availability=availability,
        devices=devices,
        edge=options,
        faults=simulation.make_faults(read(FaultsOptions, config)),
    )
