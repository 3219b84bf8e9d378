"""Inputs that once gave numbers which meant something else, without a word."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import (
    Federation,
    InputError,
    assignment,
    client,
    data,
    models,
    server,
    simulation,
    tasks,
)
from flexmoe_jax.assignment import Problem, solve
from flexmoe_jax.server.aggregate import Arrived

rng = np.random.default_rng(0)
X = rng.normal(size=(60, 5)).astype(np.float32)
Y = (X @ rng.normal(size=(5, 3))).argmax(1)
PARTS = np.split(np.arange(60), 6)
ARRAYS = {"x": X, "y": Y}
TASK = tasks.classification("x", "y")


class Net(nn.Module):
    """One MoE layer, called once or more."""

    out: int = 3
    calls: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = models.MoELayer(experts=4, hidden=8, name="moe")
        for _ in range(self.calls):
            x = x + layer(x)
        return nn.Dense(self.out)(x)


def six() -> data.ClientData:
    return data.join(ARRAYS, PARTS, data.label_counts(Y, PARTS, 3))


def federate(clients: data.ClientData, net: nn.Module | None = None, **options: Any) -> Federation:
    sample = {name: x[:2] for name, x in clients.arrays.items()}
    plain = {
        "task": TASK,
        "local": client.LocalTraining(optax.sgd(0.1), batch_size=5),
        "policy": assignment.make_policy("flex"),
        "capacity": np.full(len(clients.size), 2),
    }
    model = models.from_linen(net or Net())
    return Federation(model=model, sample=sample, **plain | options)


def train(
    federation: Federation, clients: data.ClientData, rounds: int = 1
) -> tuple[Any, Any, Any]:
    simulated = simulation.simulate(federation, clients)
    state, cohort = simulated.init(jax.random.key(0)), np.arange(federation.clients)
    report = None
    for _ in range(rounds):
        plan = simulated.plan(cohort, simulated.assign(state, cohort))
        state, report = simulated.round(state, clients, plan)
    return simulated, state, report


def test_noise_needs_the_aggregator_that_adds_it() -> None:
    admission = server.Admission(clip=1.0, noise_multiplier=1.0)
    with pytest.raises(InputError, match=r"admission.noise_multiplier=1.0: .* give no other one"):
        federate(six(), admission=admission, aggregator=server.mean())


def test_two_rounds_of_one_plan_have_different_noise() -> None:
    clients = six()
    federation = federate(
        clients,
        admission=server.Admission(clip=1.0, noise_multiplier=1.0),
        local=client.LocalTraining(optax.sgd(0.0), batch_size=5),
    )
    simulated = simulation.simulate(federation, clients)
    state, cohort = simulated.init(jax.random.key(0)), np.arange(6)
    plan = simulated.plan(cohort, simulated.assign(state, cohort))
    kept = [jax.device_get(state.server.shared)]
    for _ in range(2):
        state, _ = simulated.round(state, clients, plan)
        kept.append(jax.device_get(state.server.shared))
    first, second = (jax.tree.map(np.subtract, b, a) for a, b in pairwise(kept))
    assert optax.tree.norm(jax.tree.map(np.subtract, first, second)) > optax.tree.norm(first) / 2


def test_a_layer_that_is_called_twice_is_refused() -> None:
    with pytest.raises(InputError, match="layer moe, called 2 times: call each MoE layer once"):
        federate(six(), Net(calls=2))


def test_a_feed_refuses_more_clients_than_it_was_made_for() -> None:
    host = data.join(ARRAYS, PARTS, place=np.asarray)
    with pytest.raises(InputError, match="cohort=4 clients: the feed was made for 2"):
        data.feed_cohorts(host, 2)(np.arange(4))


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        (data.label_counts(Y, PARTS, 3).sum(0), r"counts=array \(3,\): give one row"),
        (data.label_counts(Y, PARTS, 3) / 10, "of client 0: its 10 examples have one class each"),
        (np.zeros((6, 3)), "of client 0: its 10 examples have one class each"),
    ],
)
def test_counts_that_are_not_the_clients_are_refused(counts: np.ndarray, line: str) -> None:
    with pytest.raises(InputError, match=line):
        data.join(ARRAYS, PARTS, counts)


def test_owners_that_are_not_the_clients_are_refused() -> None:
    with pytest.raises(InputError, match=r"owns=array \(2, 3\): give one row of groups"):
        data.join(ARRAYS, PARTS, owns=np.ones((2, 3), bool))


@pytest.mark.parametrize(
    ("group", "line"),
    [(np.zeros(59, int), r"group=int64\[59\]"), (np.full(60, 1.7), r"group=float64\[60\]")],
)
def test_groups_are_a_whole_number_for_each_example(group: np.ndarray, line: str) -> None:
    with pytest.raises(InputError, match=line):
        simulation.chunk_test_set(ARRAYS, group=group)


def test_classes_that_the_counts_do_not_know_are_refused() -> None:
    few = np.flatnonzero(Y < 2)
    parts = np.array_split(np.arange(few.size), 3)
    clients = data.join({"x": X[few], "y": Y[few]}, parts, data.label_counts(Y[few], parts, 2))
    simulated, state, _ = train(federate(clients, prior=False), clients, 0)
    with pytest.raises(InputError, match=r"labels of the test set=2: .*the classes of `counts`"):
        simulated.evaluate(state, simulation.chunk_test_set(ARRAYS), clients.about)


def test_newcomers_are_judged_by_groups_of_their_own() -> None:
    clients = six()
    trained, new = clients.of(np.arange(4)), clients.of(np.array([4, 5]))
    federation = federate(trained)
    _, state, _ = train(federation, trained)
    newcomers = simulation.await_newcomers(federation, new, np.array([2, 2]))
    own = newcomers.init(jax.random.key(0))
    given = newcomers.enrol(newcomers.probe(state.server, own, new))
    test = simulation.chunk_test_set(ARRAYS, group=np.repeat(np.arange(6), 10))
    with pytest.raises(InputError, match="group=5: give -1 to 1"):
        newcomers.evaluate(state.server, own, given, test, new.about)


def test_a_client_without_experts_does_not_spoil_the_others() -> None:
    def init(key: Any, x: Any) -> Any:
        gate, w = 0.1 * jax.random.normal(key, (4, 5)), jax.random.normal(key, (4, 5, 3))
        return {"moe": {"w": w, "gate": gate}, "b": jnp.zeros(3)}

    def apply(params: Any, x: Any, held: Any) -> Any:
        routing = models.route(x @ params["moe"]["gate"].T, held["moe"])
        # 0 / 0 for a client that holds nothing.
        weight = routing.combine / routing.combine.sum(-1, keepdims=True)
        out = jnp.einsum("be,edf,bd->bf", weight, params["moe"]["w"], x) + params["b"]
        return out, {"moe": routing}

    clients = six()
    model = models.from_functions(init, apply, {"moe/w": "expert", "moe/gate": "gate"})
    federation = federate(clients).replace(model=model)
    simulated = simulation.simulate(federation, clients)
    state, cohort = simulated.init(jax.random.key(0)), np.array([0, 1])
    plan = simulated.plan(cohort, simulated.assign(state, cohort))
    state, _ = simulated.round(state, clients, plan)
    found = simulated.evaluate(state, simulation.chunk_test_set(ARRAYS), clients.about)
    assert found.evaluated.sum() == 2
    assert np.isfinite(found.server_loss)


def test_a_long_mean_of_small_numbers_in_half_precision() -> None:
    half = jnp.bfloat16
    mean = server.mean()
    total = mean.zero({"w": jnp.zeros(4, half)}, {"m": {"w": jnp.zeros((2, 4), half)}}, 600, 1)
    one = Arrived(
        {"w": jnp.full((1, 4), 0.5, half)},
        {"m": {"w": jnp.full((1, 1, 4), 0.5, half)}},
        {"m": jnp.zeros((1, 1), jnp.int32)},
        jnp.ones(1),
        {"m": jnp.ones((1, 1))},
    )
    total = jax.lax.fori_loop(0, 600, lambda _, total: mean.add(total, one), total)
    assert float(total.shared["w"][0] / total.shared_weight) == 0.5
    assert float(total.experts["m"]["w"][0, 0] / total.expert_weight["m"][0]) == 0.5


def test_the_scale_of_the_units_weights_changes_nothing() -> None:
    clients, found = six(), []
    for weight in (1.0, 0.01):
        task = TASK._replace(weight=lambda b, w=weight: jnp.full(b["y"].shape, w))
        simulated, state, report = train(federate(clients, task=task), clients)
        result = simulated.evaluate(state, simulation.chunk_test_set(ARRAYS), clients.about)
        found.append((report.loss, result.personal_accuracy, result.global_loss))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4)


def test_scores_of_losses_below_zero_are_refused() -> None:
    clients = six()
    task = TASK._replace(loss=lambda out, b: TASK.loss(out, b) - 3.0)
    federation = federate(clients, task=task, fitness=server.FitnessOptions(score="loss"))
    with pytest.raises(InputError, match=r"fitness.score='?loss'?: .*give your own score"):
        train(federation, clients, 2)


def test_a_bound_of_almost_nothing_binds_nobody() -> None:
    found = solve(Problem([[3.0, 1.0, 0.5]], [1], 1e-7, np.inf))
    assert (found.status, found.value, found.bound) == ("optimal", 3.0, pytest.approx(3.0))


def test_classes_of_one_name_are_refused() -> None:
    images, labels = np.zeros((3, 2, 2, 1)), np.arange(3)
    with pytest.raises(InputError, match="classes=crane: two classes have this name"):
        data.Dataset("own", images, labels, images, labels, ("crane", "dog", "crane"))


def test_a_score_of_another_shape_is_refused() -> None:
    clients = six()
    fitness = server.FitnessOptions(score=lambda feedback: feedback.correct.sum())
    with pytest.raises(InputError, match=r"fitness.score=.*: give one score a pair: \(6, 2\)"):
        train(federate(clients, fitness=fitness), clients)


def test_a_model_that_returns_no_routings_is_refused() -> None:
    def init(key: Any, x: Any) -> Any:
        return {"moe": {"w": jnp.zeros((4, 5, 3)), "gate": jax.random.normal(key, (4, 5))}}

    def apply(params: Any, x: Any, held: Any) -> Any:
        return x @ params["moe"]["w"].mean(0)

    model = models.from_functions(init, apply, {"moe/w": "expert", "moe/gate": "gate"})
    with pytest.raises(InputError, match=r"and return \(outputs, \{layer: Routing\}\)"):
        federate(six()).replace(model=model)


def test_an_example_that_is_not_a_number_stays_its_clients_own() -> None:
    arrays = {"x": X.copy(), "y": Y}
    arrays["x"][0] = np.nan  # The first row of all, of client 0.
    parts = np.split(np.arange(60), [7, 19, 22, 42, 51])  # Batches of 5 are not full.
    clients = data.join(arrays, parts, data.label_counts(Y, parts, 3))
    _, _, report = train(federate(clients), clients)
    assert report.quarantined.sum() == 1


def test_the_loss_of_units_of_weight_0_is_nobodys() -> None:
    y = np.where(np.arange(60) % 7, Y, 0).astype(np.float32)[:, None]
    there = (np.arange(60) % 7 > 0).astype(np.float32)[:, None]

    def loss(outputs: jax.Array, batch: Any) -> jax.Array:
        return jnp.where(batch["there"] > 0, (outputs - batch["y"]) ** 2, jnp.nan)[:, 0]

    task = tasks.regression("x", "y")._replace(loss=loss, weight=lambda batch: batch["there"][:, 0])
    clients = data.join({"x": X, "y": y, "there": there}, PARTS)
    options = {"task": task, "fitness": server.FitnessOptions("loss"), "prior": False}
    _, _, report = train(federate(clients, Net(1), **options), clients)
    assert np.isfinite(report.loss).all()
    assert not report.quarantined.any()


def test_a_feed_of_other_clients_has_no_examples_of_the_cohort() -> None:
    clients = six()
    simulated = simulation.simulate(federate(clients), clients)
    feed = data.feed_cohorts(clients, 3, jax.device_put)
    state, cohort = simulated.init(jax.random.key(0)), np.array([3, 4, 5])
    plan = simulated.plan(cohort, simulated.assign(state, cohort))
    report = simulated.round(state, feed(np.array([0, 1, 2])), plan)[1]
    assert not np.asarray(report.examples).any()


REGRESSION = tasks.regression("x", "y")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"task": REGRESSION}, "fitness.score=accuracy: the task says of no prediction"),
        (
            {
                "task": TASK._replace(adjust=None),
                "prior": False,
                "local": client.LocalTraining(optax.sgd(0.1), prior=1.0),
            },
            "local.prior=1.0: the task's outputs have no classes",
        ),
        (
            {"share": np.array([0.4, 0.2, 0.2, 0.2])},
            "share=.*: the policy aims at other shares",
        ),
    ],
)
def test_what_would_have_no_effect_or_another_is_refused(options: dict, line: str) -> None:
    clients = six()
    with pytest.raises(InputError, match=line):
        federate(clients, **options)


def test_solutions_of_another_cohort_are_refused() -> None:
    clients = six()
    federation = federate(clients, capacity=np.array([1, 1, 3, 1, 3, 1]))
    simulated = simulation.simulate(federation, clients)
    state = simulated.init(jax.random.key(0))
    others = simulated.assign(state, np.array([2, 4]))
    with pytest.raises(InputError, match="solutions=3 experts: client 0 has no room"):
        simulated.plan(np.array([0, 3]), others)


def test_a_policy_takes_no_options_of_the_federation() -> None:
    with pytest.raises(TypeError, match="deficit_decay, layers belong to the federation"):
        assignment.make_policy("flex", layers="each", deficit_decay=0.5)


def test_without_moe_layers_clients_are_evaluated_layer_by_layer_too() -> None:
    clients = six()

    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3)(x)

    federation = federate(clients, Dense(), layers="each", capacity=np.ones(6, int))
    simulated, state, _ = train(federation, clients)
    found = simulated.evaluate(state, simulation.chunk_test_set(ARRAYS, 30), clients.about)
    assert np.isfinite(found.personal_accuracy).sum() == 6
