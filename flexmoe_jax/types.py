"""Types that more than one room of the package uses.

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
    Array = jax.typing.ArrayLike  # Whoever calls from outside a jit may give NumPy's, and numbers.
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


class Routing(NamedTuple):
    """Where what reaches a MoE layer goes; the leading axes are those of what reaches it.

    Attributes:
      logits: (..., E) the gate's logits, as they were before masking.
      probability: (..., E) softmax over the held experts; exactly 0 for the others.
      selected: (..., E) bool, the `top_k` most probable held experts.
      combine: (..., E) weight of each expert in the layer's output.
      router: (..., E) logits of the layer's router over all experts, held or not; None without one.
    """

    logits: Array
    probability: Array
    selected: Array
    combine: Array
    router: Array | None = None


class Params(NamedTuple):
    """Parameters by who owns them.

    Attributes:
      shared: ψ, averaged over clients: a part of the model's tree, with its names.
      experts: θ by MoE layer, leaves (E, ...), or (K, ...) for the experts that one client holds.
      gate: φ of one client by MoE layer, leaves (E, ...) or (K, ...); it never leaves its client.
      private: all else of one client that never leaves it; nothing in FLEX-MoE.
    """

    shared: PyTree
    experts: PyTree
    gate: PyTree
    private: PyTree


class Feedback(NamedTuple):
    """What a client tells the server about the experts it held, summed over its local steps.

    Every batch is scored before the step that learns from it. Attributes (..., L, K):
      usage: units routed to the expert.
      correct: of those, how many the client's model got right; 0 where nothing is right or wrong.
      loss: of those, the sum of the loss, in nats.
    """

    usage: Array
    correct: Array
    loss: Array


class Download(NamedTuple):
    """What the server sends to a client for a round.

    Attributes:
      shared: ψ.
      experts: θ of the experts that it is given, by MoE layer, leaves (K, ...).
      slots: (G, K) int32 which they are, rising; E marks an empty slot.
      steps: () int32 the local steps asked of it.
      round: () int32 rounds completed.
    """

    shared: PyTree
    experts: PyTree
    slots: Array
    steps: Array
    round: Array


class Upload(NamedTuple):
    """What a client answers; a client that has trained nothing has 0 examples.

    Attributes:
      shared: Δψ, as the codec sends it.
      experts: Δθ of the experts held, leaves (K, ...), as the codec sends them.
      feedback: (L, K) sums per slot.
      loss: () mean training loss of a unit, in nats.
      units: () units trained on, counted once a step: n_c, the weight in ψ.
      examples: () examples trained on, counted once a step.
    """

    shared: PyTree
    experts: PyTree
    feedback: Feedback
    loss: Array
    units: Array
    examples: Array


class Own(NamedTuple):
    """What a client owns, and nobody else ever sees; leaves (C, ...) for all clients.

    Attributes:
      gates: φ by MoE layer, leaves (E, ...).
      private: what else it keeps to itself.
      slots: (G, K) int32 its latest experts; E marks an empty slot.
      residual: what compression has so far kept back of its updates, for error feedback: a pair of
        trees like ψ and θ of those experts, leaves (...) and (K, ...); () without.
    """

    gates: PyTree
    private: PyTree
    slots: Array
    residual: PyTree


class Ledger(NamedTuple):
    """What the server has learnt of clients and experts.

    Attributes:
      fitness: (G, C, E) Q.
      usage: (G, C, E) units that c has routed to e so far.
      held_rounds: (G, C, E) int32 rounds in which client c held expert e.
      fresh: (G, C, E) bool, client c still has expert e as the server has it now.
      load: (G, E) assigned load so far.
      deficit: (G, E) load that each expert was owed and did not get.
      norms: (4, W) how long updates were lately (see `server.quarantine`); () where they are not
        judged by that.
      profile: (C, F) how each client's updates differ from others' (see `server.affinity`); ()
        where nobody asks.
    """

    fitness: Array
    usage: Array
    held_rounds: Array
    fresh: Array
    load: Array
    deficit: Array
    norms: PyTree
    profile: PyTree


class Server(NamedTuple):
    """All that the server carries from round to round.

    Attributes:
      key: () typed random key of the run; never advanced, only folded.
      round: () int32 rounds completed.
      shared: ψ.
      experts: θ by MoE layer, leaves (E, ...).
      optimizer: state of the server's optimiser: of ψ, and of each expert, leaves (E, ...).
      ledger: what it knows of clients and experts.
    """

    key: Key
    round: Array
    shared: PyTree
    experts: PyTree
    optimizer: tuple[PyTree, PyTree]
    ledger: Ledger


class State(NamedTuple):
    """A simulated federation: the server, and all clients' own parts side by side.

    Attributes:
      server: the server's.
      clients: leaves (C, ...).
    """

    server: Server
    clients: Own


class Plan(NamedTuple):
    """Who trains in a round, and what each holds; shapes never change between rounds.

    Attributes:
      clients: (P,) int32 the cohort's client ids; C marks padding, which trains nothing.
      slots: (P, G, K) int32 the experts of each, rising; E marks an empty slot.
      load: (G, E) assigned load, in the units of the load model.
      steps: (P,) int32 the local steps that each completes and delivers; 0 for a client whose work
        never arrives, and for padding.
      tamper: (P,) factor on each client's update on its way to the server: 1 for an honest client,
        -1 for one that turns its update around, NaN for one that sends no numbers.
      noise: (P,) L2 norm of the Gaussian noise added to each update, over the update's own; None
        where nobody adds any.
      secret: (2,) uint32 random bits from which the noise of differential privacy is drawn; they
        are kept nowhere. None for noise from the run's key, or no noise.
    """

    clients: Array
    slots: Array
    load: Array
    steps: Array
    tamper: Array
    noise: Array | None = None
    secret: Array | None = None


class RoundReport(NamedTuple):
    """What a round of training reports.

    Attributes:
      loss: (P,) mean training loss of a unit of each client of the plan, in nats; 0 for those that
        delivered nothing.
      units: (P,) units that each client trained on, counted once a step.
      examples: (P,) examples that each client trained on, counted once a step.
      usage: (G, E) units routed to each expert.
      quarantined: (P,) bool, clients whose update was refused; what they did counts for nothing.
      void: () bool, all were refused, since some updates were too long and nothing was known yet to
        tell them by before they were summed.
      finite: () bool, all parameters are numbers: ψ, θ, and the cohort's gates and private ones.
    """

    loss: Array
    units: Array
    examples: Array
    usage: Array
    quarantined: Array
    void: Array
    finite: Array


class Tally(NamedTuple):
    """What a model makes of test examples, summed by column (..., Y): classes, or one for all.

    Attributes:
      hits: units that are right; None where nothing is right or wrong.
      loss: loss, in nats.
    """

    hits: Array | None
    loss: Array


class Evaluation(NamedTuple):
    """What the clients' models make of the test set.

    The arrays are sums, which always exist; a figure that does not exist is NaN.

    Attributes:
      common: (C, Y) of each client's model on the whole test set, by class.
      units: (Y,) test units of each class.
      personal: (C,) on what is the client's own: its own test examples where clients have such;
        else the test set weighted to its label shares, which is the sum over classes of its share
        times its mean there.
      personal_weight: (C,) how much that is: units of its own, or the part of its label shares
        whose classes the test set has; 0 where there is nothing to measure on.
      server: () of the mean of the clients' predictions.
      assembled: () of all experts in one model, which no client could hold; None where gates or
        other parts stay with their clients.
      evaluated: (C,) bool, clients that have held an expert; the others' sums are void.
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
        """(C, Y) accuracy on each class; NaN for a class that the test set has no example of."""
        return _ratio(self.common.hits, np.broadcast_to(self.units, np.shape(self.common.loss)))

    @property
    def global_accuracy(self) -> np.ndarray:
        """(C,) accuracy on the whole test set."""
        return _ratio(_total(self.common.hits), self._of_each)

    @property
    def global_loss(self) -> np.ndarray:
        """(C,) mean loss of a unit of the whole test set."""
        return _ratio(_total(self.common.loss), self._of_each)

    @property
    def personal_accuracy(self) -> np.ndarray:
        """(C,) accuracy on what is the client's own; NaN for one with nothing to measure on."""
        return _ratio(self.personal.hits, self.personal_weight)

    @property
    def personal_loss(self) -> np.ndarray:
        """(C,) mean loss on what is the client's own; NaN for one with nothing to measure on."""
        return _ratio(self.personal.loss, self.personal_weight)

    @property
    def server_accuracy(self) -> float:
        """Accuracy of the federation's joint prediction; NaN while nobody has held an expert."""
        return float(_ratio(self.server.hits, self._of_anybody))

    @property
    def server_loss(self) -> float:
        """Mean loss of the federation's joint prediction; NaN while nobody has held an expert."""
        return float(_ratio(self.server.loss, self._of_anybody))

    @property
    def assembled_accuracy(self) -> float:
        """Accuracy of all experts in one model; NaN where there is none."""
        return float(_ratio(self.assembled and self.assembled.hits, _total(self.units)))

    @property
    def assembled_loss(self) -> float:
        """Mean loss of all experts in one model; NaN where there is none."""
        return float(_ratio(self.assembled and self.assembled.loss, _total(self.units)))

    @property
    def _of_each(self) -> np.ndarray:
        return np.broadcast_to(_total(self.units), np.shape(self.evaluated))

    @property
    def _of_anybody(self) -> np.ndarray:
        return _total(self.units) * np.asarray(self.evaluated).any()


def _total(columns: Any) -> Any:
    return None if columns is None else np.asarray(columns, np.float64).sum(axis=-1)


def _ratio(part: Any, whole: Any) -> np.ndarray:
    """NaN where the whole is zero, or there is no part."""
    if part is None:
        return np.full(np.shape(whole), np.nan)
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
