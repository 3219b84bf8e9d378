"""Types that more than one subpackage uses.

Axis legend: `C` clients, `P` clients in this round's cohort, `E` experts, `K` expert slots (the
largest capacity), `L` MoE layers, `G` groups of MoE layers that are assigned together (1, or `L`),
`N` examples of a client, `B` batch, `U` units of an example, `S` local steps, `D` features, `H`
hidden units, `Y` classes, `T` rounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.typing.ArrayLike  # Outside jit, callers may also pass NumPy arrays and numbers.
__all__ = [
    "Array",
    "Download",
    "Evaluation",
    "Feedback",
    "Key",
    "Ledger",
    "Own",
    "Params",
    "Plan",
    "PyTree",
    "RoundReport",
    "Routing",
    "Server",
    "State",
    "Tally",
    "Upload",
]

Key = jax.Array
PyTree = Any


ROUTER = "router"
"""Name, in a MoE layer, of the gate over all experts that all clients share."""


class Routing(NamedTuple):
    """How a MoE layer routes its inputs; the leading axes are those of the layer's input.

    Attributes:
      logits: (..., E) the gate's logits before masking.
      probability: (..., E) softmax over the held experts; exactly 0 for all other experts.
      selected: (..., E) bool, the `top_k` most probable held experts.
      combine: (..., E) weight of each expert in the layer's output.
      router: (..., E) logits of the layer's router over all experts, held or not; None if the layer
        has no router.
    """

    logits: Array
    probability: Array
    selected: Array
    combine: Array
    router: Array | None = None


class Params(NamedTuple):
    """Model parameters, split by owner.

    Attributes:
      shared: ψ, averaged over clients: a subtree of the model's parameters, with the same names.
      experts: θ by MoE layer, leaves (E, ...), or (K, ...) for the experts that one client holds.
      gate: φ of one client by MoE layer, leaves (E, ...) or (K, ...); it never leaves its client.
      private: all other parameters that never leave their client; empty in FLEX-MoE.
    """

    shared: PyTree
    experts: PyTree
    gate: PyTree
    private: PyTree


class Feedback(NamedTuple):
    """Feedback of a client on the experts it held, summed over its local steps.

    Each batch is scored before the step that trains on it. Attributes (..., L, K); scores of the
    fitness see (P, K), summed over the layers of a group:
      usage: units routed to the expert.
      correct: how many of these units the client's model predicted correctly; 0 if the task does
        not define correctness.
      loss: sum of the loss over these units, in nats.
    """

    usage: Array
    correct: Array
    loss: Array


class Download(NamedTuple):
    """What the server sends to a client for a round.

    Attributes:
      shared: ψ.
      experts: θ of the experts assigned to the client, by MoE layer, leaves (K, ...).
      slots: (G, K) int32 the numbers of these experts, ascending; E marks an empty slot.
      steps: () int32 the local steps that the client is asked to make.
      round: () int32 rounds completed.
      use: (G, K) the part of its units that the client should route to each of the experts; None
        for even parts.
    """

    shared: PyTree
    experts: PyTree
    slots: Array
    steps: Array
    round: Array
    use: Array | None = None


class Upload(NamedTuple):
    """The client's answer to the server; `examples` is 0 if the client did not train.

    Attributes:
      shared: Δψ, as the codec encodes it.
      experts: Δθ of the experts held, leaves (K, ...), as the codec encodes them.
      feedback: (L, K) sums per slot.
      loss: () mean training loss per unit, in nats.
      units: () units trained on, counted once per step: n_c, the client's weight in the mean of ψ.
      examples: () examples trained on, counted once per step.
    """

    shared: PyTree
    experts: PyTree
    feedback: Feedback
    loss: Array
    units: Array
    examples: Array


class Own(NamedTuple):
    """The state that stays on a client; leaves (C, ...) for all clients.

    Attributes:
      gates: φ by MoE layer, leaves (E, ...).
      private: all other parameters that the client keeps to itself.
      slots: (G, K) int32 the client's latest experts; E marks an empty slot.
      residual: the part of its updates that compression has not sent yet, for error feedback: a
        pair of trees like ψ and θ of those experts, leaves (...) and (K, ...); () without error
        feedback.
    """

    gates: PyTree
    private: PyTree
    slots: Array
    residual: PyTree


class Ledger(NamedTuple):
    """The server's records about clients and experts.

    Attributes:
      fitness: (G, C, E) Q.
      usage: (G, C, E) units that client c has routed to expert e so far.
      held_rounds: (G, C, E) int32 rounds in which client c held expert e and its update was
        accepted.
      current: (G, C, E) bool, whether client c's copy of expert e is equal to the server's.
      load: (G, E) load assigned so far.
      deficit: (G, E) load that each expert was owed and did not get.
      norms: (4, W) recent lengths of updates (see `server.quarantine`); () if updates are not
        judged by their length.
      profile: (C, F) how each client's updates differ from those of other clients (see
        `server.affinity`); () if the server keeps no profiles.
      alike: () bool, whether the latest assignment took into account which clients are alike; () if
        the server keeps no profiles.
    """

    fitness: Array
    usage: Array
    held_rounds: Array
    current: Array
    load: Array
    deficit: Array
    norms: PyTree
    profile: PyTree
    alike: PyTree = ()


class Server(NamedTuple):
    """The state that the server carries from round to round.

    Attributes:
      key: () typed random key of the run. It never changes: other keys are derived by `fold_in`.
      round: () int32 rounds completed.
      shared: ψ.
      experts: θ by MoE layer, leaves (E, ...).
      optimizer: state of the server's optimiser: for ψ, and for each expert, leaves (E, ...).
      ledger: the server's records about clients and experts.
    """

    key: Key
    round: Array
    shared: PyTree
    experts: PyTree
    optimizer: tuple[PyTree, PyTree]
    ledger: Ledger


class Roll(NamedTuple):
    """What the server knows about the state of real clients, who keep the rest.

    Attributes:
      slots: (C, G, K) int32, the experts of each client's latest answer; E marks an empty slot.
      accepted: (C,) int32, the latest round in which the client's answer was accepted; -1 if none.
      label_share: (C, Y) the label shares that clients have told, 0 for those that keep theirs; ()
        if they are not needed.
    """

    slots: Array
    accepted: Array
    label_share: Array | tuple[()] = ()


class State(NamedTuple):
    """The state of a simulated federation: the server's, and that of all clients.

    Attributes:
      server: the server's state.
      clients: the state of all clients, leaves (C, ...).
    """

    server: Server
    clients: Own


class Plan(NamedTuple):
    """The cohort of a round and its assignment; the shapes are the same in every round.

    Attributes:
      clients: (P,) int32 the cohort's client ids; C marks padding, which does not train.
      slots: (P, G, K) int32 the experts of each client, ascending; E marks an empty slot.
      load: (G, E) assigned load, in the units of the load model.
      steps: (P,) int32 the local steps that each client completes and delivers; 0 for a client
        whose work never arrives, and for padding.
      tamper: (P,) factor applied to each update before it reaches the server: 1 for an honest
        client, -1 for a client that reverses its update, NaN for a client that sends only NaN.
      noise: (P,) L2 norm of the Gaussian noise added to each update, relative to the norm of the
        update; None if no client adds noise.
      secret: (2,) uint32 random bits from which the noise of differential privacy is drawn; they
        are not stored. None if the noise comes from the run's key, or if there is no noise.
      use: (P, G, K) the part of its units that each client should route to each of its experts; 0
        in empty slots. None for even parts.
      alike: () bool, whether the assignment took into account which clients are alike; None if the
        server keeps no profiles.
    """

    clients: Array
    slots: Array
    load: Array
    steps: Array
    tamper: Array
    noise: Array | None = None
    secret: Array | None = None
    use: Array | None = None
    alike: Array | None = None


class RoundReport(NamedTuple):
    """The report of a training round.

    Attributes:
      loss: (P,) mean training loss per unit of each client of the plan, in nats; 0 for a client
        that delivered nothing.
      units: (P,) units that each client trained on, counted once per step.
      examples: (P,) examples that each client trained on, counted once per step.
      usage: (G, E) units routed to each expert.
      quarantined: (P,) bool, clients whose update was refused; their work does not count.
      void: () bool, whether the whole round was refused: some updates were too long, and no limit
        was known yet by which to refuse them before they were summed.
      finite: () bool, whether ψ, θ, and the cohort's gates and private parameters are all finite.
    """

    loss: Array
    units: Array
    examples: Array
    usage: Array
    quarantined: Array
    void: Array
    finite: Array


class Tally(NamedTuple):
    """Test results of a model, summed by column (..., Y): by class, or one column for all.

    Attributes:
      hits: units predicted correctly; None if the task does not define correctness.
      loss: sum of the loss, in nats.
    """

    hits: Array | None
    loss: Array


class Evaluation(NamedTuple):
    """Test results of the clients' models.

    The arrays are sums, which always exist. The properties are means; an undefined mean is NaN, and
    so are all means of a client that has never held an expert.

    Attributes:
      common: (C, Y) sums of each client's model on the whole test set, by class.
      units: (Y,) test units of each class.
      personal: (C,) sums on each client's own data: on its own test examples if clients have them.
        If not, on the test set weighted by the client's label shares: the sum over classes of the
        label share times the mean for that class.
      personal_weight: (C,) the weight of `personal`: the units of the client's own test examples,
        or the part of its label shares whose classes are in the test set; 0 if there is no data.
      server: () sums of the mean of the clients' predictions.
      assembled: () sums of one model with all experts, which no client could hold; None if gates or
        other parameters stay with their clients.
      evaluated: (C,) bool, clients that have held an expert; the sums of other clients mean
        nothing.
    """

    common: Tally
    units: Array
    personal: Tally
    personal_weight: Array
    server: Tally
    assembled: Tally | None
    evaluated: Array

    @property
    def class_accuracy(self) -> np.ndarray:
        """(C, Y) accuracy on each class; NaN for a class without examples in the test set."""
        there = np.asarray(self.evaluated)[:, None]
        return _ratio(self.common.hits, there * np.asarray(self.units))

    @property
    def global_accuracy(self) -> np.ndarray:
        """(C,) accuracy on the whole test set."""
        return _ratio(_total(self.common.hits), self._of_each)

    @property
    def global_loss(self) -> np.ndarray:
        """(C,) mean loss per unit on the whole test set."""
        return _ratio(_total(self.common.loss), self._of_each)

    @property
    def personal_accuracy(self) -> np.ndarray:
        """(C,) accuracy on the client's own data; NaN for a client without test data."""
        return _ratio(self.personal.hits, self._of_own)

    @property
    def personal_loss(self) -> np.ndarray:
        """(C,) mean loss on the client's own data; NaN for a client without test data."""
        return _ratio(self.personal.loss, self._of_own)

    @property
    def server_accuracy(self) -> float:
        """Accuracy of the clients' mean prediction; NaN while no client has held an expert."""
        return float(_ratio(self.server.hits, self._of_anybody))

    @property
    def server_loss(self) -> float:
        """Mean loss of the clients' mean prediction; NaN while no client has held an expert."""
        return float(_ratio(self.server.loss, self._of_anybody))

    @property
    def assembled_accuracy(self) -> float:
        """Accuracy of one model with all experts; NaN if there is no such model."""
        return float(_ratio(self.assembled and self.assembled.hits, _total(self.units)))

    @property
    def assembled_loss(self) -> float:
        """Mean loss of one model with all experts; NaN if there is no such model."""
        return float(_ratio(self.assembled and self.assembled.loss, _total(self.units)))

    @property
    def _of_each(self) -> np.ndarray:
        return _total(self.units) * np.asarray(self.evaluated)

    @property
    def _of_own(self) -> np.ndarray:
        return np.asarray(self.personal_weight) * np.asarray(self.evaluated)

    @property
    def _of_anybody(self) -> np.ndarray:
        return _total(self.units) * np.asarray(self.evaluated).any()


def _total(columns: Any) -> Any:
    return None if columns is None else np.asarray(columns, np.float64).sum(axis=-1)


def _ratio(part: Any, whole: Any) -> np.ndarray:
    """Returns part / whole; NaN where the whole is zero or the part is None."""
    if part is None:
        return np.full(np.shape(whole), np.nan)
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
