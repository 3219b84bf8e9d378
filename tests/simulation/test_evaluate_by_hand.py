"""Every metric of an evaluation, worked out by hand.

Two experts give the probabilities of the classes for an input. One client holds the first, one
the second, one both, and one none.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import tasks
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.data import About, join
from flexmoe_jax.federation import Federation
from flexmoe_jax.metrics import evaluation_figures
from flexmoe_jax.models import Marked, Model, Ownership, route
from flexmoe_jax.server import FitnessOptions
from flexmoe_jax.simulation import Simulation, chunk_test_set, simulate
from flexmoe_jax.types import Evaluation, State

# The class probabilities of each expert for the inputs 0, 1, 2.
SAID = np.array(
    [
        [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.5, 0.25]],
        [[0.125, 0.125, 0.75], [0.5, 0.25, 0.25], [0.5, 0.3, 0.2]],
    ]
)
# The expert that each client's gate prefers for each input; the first two have no choice.
CHOICE = np.array([[0, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]])
SLOTS = np.array([[0, 2], [1, 2], [0, 1], [2, 2]])
# Inputs 0, 1, 2 are of the classes 0, 0, 1; the test set has none of class 2.
TEST = {"images": np.arange(3, dtype=np.int32), "labels": np.array([0, 0, 1], np.int32)}
SHARE = np.array([[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1], [1, 0, 0]], np.float32)
LN2 = log(2)


def table(outputs: np.ndarray) -> Model:
    """A model that looks up the experts' probabilities (E, X, Y) and the gate's logits (E, X)."""

    def init(key: Any, inputs: Any) -> Any:
        gate = jnp.zeros(outputs.shape[:2])
        experts = jnp.asarray(outputs, jnp.float32)
        return {
            "layer": {
                "expert": {"table": Marked(experts, "expert")},
                "gate": {"table": Marked(gate, "gate")},
            }
        }

    def head(params: Any, inputs: Any, held: Any) -> Any:
        layer = params["layer"]
        routing = route(jnp.moveaxis(layer["gate"]["table"][:, inputs], 0, -1), held["layer"])
        said = layer["expert"]["table"][:, inputs]
        chosen = jnp.moveaxis(routing.selected, -1, 0)[..., None]
        return jnp.where(chosen, said, 0.0).sum(axis=0), {"layer": routing}

    return Model(init, lambda params, inputs: inputs, head)


class Federated(NamedTuple):
    """Clients with the gates and experts above, and a test set."""

    simulated: Simulation
    state: State
    arrays: dict[str, np.ndarray]
    label_share: np.ndarray

    def look(self, group: Sequence[int] | None = None, owns: Any = None) -> Evaluation:
        """Chunks of two examples, so that there is padding."""
        test = chunk_test_set(self.arrays, 2, group=None if group is None else np.array(group))
        about = About(self.label_share, owns)
        return jax.device_get(self.simulated.evaluate(self.state, test, about))


def federate(
    outputs: np.ndarray, arrays: dict[str, np.ndarray], share: np.ndarray, **choices: Any
) -> Federated:
    """As many of the clients as label shares."""
    clients = len(share)
    federation = Federation(
        table(outputs),
        sample={name: values[:2] for name, values in arrays.items()},
        capacity=np.full(clients, 2),
        policy=make_policy("random"),
        local=LocalTraining(optax.sgd(0.1)),
        **choices,
    )
    simulated = simulate(federation, join(arrays, [np.arange(1)] * clients, share))
    state = simulated.init(jax.random.key(0))
    own = state.clients._replace(slots=jnp.asarray(SLOTS[:clients, None]))
    preferred = (CHOICE[:clients, None] == np.arange(2)[:, None]).astype(np.float32)  # (C, E, X)
    if own.gates:
        own = own._replace(gates={"layer": {"gate": {"table": preferred}}})
    else:
        state.server.experts["layer"]["gate"]["table"] = preferred[0]
    return Federated(simulated, state._replace(clients=own), arrays, share)


@pytest.fixture(scope="module")
def plain() -> Federated:
    return federate(np.log(SAID), TEST, SHARE, prior=False)


@pytest.fixture(scope="module")
def knowing() -> Federated:
    """Clients that know their label shares, as they do unless told otherwise."""
    return federate(np.log(SAID), TEST, SHARE)


def test_figures_by_hand(plain):
    found = plain.look()
    assert found.evaluated.tolist() == [True, True, True, False]
    assert found.units.tolist() == [2, 1, 0]
    # The first expert is right on 0 and 2, the second on 1; the third client's on 1 and 2.
    assert np.allclose(found.global_accuracy[:3], [2 / 3, 1 / 3, 2 / 3])
    losses = [(1 + 2 + 1) * LN2, (3 + 1) * LN2 + log(10 / 3), (3 + 1 + 1) * LN2]
    assert np.allclose(found.global_loss[:3], np.array(losses) / 3)
    assert np.allclose(found.class_accuracy[:3, :2], [[1 / 2, 1], [1 / 2, 0], [1 / 2, 1]])
    # Classes by their label shares; class 2, of which there is no example, is left out.
    assert found.personal_weight[:3].tolist() == [1, 0.5, 0]
    assert np.allclose(found.personal_accuracy[:2], [(1 / 2 + 1) / 2, 0])
    assert np.allclose(found.personal_loss[:2], [(3 / 2 + 1) / 2 * LN2, log(10 / 3)])
    assert np.isnan([found.personal_accuracy[2], found.personal_loss[2]]).all()
    # Mean probabilities: (1/4, 1/6, 7/12), (5/12, 1/3, 1/4), (1/3, 13/30, 7/30).
    assert found.server_accuracy == pytest.approx(2 / 3)
    server_loss = (log(4) + log(12 / 5) + log(30 / 13)) / 3
    assert found.server_loss == pytest.approx(server_loss, rel=1e-5)
    # Gates stay with their clients, so there is no one model of all experts.
    assert found.assembled is None
    assert evaluation_figures(found) == pytest.approx(
        {
            "eval/clients": 3,
            "eval/personal_clients": 2,
            "eval/personal_accuracy": 3 / 8,
            "eval/personal_accuracy_p10": 3 / 40,  # a tenth of the way from 0 to 3/4
            "eval/personal_loss": (5 / 4 * LN2 + log(10 / 3)) / 2,
            "eval/global_accuracy": 5 / 9,
            "eval/global_loss": sum(losses) / 9,
            "eval/server_accuracy": 2 / 3,
            "eval/server_loss": server_loss,
        },
        rel=1e-5,
    )


def adjusted(said: list[float], share: list[float], label: int) -> float:
    """Loss of probabilities times smoothed label shares: the posterior by Bayes' rule."""
    likely = np.array(said) * (np.array(share) + 0.001) / 1.003
    return -log(likely[label] / likely.sum())


def test_clients_know_their_label_shares(plain, knowing):
    found = knowing.look()
    # What the second client never has, class 0, is no longer what it says of input 2.
    assert np.allclose(found.personal_accuracy[:2], [3 / 4, 1])
    half = [0.5, 0.5, 0]
    of_first = [
        adjusted([0.5, 0.25, 0.25], half, 0),
        adjusted([0.25, 0.5, 0.25], half, 0),
        adjusted([0.25, 0.5, 0.25], half, 1),
    ]
    of_second = adjusted([0.5, 0.3, 0.2], [0, 0.5, 0.5], 1)
    assert np.allclose(
        found.personal_loss[:2], [(of_first[0] + of_first[1]) / 4 + of_first[2] / 2, of_second]
    )
    # By hand: 0.3 of 0.5 is 3/5, but for the little that smoothing leaves to class 0.
    assert of_second == pytest.approx(log(5 / 3), abs=0.003)
    # It is for their own predictions, and for no others.
    for name in ("common", "units", "server", "personal_weight"):
        chex.assert_trees_all_equal(getattr(plain.look(), name), getattr(found, name))
    # On test examples of their own, too: the first has input 0, the second 1 and 2.
    own = knowing.look([0, 1, 1])
    assert np.allclose(own.personal_accuracy[:2], [1, 1 / 2])
    unlikely = adjusted([0.5, 0.25, 0.25], [0, 0.5, 0.5], 0)
    assert np.allclose(own.personal_loss[:2], [of_first[0], (unlikely + of_second) / 2])


def test_own_examples_by_hand(plain):
    # Input 0 is the first client's, input 2 the second's, and 1 nobody's.
    found = plain.look([0, -1, 1])
    assert found.personal_weight.tolist() == [1, 1, 0, 0]
    assert np.allclose(found.personal_accuracy[:2], [1, 0])
    assert np.allclose(found.personal_loss[:2], [LN2, log(10 / 3)])
    assert evaluation_figures(found)["eval/personal_clients"] == 2
    # Of domains, a client may own several, and several clients one.
    owns = np.array([[True, False], [False, True], [True, True], [True, True]])
    found = plain.look([0, -1, 1], owns)
    assert found.personal_weight.tolist() == [1, 1, 2, 2]
    assert np.allclose(found.personal_accuracy[:3], [1, 0, 1 / 2])
    assert np.allclose(found.personal_loss[:3], [LN2, log(10 / 3), 2 * LN2])
    # The fourth has never held an expert.
    assert evaluation_figures(found)["eval/personal_clients"] == 3
    assert not found.personal.hits[3]


def test_all_experts_in_one_model_by_hand():
    together = federate(np.log(SAID), TEST, SHARE[:2], ownership=Ownership(shared_gate=True))
    found = together.look()
    # The gate chooses for every input the expert that is right, at a half each; no client has both.
    assert np.allclose(found.global_accuracy, [2 / 3, 1 / 3])
    assert (found.assembled_accuracy, found.assembled_loss) == pytest.approx((1, LN2))
    figures = evaluation_figures(found)
    assert figures["eval/assembled_accuracy"] == pytest.approx(1)
    assert figures["eval/assembled_loss"] == pytest.approx(LN2)
    # It is there before anybody has held an expert, when there is no prediction of all.
    own = together.state.clients._replace(slots=jnp.full((2, 1, 2), 2))
    found = together._replace(state=together.state._replace(clients=own)).look()
    assert (found.assembled_accuracy, found.assembled_loss) == pytest.approx((1, LN2))
    assert np.isnan([found.server_accuracy, found.server_loss]).all()
    assert evaluation_figures(found) == {"eval/clients": 0, "eval/personal_clients": 0}


def test_tokens_are_counted_one_by_one():
    # Texts 0 -> 1 -> 2, and 1 -> 0 with a token of padding.
    texts = {"tokens": np.array([[0, 1, 2], [1, 0, -1]], np.int32)}
    nameless = np.zeros((2, 0), np.float32)
    federation = federate(np.log(SAID), texts, nameless, task=tasks.next_token())
    found = federation.look([0, 1])
    assert found.units.tolist() == [3]
    # The first expert: 1 after 0 at 1/4, 2 after 1 at 1/4, 0 after 1 at 1/4; none is its best.
    # The second: at 1/8, 1/4, 1/2; the last is.
    assert np.allclose(found.global_accuracy, [0, 1 / 3])
    assert np.allclose(found.global_loss, [2 * LN2, (3 + 2 + 1) / 3 * LN2])
    # Texts of their own: the first has two tokens, the second one.
    assert found.personal_weight.tolist() == [2, 1]
    assert np.allclose(found.personal_accuracy, [0, 1])
    assert np.allclose(found.personal_loss, [2 * LN2, LN2])
    # Without owners everybody's own is everything.
    found = federation.look()
    assert np.allclose(found.personal_loss, found.global_loss)
    assert np.allclose(found.personal_accuracy, found.global_accuracy)


def test_numbers_to_be_told_have_losses_alone():
    # Two experts say 1 and 3 of everything; the targets are 1, 2 and 5.
    said = np.broadcast_to(np.array([1.0, 3.0])[:, None, None], (2, 3, 1))
    arrays = {"images": np.arange(3, dtype=np.int32), "labels": np.array([1, 2, 5], np.float32)}
    federation = federate(
        said,
        arrays,
        np.zeros((2, 0), np.float32),
        task=tasks.regression(),
        fitness=FitnessOptions("loss"),
        ownership=Ownership(shared_gate=True),
    )
    # Halves of 0 + 1 + 16 and of 4 + 1 + 4; of the mean, 2, of 1 + 0 + 9; of 1, 3, 1: 0 + 1 + 16.
    assert evaluation_figures(federation.look()) == pytest.approx(
        {
            "eval/clients": 2,
            "eval/personal_clients": 2,
            "eval/personal_loss": (17 + 9) / 12,
            "eval/global_loss": (17 + 9) / 12,
            "eval/server_loss": 10 / 6,
            "eval/assembled_loss": 17 / 6,
        }
    )
