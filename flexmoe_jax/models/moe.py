"""The mixture-of-experts layer: a masked gate, stacked experts, and the classifier around them.

Axes: `B` batch, `D` features, `H` hidden units, `Y` classes, and `E` experts. A client holds only
`K` of them: the same code then runs on a stack whose leading axis is `K`, with a mask of the slots
that are filled. How examples reach experts is data (a `Routing`), not a branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from flexmoe_jax.errors import InputError
from flexmoe_jax.models.dense import Dense
from flexmoe_jax.types import Array, Params, PyTree

# Below every logit, and finite: a client without any expert still gives numbers, not NaN.
_NEVER = -1e30


class Routing(NamedTuple):
    """Where a batch of examples goes.

    Attributes:
      logits: (B, E) the gate's logits, as they were before masking.
      probability: (B, E) softmax over the held experts; exactly 0 for the others.
      selected: (B, E) bool, the `top_k` most probable held experts of each example.
      combine: (B, E) weight of each expert in the layer's output.
    """

    logits: Array
    probability: Array
    selected: Array
    combine: Array


def route(logits: Array, held: Array, top_k: int = 1) -> Routing:
    """Routes each example to its `top_k` most probable experts among those held.

    The combine weights are the probabilities themselves (Fedus et al. 2022, eq. 2), so that the
    task loss teaches the gate even where one expert is chosen; with two or more chosen they are
    normalised to sum to 1 over the chosen (Shazeer et al. 2017; Lepikhin et al. 2021).

    Args:
      logits: (B, E).
      held: (E,) bool, the experts that may be chosen. If none may, nothing is selected.
      top_k: experts per example; fewer where fewer are held.

    Returns:
      The routing of the batch.
    """
    chex.assert_shape(held, logits.shape[-1:])
    masked = jnp.where(held, logits, _NEVER)
    probability = jnp.where(held, jax.nn.softmax(masked, axis=-1), 0.0)
    chosen = lax.top_k(masked, min(top_k, logits.shape[-1]))[1]  # (B, top_k)
    selected = jax.nn.one_hot(chosen, logits.shape[-1], dtype=bool).any(axis=-2) & held
    combine = jnp.where(selected, probability, 0.0)
    if top_k > 1:
        combine = combine / jnp.maximum(combine.sum(axis=-1, keepdims=True), 1e-9)
    return Routing(logits, probability, selected, combine)


def balance_loss(routing: Routing, held: Array, valid: Array) -> Array:
    """Switch-style load-balance loss over the experts held (Fedus et al. 2022, eq. 4).

    Args:
      routing: of a batch.
      held: (E,) bool.
      valid: (B,) 1.0 for examples that count, 0.0 for padding.

    Returns:
      (): held · Σ_e f_e p_e, at its minimum when both the fraction of examples routed to each held
      expert `f` and the mean probability `p` are uniform; then 1 for top-1 routing.
    """
    count = jnp.maximum(valid.sum(), 1.0)
    fraction = jnp.einsum("be,b->e", routing.selected.astype(valid.dtype), valid) / count
    probability = jnp.einsum("be,b->e", routing.probability, valid) / count
    return held.sum() * jnp.dot(fraction, probability)


def router_z_loss(routing: Routing, held: Array, valid: Array) -> Array:
    """Mean squared log-partition of the gate (Zoph et al. 2022, eq. 5): keeps its logits small.

    Args:
      routing: of a batch.
      held: (E,) bool; only these logits count.
      valid: (B,) 1.0 for examples that count, 0.0 for padding.

    Returns:
      (): the loss.
    """
    log_z = jax.nn.logsumexp(routing.logits, axis=-1, where=held)
    return jnp.dot(jnp.where(held.any(), log_z, 0.0) ** 2, valid) / jnp.maximum(valid.sum(), 1.0)


def expert_mlp(experts: PyTree, x: Array) -> Array:
    """Applies every stacked expert D→H→D to every example.

    Args:
      experts: `{"w_in": (E, D, H), "b_in": (E, H), "w_out": (E, H, D), "b_out": (E, D)}`.
      x: (B, D).

    Returns:
      (B, E, D).
    """
    hidden = jnp.einsum("bd,edh->ebh", x, experts["w_in"]) + experts["b_in"][:, None]
    output = jnp.einsum("ebh,ehd->ebd", nn.relu(hidden), experts["w_out"])
    return jnp.swapaxes(output + experts["b_out"][:, None], 0, 1)


class Experts(nn.Module):
    """A stack of residual MLP experts; its parameters are what `expert_mlp` takes.

    Attributes:
      count: E, or K for the experts of one client.
      hidden: H.
    """

    count: int
    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (B, D) to (B, count, D)."""
        fan_in = nn.initializers.variance_scaling(
            2.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=(0,)
        )
        features = x.shape[-1]
        zeros = nn.initializers.zeros
        experts = {
            "w_in": self.param("w_in", fan_in, (self.count, features, self.hidden), jnp.float32),
            "b_in": self.param("b_in", zeros, (self.count, self.hidden), jnp.float32),
            "w_out": self.param("w_out", fan_in, (self.count, self.hidden, features), jnp.float32),
            "b_out": self.param("b_out", zeros, (self.count, features), jnp.float32),
        }
        return expert_mlp(experts, x)


class Gate(nn.Module):
    """A linear gate; every parameter leads with the expert axis, as the experts' do.

    Attributes:
      count: E, or K for the gate of one client.
    """

    count: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (B, D) to logits (B, count)."""
        small = nn.initializers.normal(0.02)
        kernel = self.param("kernel", small, (self.count, x.shape[-1]), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.count,), jnp.float32)
        return jnp.einsum("bd,ed->be", x, kernel) + bias


class MoELayer(nn.Module):
    """A mixture-of-experts layer, to be added to a residual stream.

    y = Σ_s shared_s(x) + Σ_e combine_e(x) · expert_e(x).

    Attributes:
      experts: E, or K for those of one client.
      hidden: H of each expert.
      top_k: experts per example.
      shared_experts: experts beside those E that everybody holds and every example passes, with no
        gate (DeepSeekMoE, arXiv 2401.06066).
    """

    experts: int
    hidden: int = 128
    top_k: int = 1
    shared_experts: int = 0

    def setup(self) -> None:
        """Names the parts of the parameter tree."""
        self.expert = Experts(self.experts, self.hidden)
        self.shared_expert = Experts(self.shared_experts, self.hidden)
        self.gate = Gate(self.experts)

    def __call__(self, x: Array, held: Array | None = None) -> tuple[Array, Routing]:
        """What the experts add to examples or tokens, and where these went.

        Args:
          x: (..., D).
          held: (E,) bool, the experts that may be used; None for all.

        Returns:
          (..., D), and the routing with leaves (..., E).
        """
        held = jnp.ones(self.experts, bool) if held is None else held
        flat = x.reshape(-1, x.shape[-1])
        routing = route(self.gate(flat), held, self.top_k)
        mixed = jnp.einsum("be,bed->bd", routing.combine, self.expert(flat))
        if self.shared_experts:
            mixed = mixed + self.shared_expert(flat).sum(axis=1)
        spread = jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:-1], -1), routing)
        return mixed.reshape(x.shape), spread


class MoEClassifier(nn.Module):
    """Backbone, one mixture-of-experts layer, and a linear head.

    y = head(h + layer(h)),  h = backbone(x),  with a `MoELayer` whose parts are this module's own.

    Attributes:
      backbone: Linen module (B, ...) -> (B, D).
      classes: Y.
      experts: E; clone with K (`module.clone(experts=K)`) for the parameters of one client.
      hidden: H of each expert.
      top_k: experts per example.
      shared_experts: beside those E; see `MoELayer`.
    """

    backbone: nn.Module
    classes: int
    experts: int
    hidden: int = 128
    top_k: int = 1
    shared_experts: int = 0

    def setup(self) -> None:
        """Names the parts of the parameter tree: the layer's stand beside the backbone and head."""
        self.layer = MoELayer(self.experts, self.hidden, self.top_k, self.shared_experts)
        nn.share_scope(self, self.layer)
        self.head = Dense(self.classes)

    def features(self, x: Array) -> Array:
        """Shared features (B, D) of images (B, h, w, channels): no expert, no gate."""
        return self.backbone(x)

    def classify(self, features: Array, held: Array) -> tuple[Array, Routing]:
        """Class logits (B, Y) and routing, from shared features and the experts `held` (E,)."""
        mixed, routing = self.layer(features, held)
        return self.head(features + mixed), routing

    def __call__(self, x: Array, held: Array) -> tuple[Array, Routing]:
        """Class logits (B, Y) and routing, from images and the experts `held` (E,)."""
        return self.classify(self.features(x), held)


class Ownership(NamedTuple):
    """Who owns which part of a classifier's parameters; the default is FLEX-MoE's.

    Attributes:
      private: parts that stay with their client, by the beginnings of their paths: "head", or
        "backbone/local".
      shared_gate: whether a gate's row for an expert travels with that expert, and is averaged as
        the expert is, in place of staying with its client.
    """

    private: tuple[str, ...] = ()
    shared_gate: bool = False


FLEX_MOE = Ownership()


def check_ownership(params: PyTree, ownership: Ownership, capacity: Sequence[int]) -> None:
    """Refuses owners of parts that the model does not have, or cannot give away.

    Args:
      params: of the classifier, or their shapes.
      ownership: to check.
      capacity: (C,) k_c.

    Raises:
      InputError: no such part; or private experts of which clients hold only some.
    """
    paths = [f"{path}/" for path in _flatten(params, sep="/")]
    for start in ownership.private:
        if not any(path.startswith(f"{start}/") for path in paths):
            remedy = f"the model has no such part; its parts are {', '.join(params)}"
            raise InputError("model.private", start, remedy)
        of_experts = start.split("/")[0] in ("expert", "gate")
        if of_experts and min(capacity) < jax.tree.leaves(params["expert"])[0].shape[0]:
            remedy = "a client's own experts cannot be dealt out: give all clients all of them"
            raise InputError("model.private", start, remedy)


# Flax leaves them without types.
_flatten: Any = flatten_dict
_unflatten: Any = unflatten_dict


def split_params(params: PyTree, ownership: Ownership = FLEX_MOE) -> Params:
    """Splits a `MoEClassifier`'s parameters by who owns them."""
    parts: dict[str, dict[str, PyTree]] = {name: {} for name in Params._fields}
    for path, leaf in _flatten(params, sep="/").items():
        if any(f"{path}/".startswith(f"{start}/") for start in ownership.private):
            owner = "private"
        elif path.startswith("expert/") or (ownership.shared_gate and path.startswith("gate/")):
            owner = "experts"
        else:
            owner = "gate" if path.startswith("gate/") else "shared"
        parts[owner][path] = leaf
    return Params(**{name: _unflatten(part, sep="/") for name, part in parts.items()})


def merge_params(params: Params) -> PyTree:
    """Inverse of `split_params`."""
    flat: dict[str, PyTree] = {}
    for part in params:
        flat |= _flatten(part, sep="/")
    return _unflatten(flat, sep="/")
