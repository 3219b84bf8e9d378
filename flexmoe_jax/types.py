"""Types that more than one room of the package uses.

Axis legend: `C` clients, `P` clients in this round's cohort, `E` experts, `K` expert slots (the
largest capacity), `N` examples of a client, `B` batch, `S` local steps, `D` features, `H` hidden
units, `Y` classes, `T` rounds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array
Key = jax.Array
PyTree = Any


class Params(NamedTuple):
    """Parameters by who owns them; the experts' and the gate's leaves lead with the expert axis.

    Each is a part of the model's tree of parameters, with its names.

    Attributes:
      shared: ψ, averaged over clients: the backbone and the head.
      experts: θ, leaves (E, ...), or (K, ...) for the experts that one client holds.
      gate: φ of one client, leaves (E, ...) or (K, ...); it never leaves its client.
      private: all else of one client that never leaves it; nothing in FLEX-MoE.
    """

    shared: PyTree
    experts: PyTree
    gate: PyTree
    private: PyTree


class Feedback(NamedTuple):
    """What a client tells the server about the experts it held, summed over its local steps.

    Every batch is scored before the step that learns from it. Attributes (..., K):
      usage: examples routed to the expert.
      correct: of those, how many the client's model classified correctly.
      loss: of those, the sum of the cross-entropy, in nats.
    """

    usage: Array
    correct: Array
    loss: Array


class Plan(NamedTuple):
    """Who trains in a round, and what each holds; shapes never change between rounds.

    Attributes:
      clients: (P,) int32 the cohort's client ids; C marks padding, which trains nothing.
      slots: (P, K) int32 the experts of each, rising; E marks an empty slot.
      load: (E,) assigned load, in the units of the load model.
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


class State(NamedTuple):
    """All that a federation carries from round to round.

    Attributes:
      key: () typed random key of the run; never advanced, only folded.
      round: () int32 rounds completed.
      shared: ψ.
      experts: θ, leaves (E, ...).
      gates: φ of every client, leaves (C, E, ...).
      private: what else each client keeps to itself, leaves (C, ...).
      shared_optimizer: server optimiser state of ψ.
      expert_optimizer: server optimiser state of each θ_e, leaves (E, ...).
      fitness: (C, E) Q.
      slots: (C, K) int32 each client's latest experts; E marks an empty slot.
      held_rounds: (C, E) int32 rounds in which client c held expert e.
      usage: (C, E) examples that c has routed to e so far.
      load: (E,) assigned load so far.
      deficit: (E,) load that each expert was owed and did not get.
      fresh: (C, E) bool, client c still has expert e as the server has it now; it has those that it
        received last.
      residual: what compression has so far kept back of each client's updates, for error feedback:
        a pair of trees like ψ and θ, leaves (C, ...) and (C, K, ...); () without.
      norms: (4, W) how long updates were lately (see `quarantine`); () where they are not judged by
        that.
    """

    key: Key
    round: Array
    shared: PyTree
    experts: PyTree
    gates: PyTree
    private: PyTree
    shared_optimizer: PyTree
    expert_optimizer: PyTree
    fitness: Array
    slots: Array
    held_rounds: Array
    usage: Array
    load: Array
    deficit: Array
    fresh: Array
    residual: PyTree
    norms: PyTree


class RoundReport(NamedTuple):
    """What a round of training reports.

    Attributes:
      loss: (P,) mean training cross-entropy of each client of the plan, in nats; 0 for those that
        delivered nothing.
      examples: (P,) examples that each client trained on, counted once a step.
      usage: (E,) examples routed to each expert.
      quarantined: (P,) bool, clients whose update was refused; what they did counts for nothing.
      void: () bool, all were refused, since some turned out to be too long after they had been
        summed (see `quarantine`).
      finite: () bool, all parameters are numbers: ψ, θ, and the cohort's gates and private ones.
    """

    loss: Array
    examples: Array
    usage: Array
    quarantined: Array
    void: Array
    finite: Array


class Evaluation(NamedTuple):
    """What the clients' models get right on the test set.

    The arrays are sums, which always exist; a figure that does not exist is NaN.

    Attributes:
      hits: (C, Y) test examples of each class that each client's model classifies correctly.
      examples: (Y,) test examples of each class.
      personal_hits: (C,) what the client gets right of what is its own: of its own test examples
        where clients have such; else of the test set weighted to its label shares, which is the sum
        over classes of its share times its accuracy.
      personal_weight: (C,) how many those are: own test examples, or the part of its label shares
        whose classes the test set has; 0 where there is nothing to measure on.
      server_hits: () test examples that the mean of the clients' class probabilities gets right.
      evaluated: (C,) bool, clients that have held an expert; the others' sums are void.
    """

    hits: Array
    examples: Array
    personal_hits: Array
    personal_weight: Array
    server_hits: Array
    evaluated: Array

    @property
    def class_accuracy(self) -> np.ndarray:
        """(C, Y) accuracy on each class; NaN for a class that the test set has no example of."""
        return _ratio(self.hits, self.examples)

    @property
    def global_accuracy(self) -> np.ndarray:
        """(C,) accuracy on the whole test set."""
        return _ratio(np.asarray(self.hits).sum(axis=1), np.asarray(self.examples).sum())

    @property
    def personal_accuracy(self) -> np.ndarray:
        """(C,) accuracy on what is the client's own; NaN for one with nothing to measure on."""
        return _ratio(self.personal_hits, self.personal_weight)

    @property
    def server_accuracy(self) -> float:
        """Accuracy of the federation's joint prediction; NaN while nobody has held an expert."""
        total = np.asarray(self.examples).sum() * np.asarray(self.evaluated).any()
        return float(_ratio(self.server_hits, total))


def _ratio(part: Any, whole: Any) -> np.ndarray:
    """NaN where the whole is nil."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
