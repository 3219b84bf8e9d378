"""The mixture-of-experts layer: a masked gate, stacked experts, and the classifier around them.

Axes: `B` batch, `D` features, `H` hidden units, `Y` classes, and `E` experts. A client holds only
`K` experts: the same code then runs on a stack whose leading axis is `K`, with a mask of the filled
slots. The routing of examples to experts is data (a `Routing`), not a branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from flexmoe_jax.errors import InputError
from flexmoe_jax.models.dense import Dense
from flexmoe_jax.models.experts import expert_mlp
from flexmoe_jax.models.model import Model, from_linen
from flexmoe_jax.models.ownership import EXPERT, GATE, mark
from flexmoe_jax.options.models import ModelOptions
from flexmoe_jax.types import Array, Routing

# Below every logit, but finite: a client without experts still produces finite numbers, not NaN.
_NEVER = -1e30


def route(logits: Float[Array, "*B E"], held: Bool[Array, " E"], top_k: int = 1) -> Routing:
    """Routes each example to its `top_k` most probable experts among those held.

    The combine weights are the probabilities themselves (Fedus et al. 2022, eq. 2), so that the
    task loss trains the gate even if `top_k` is 1. If `top_k` is 2 or more, the weights are
    normalised to sum to 1 over the chosen experts (Shazeer et al. 2017; Lepikhin et al. 2021).

    Args:
      logits: (..., E).
      held: (E,) bool, the experts that may be chosen. If there are none, nothing is selected.
      top_k: experts per example; fewer if fewer are held.

    Returns:
      The routing of the batch.

    Raises:
      InputError: `held` is not a mask of the E experts, or `top_k` is not a whole number of at
        least 1.
    """
    if held.dtype != bool or held.shape != logits.shape[-1:]:
        found = f"{held.dtype}{list(held.shape)}"
        raise InputError("held", found, f"give a mask: bool[{logits.shape[-1]}]")
    ModelOptions.check(top_k=top_k)
    may = jnp.broadcast_to(held, logits.shape)
    masked = jnp.where(may, logits, _NEVER)
    probability = jnp.where(may, jax.nn.softmax(masked, axis=-1), 0.0)
    chosen = lax.top_k(masked, min(top_k, logits.shape[-1]))[1]  # (B, top_k)
    selected = jax.nn.one_hot(chosen, logits.shape[-1], dtype=bool).any(axis=-2) & may
    combine = jnp.where(selected, probability, 0.0)
    if logits.shape[-1] == 1:  # The logit has no effect, so no gradient is computed.
        combine = lax.stop_gradient(combine)
    if top_k > 1:
        combine = combine / jnp.maximum(combine.sum(axis=-1, keepdims=True), 1e-9)
    return Routing(logits, probability, selected, combine)


def mean_so_far(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Averages each token of (B, S, D) with all tokens before it, scaled to a mean square of 1."""
    count = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)
    mean = jnp.einsum("st,btd->bsd", jnp.tri(x.shape[1], dtype=x.dtype) / count[:, None], x)
    return mean * lax.rsqrt((mean**2).mean(axis=-1, keepdims=True) + 1e-6)


class Experts(nn.Module):
    """A stack of residual MLP experts, with the parameters that `expert_mlp` takes.

    Attributes:
      count: E when the parameters are created; later the parameters determine the stack's size.
      hidden: H.
      part: the mark of its parameters; empty for experts that every client holds.
      top_k: the most experts that an example uses, see `expert_mlp`; 0 for all.
    """

    count: int
    hidden: int
    part: str = EXPERT
    top_k: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], combine: Float[Array, "B E"]) -> Float[Array, "B D"]:
        """Returns the experts' weighted sum for each example; the parameters determine E."""
        fan_in = nn.initializers.variance_scaling(
            2.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=(0,)
        )
        features, zeros = x.shape[-1], nn.initializers.zeros
        count = _stacked(self, "w_in", self.count)
        shapes: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
            "w_in": (fan_in, (count, features, self.hidden)),
            "b_in": (zeros, (count, self.hidden)),
            "w_out": (fan_in, (count, self.hidden, features)),
            "b_out": (zeros, (count, features)),
        }
        experts = {
            name: _param(self, name, init, self.part, shape).astype(x.dtype)
            for name, (init, shape) in shapes.items()
        }
        return expert_mlp(experts, x, combine, self.top_k)


class Gate(nn.Module):
    """A linear gate; the first axis of every parameter is the expert axis, as in `Experts`.

    Attributes:
      count: E when the parameters are created.
      part: the mark of its parameters; empty for a gate that all clients share.
    """

    count: int
    part: str = GATE

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        """Returns the logits (B, E) in single precision."""
        small, count = nn.initializers.normal(0.02), _stacked(self, "kernel", self.count)
        kernel = _param(self, "kernel", small, self.part, (count, x.shape[-1]))
        bias = _param(self, "bias", nn.initializers.zeros, self.part, (count,))
        # On accelerators the default would round to 10 bits, and examples would change experts.
        product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
        return product("bd,ed->be", x.astype(jnp.float32), kernel) + bias[None]


def _param(
    module: nn.Module, name: str, init: Callable[..., Any], part: str, shape: tuple[int, ...]
) -> Array:
    """Creates a parameter in single precision, with the mark of a part, if any."""
    value: Any = module.param(name, mark(init, part) if part else init, shape, jnp.float32)
    return value


def _stacked(module: nn.Module, name: str, count: int) -> int:
    """Number of experts in a module's parameters; `count` if it has no parameters yet."""
    if not module.has_variable("params", name):
        return count
    stored: Any = nn.meta.unbox(module.get_variable("params", name))
    return int(stored.shape[0])


class MoELayer(nn.Module):
    """A mixture-of-experts layer, to be added to a residual stream.

    y = Σ_s shared_s(x) + Σ_e combine_e(x) · expert_e(x).

    The layer can be at any place in a model. It reads the mask of the usable experts from the
    collection `held` (all experts if there is none), and writes a `Routing` to the collection
    `routing`. `models.from_linen` fills `held` and reads `routing`.

    Attributes:
      experts: E; the same module runs a client's stack of K experts.
      hidden: H of each expert.
      top_k: experts per example.
      shared_experts: number of additional experts, beside the E, that every client holds and every
        example passes through, with no gate (DeepSeekMoE, arXiv 2401.06066).
      whole: whether a whole example is routed the same way, by the mean of its features, for
        instance all pixels of an image.
      context: for tokens (B, S, D), whether gates see each token together with the mean of all
        tokens up to it. The topic of a text shows in many tokens, and hardly in a single one.
      with_router: whether the layer also has a router: a gate over all E experts that all clients
        share. It learns to predict the choices of each client's own gate. With routers, all
        experts form one model.
    """

    experts: int
    hidden: int = 128
    top_k: int = 1
    shared_experts: int = 0
    whole: bool = False
    context: bool = False
    with_router: bool = False

    def setup(self) -> None:
        """Creates the parts, under their names in the parameter tree.

        Raises:
          InputError: `whole` and `context` together.
        """
        if self.whole and self.context:
            raise InputError("context", True, "whole examples have no tokens: give whole=False")
        self.expert = Experts(self.experts, self.hidden, top_k=self.top_k)
        self.shared_expert = Experts(self.shared_experts, self.hidden, part="")
        self.gate = Gate(self.experts)
        if self.with_router:  # In the assembled model it replaces the gate, so it has equal parts.
            self.router = Gate(self.experts, part="")

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns what the experts add to examples or tokens."""
        flat = x.reshape(-1, x.shape[-1])
        # Not computed from the batch size, which is unknown when a model is exported.
        places = math.prod(x.shape[1:-1]) if self.whole else 1
        routed = x.mean(axis=tuple(range(1, x.ndim - 1))) if self.whole else x
        if self.context:
            routed = x + mean_so_far(x)
        into_gate = routed.reshape(-1, x.shape[-1])
        logits = self.gate(into_gate)
        held: Any = jnp.ones(logits.shape[-1:], bool)
        if self.has_variable("held", "mask"):
            held = self.get_variable("held", "mask")
        routing = route(logits, held, self.top_k)
        if self.with_router:
            routing = routing._replace(router=self.router(lax.stop_gradient(into_gate)))
        combine = jnp.repeat(routing.combine, places, axis=0)
        mixed = self.expert(flat, combine)
        if self.shared_experts:
            whole = jnp.ones((flat.shape[0], self.shared_experts), jnp.float32)
            mixed = mixed + self.shared_expert(flat, whole)
        spread = jax.tree.map(lambda leaf: leaf.reshape(*routed.shape[:-1], -1), routing)
        self.sow("routing", "at", spread)
        return mixed.reshape(x.shape)


class Classifier(nn.Module):
    """A backbone that contains the experts, and a linear head.

    Attributes:
      backbone: Linen module (B, ...) -> (B, D), with any number of MoE layers.
      classes: Y.
    """

    backbone: nn.Module
    classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns class logits (B, Y) of images."""
        return Dense(self.classes, name="head")(self.backbone(x)).astype(jnp.float32)


class MoEClassifier(nn.Module):
    """Backbone, one mixture-of-experts layer, and a linear head.

    y = head(h + layer(h)),  h = backbone(x).  The layer is a `MoELayer` in this module's own scope.

    Attributes:
      backbone: Linen module (B, ...) -> (B, D).
      classes: Y.
      experts: E.
      hidden: H of each expert.
      top_k: experts per example.
      shared_experts: additional experts beside the E; see `MoELayer`.
      with_router: see `MoELayer`.
    """

    backbone: nn.Module
    classes: int
    experts: int
    hidden: int = 128
    top_k: int = 1
    shared_experts: int = 0
    with_router: bool = False

    def setup(self) -> None:
        """Creates the parts; those of the layer are beside the backbone and head in the tree."""
        self.layer = MoELayer(
            self.experts,
            self.hidden,
            self.top_k,
            self.shared_experts,
            with_router=self.with_router,
        )
        nn.share_scope(self, self.layer)
        self.head = Dense(self.classes)

    def features(self, x: Array) -> Array:
        """Returns shared features (B, D) of images (B, h, w, channels), without expert or gate."""
        return self.backbone(x)

    def classify(self, features: Array) -> Array:
        """Returns class logits (B, Y) of shared features."""
        return self.head(features + self.layer(features)).astype(jnp.float32)

    def __call__(self, x: Array) -> Array:
        """Returns class logits (B, Y) of images."""
        return self.classify(self.features(x))


def classifier(module: MoEClassifier) -> Model:
    """Returns the classifier as a `Model` whose trunk is the backbone."""
    return from_linen(module, trunk="features", head="classify")
