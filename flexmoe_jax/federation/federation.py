"""The record of all settings of a federation; `federation.replace(...)` makes a variant.

Axis legend: `C` clients, `E` experts, `K` expert slots, `L` MoE layers, `G` groups of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexmoe_jax import tasks
from flexmoe_jax.assignment import Policy
from flexmoe_jax.client import Codec, Learner, LocalTraining, Site, init_residual
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation.checks import check_data, check_settings
from flexmoe_jax.models import FLEX_MOE, Layout, Model, Ownership, lay_out
from flexmoe_jax.options.assignment import AssignmentOptions
from flexmoe_jax.options.execution import EvalOptions
from flexmoe_jax.server import (
    Admission,
    Aggregator,
    Assign,
    Desk,
    FitnessOptions,
    LoadModel,
    make_assign,
    make_load_model,
    mean,
    private,
)
from flexmoe_jax.types import Array, Key, Own, Params, PyTree, Routing, Server


@dataclass(frozen=True, eq=False)
class Federation:
    """All settings of a federation.

    Attributes:
      model: the model with all E experts; clients run it with K experts.
      sample: a batch of the named examples, or its shapes: leaves (B, ...).
      capacity: (C,) int k_c.
      policy: assigns experts to clients.
      local: how clients train.
      task: the learning task.
      ownership: which of the model's parameters are averaged, and which stay with their clients.
      layers: `same` if an expert spans all MoE layers, or `each` to assign each layer separately.
      codec: how updates are compressed.
      admission: which updates the server accepts.
      aggregator: how the server aggregates updates; None for the weighted mean, or for the mean
        with noise if `admission` asks for noise.
      optimizer: optax transform of the aggregated update; plain averaging by default.
      fitness: how the server learns Q.
      load: the load model: load for the assignment, and load delivered; None for `clients`.
      deficit_decay: factor on an expert's deficit from round to round, in [0, 1].
      share: (E,) share of the load that the policy intends for each expert; None for equal shares.
      seed: seed of the policy's tie-breaking and random draws.
      prior: whether a client that predicts its own examples adds the logarithm of its label shares
        to its logits (if the task has labels). This affects only the personal figures.

    Raises:
      InputError: settings that do not fit together.
    """

    model: Model
    sample: PyTree
    capacity: np.ndarray
    policy: Policy
    local: LocalTraining
    task: tasks.Task = field(default_factory=tasks.classification)
    ownership: Ownership = FLEX_MOE
    layers: str = AssignmentOptions.layers
    codec: Codec = field(default_factory=Codec)
    admission: Admission = field(default_factory=Admission)
    aggregator: Aggregator | None = None
    optimizer: optax.GradientTransformation = field(default_factory=lambda: optax.sgd(1.0))
    fitness: FitnessOptions = field(default_factory=FitnessOptions)
    load: LoadModel | None = None
    deficit_decay: float = AssignmentOptions.deficit_decay
    share: np.ndarray | None = None
    seed: int = 0
    prior: bool = EvalOptions.prior

    def __post_init__(self) -> None:
        """Checks that the settings fit together."""
        check_settings(self)

    def replace(self, **changes: Any) -> Federation:
        """Returns a copy of the federation with these settings changed."""
        return replace(self, **changes)

    @cached_property
    def shapes(self) -> PyTree:
        """Shapes of the model's parameters, with their expert and gate marks."""
        return jax.eval_shape(self.model.init, jax.random.key(0), self.inputs)

    @cached_property
    def layout(self) -> Layout:
        """The owner of each parameter."""
        return lay_out(self.shapes, self.ownership)

    @cached_property
    def outputs(self) -> tuple[PyTree, dict[str, Routing]]:
        """Shapes of the outputs and routings for the sample, with K slots.

        Raises:
          InputError: the model does not run on the sample with K slots.
        """
        slots, parts = self.slots, self.layout.split(self.shapes)

        def cut(stack: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((slots, *stack.shape[1:]), stack.dtype)

        experts, gate = jax.tree.map(cut, (parts.experts, parts.gate))
        held = {layer: jax.ShapeDtypeStruct((slots,), bool) for layer in self.layout.layers}
        try:
            outputs, routings = jax.eval_shape(
                self.apply, parts._replace(experts=experts, gate=gate), self.inputs, held
            )
            found: tuple[PyTree, dict[str, Routing]] = outputs, routings
        except InputError:
            raise
        except Exception as error:  # A model can raise any exception.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            layers = ", ".join(self.layout.layers)
            remedy = (
                f"it must run on stacks of {slots} of its {self.layout.experts} experts, with "
                f"masks of the layers {layers} (each has experts and a gate), and return (outputs, "
                "{layer: Routing})"
            )
            raise InputError("model", reason[:300], remedy) from error
        return found

    def check(self, arrays: Mapping[str, Any]) -> None:
        """Checks that named examples fit the task and the model's outputs.

        Raises:
          InputError: an array does not fit; the error names it.
        """
        outputs, _ = self.outputs
        self.task.check(arrays, jax.tree.map(lambda x: x.shape[1:], outputs))

    @property
    def clients(self) -> int:
        """C, the number of clients."""
        return len(self.capacity)

    @property
    def slots(self) -> int:
        """K; 1 if no client has capacity for an expert: this slot then stays empty."""
        return max(int(np.max(self.capacity)), 1)

    @property
    def groups(self) -> int:
        """G, the number of groups of MoE layers."""
        return max(len(self.layout.layers), 1) if self.layers == "each" else 1

    @property
    def group(self) -> dict[str, int]:
        """Maps each MoE layer to its group; the layers of a group are assigned together."""
        each = self.layers == "each"
        return {layer: i if each else 0 for i, layer in enumerate(self.layout.layers)}

    @cached_property
    def shares_trunk(self) -> bool:
        """Whether the model's trunk is the same for all clients, because it needs only ψ."""
        parts = self.layout.split(nn.meta.unbox(self.shapes))

        def run(shared: PyTree, inputs: PyTree) -> PyTree:
            return self.model.trunk(self.layout.merge_shared(shared), inputs)

        try:
            jax.eval_shape(run, parts.shared, self.inputs)
        except Exception:  # A missing parameter can raise any exception.
            return False
        return True

    @property
    def assembles(self) -> bool:
        """Whether one model can hold all experts: no parameter stays with a client."""
        return not ({"gate", "private"} & set(self.layout.owner))

    @property
    def keeps_experts(self) -> bool:
        """Whether experts stay with their clients; each client then holds all experts."""
        owners = zip(self.layout.layer, self.layout.owner, strict=True)
        return any(layer and owner == "private" for layer, owner in owners)

    @property
    def splits_use(self) -> bool:
        """Whether the server tells clients how much to use each of their experts."""
        return bool(self.fitness.affinity and self.local.balance)

    @property
    def site(self) -> Site:
        """The settings that a client runs with."""
        return Site(
            learner=Learner(self.apply, self.task, self.local, self.layout.layers),
            codec=self.codec,
            group=self.group,
            experts=self.layout.experts,
            send_all=self.admission.private,
        )

    @property
    def desk(self) -> Desk:
        """The settings that the server runs with."""
        return Desk(
            experts=self.layout.experts,
            group=self.group,
            optimizer=self.optimizer,
            admission=self.admission,
            fitness=self.fitness,
            load=self.load or make_load_model("clients", self.capacity, self.capacity),
            deficit_decay=self.deficit_decay,
            share=self.share,
        )

    @property
    def needs_labels(self) -> bool:
        """Whether the server needs the label shares of clients: for affinity beyond them."""
        return self.fitness.beyond_labels and self.task.labels is not None

    def make_assign(
        self,
        size: np.ndarray,
        label_share: np.ndarray | None,
        profile: np.ndarray | None = None,
    ) -> Assign:
        """Builds the server's assignment function.

        Args:
          size: (C,) number of training examples of each client.
          label_share: (C, Y) label shares of the clients, as far as the server knows them; or None.
          profile: see `server.make_assign`.
        """
        capacity = np.asarray(self.capacity, np.int64)
        work = self.local.examples(size) if self.splits_use else None
        return make_assign(self.desk, self.policy, capacity, label_share, self.seed, profile, work)

    @property
    def aggregation(self) -> Aggregator:
        """The aggregator in use: the given one, or the default for `admission`."""
        if self.aggregator is not None:
            return self.aggregator
        if self.admission.private:
            return private(self.admission.noise_multiplier * self.admission.clip)
        return mean()

    def apply(
        self, params: Params, inputs: PyTree, held: dict[str, Array]
    ) -> tuple[PyTree, dict[str, Routing]]:
        """Runs the model on parameters that are split by owner."""
        return self.model.apply(self.layout.merge(params), inputs, held)

    def assemble(self, begun: Server) -> tuple[Params, dict[str, Array]]:
        """Returns the parameters of one model with all experts, and masks that hold them all.

        Valid only if no parameter stays with a client (see `assembles`).
        """
        every = jnp.ones(self.layout.experts, bool)
        held = dict.fromkeys(self.layout.layers, every)
        return self.layout.assembled(Params(begun.shared, begun.experts, {}, {})), held

    def own_outputs(self, outputs: PyTree, log_share: Array | None) -> PyTree:
        """Adjusts a client's outputs on its own examples by its log label shares (Y,)."""
        adjust = self.task.adjust
        if adjust is None or log_share is None or not self.prior:
            return outputs
        return adjust(outputs, log_share)

    @property
    def inputs(self) -> PyTree:
        """Shapes of the model's inputs for the sample.

        Raises:
          InputError: the sample is not a batch of the arrays that the task reads.
        """
        try:
            return jax.eval_shape(self.task.inputs, self.sample)
        except (KeyError, TypeError) as error:
            given = ", ".join(self.sample) if isinstance(self.sample, Mapping) else self.sample
            remedy = f"give a batch of the named examples that the task reads ({error})"
            raise InputError("sample", given, remedy) from error

    def draw(self, key: Key) -> Params:
        """Draws the initial parameters of the model, split by owner."""
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.inputs)
        return self.layout.split(self.model.init(key, inputs))

    def own(self, params: Params, key: Key) -> Own:
        """Returns a client's own state before its first round.

        Args:
          params: the initial parameters that all clients share.
          key: the client's key; its gates are drawn from it.
        """
        return Own(
            gates=self.draw(key).gate,
            private=params.private,
            slots=jnp.full((self.groups, self.slots), self.layout.experts, jnp.int32),
            residual=init_residual(self.codec, params.shared, params.experts, self.slots),
        )

    def check_data(self, arrays: Mapping[str, Any], label_share: Any) -> None:
        """See `checks.check_data`."""
        check_data(self, arrays, label_share)
