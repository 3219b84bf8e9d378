"""Extracts models from a federation: the model of one client, or all experts in one model.

Evaluation uses the same models. A client's model has the client's latest experts as the server has
them, with the client's own gate and private parts. The assembled model has all experts, gated by
the routers, or by the gates' rows if these travel with the experts.

Axis legend: `B` batch, `E` experts, `K` expert slots, `k` experts that a client holds, `Y` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexmoe_jax import client, server
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.server.server import Fetch, take
from flexmoe_jax.types import Array, Own, Params, PyTree, Server, State

Held = dict[str, Array]
"""MoE layer to a mask (K,) or (E,) bool of the slots or experts that may be used."""


class Standalone(NamedTuple):
    """A stand-alone model: parameters, and a pure function of them.

    Attributes:
      params: by their paths in the model, such as `backbone/Dense_0/kernel`; stacks (k, ...) hold
        the experts listed in `experts`, in the same order. If layers are assigned separately, all
        stacks are as long as the longest list, and what follows a shorter list is not used.
      apply: (params, inputs (B, ...) as the task takes them from a batch) -> outputs.
      experts: MoE layer to the ids (k,) of its experts among the federation's E.
      log_share: (Y,) logarithm of the client's label shares, which `apply` adds to its outputs;
        None if it adds nothing.
    """

    params: dict[str, Array]
    apply: Callable[[Mapping[str, Array], PyTree], PyTree]
    experts: dict[str, tuple[int, ...]]
    log_share: Array | None = None


def client_model(
    federation: Federation, state: State, number: int, label_share: Array | None = None
) -> Standalone:
    """Returns the model of one client as used in evaluation, with only the experts that it holds.

    Args:
      federation: the configuration of the federation.
      state: of the federation.
      number: id of the client.
      label_share: (Y,) the client's label shares, to predict its own examples as in personal
        figures (if `federation.prior` is on and examples have classes); None for plain outputs.

    Raises:
      InputError: there is no such client, or it has not held any expert yet.
    """
    if not 0 <= number < federation.clients:
        raise InputError("client", number, f"give 0 to {federation.clients - 1}")
    own: Own = jax.tree.map(lambda leaf: leaf[number], state.clients)
    slots = np.asarray(own.slots)
    filled = slots < federation.layout.experts  # Filled slots come first.
    if not filled.any():
        raise InputError("client", number, "has not held any expert yet, so it has no model")
    own = own._replace(slots=own.slots[:, : filled.sum(axis=1).max()])
    log_share = None
    if label_share is not None and federation.prior and federation.task.adjust is not None:
        log_share = client.log_shares(label_share)
    experts = {
        layer: tuple(slots[group][filled[group]].tolist())
        for layer, group in federation.group.items()
    }
    return _standalone(federation, *of_client(federation, state.server, own), experts, log_share)


def assembled_model(federation: Federation, state: State) -> Standalone:
    """Returns all E experts as one model, gated by the routers, or by the gates' rows without them.

    Raises:
      InputError: parts of the model stay with their clients.
    """
    if not federation.assembles:
        layout = federation.layout
        owners = zip(layout.paths, layout.owner, strict=True)
        parts = ", ".join(path for path, owner in owners if owner in ("gate", "private"))
        remedy = f"parts that stay with their clients have no one value: {parts}"
        raise InputError("model", "assembled", remedy)
    every = tuple(range(federation.layout.experts))
    experts = dict.fromkeys(federation.layout.layers, every)
    return _standalone(federation, *federation.assemble(state.server), experts)


def of_client(
    federation: Federation, begun: Server, own: Own, fetch: Fetch = take
) -> tuple[Params, Held]:
    """A client's parameters, with its latest experts as the server has them, and its slot masks."""
    down = server.send(federation.desk, begun, own.slots, jnp.zeros((), jnp.int32), fetch)
    return client.model_of(federation.site, own, down)


def _standalone(
    federation: Federation,
    params: Params,
    held: Held,
    experts: dict[str, tuple[int, ...]],
    log_share: Array | None = None,
) -> Standalone:
    layout, model = federation.layout, federation.model

    def apply(params: Mapping[str, Array], inputs: PyTree) -> PyTree:
        tree = layout.tree.unflatten([params[path] for path in layout.paths])
        outputs, _ = model.apply(tree, inputs, held)
        return federation.own_outputs(outputs, log_share)

    leaves = layout.tree.flatten_up_to(layout.merge(params))
    return Standalone(dict(zip(layout.paths, leaves, strict=True)), apply, experts, log_share)
