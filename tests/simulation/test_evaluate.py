"""Evaluation of every client's model on real digits: by a plain loop, and in any order."""

from __future__ import annotations

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from flexmoe_jax import simulation
from flexmoe_jax.data import About
from flexmoe_jax.errors import InputError
from flexmoe_jax.metrics import evaluation_figures
from flexmoe_jax.models import Ownership
from flexmoe_jax.simulation import chunk_test_set
from flexmoe_jax.types import Params
from tests.simulation.conftest import EXPERTS, MODULE, prepare

# Client 6 has never held an expert.
SLOTS = np.array([[0, 1, 4], [2, 4, 4], [1, 2, 3], [0, 4, 4], [0, 3, 4], [1, 2, 3], [4, 4, 4]])


def begin(simulated):
    state = simulated.init(jax.random.key(0))
    return state._replace(clients=state.clients._replace(slots=jnp.asarray(SLOTS[:, None])))


@pytest.fixture(scope="module")
def federation(make_simulation):
    """A simulation whose clients know their label shares."""
    simulated = make_simulation(prior=True)
    return simulated, begin(simulated)


@pytest.fixture(scope="module")
def test_arrays(digits):
    return {"images": digits.test_images, "labels": digits.test_labels}


def test_chunks_keep_every_example_once():
    arrays = {
        "images": np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1),
        "labels": np.arange(7, dtype=np.int32),
    }
    test = chunk_test_set(arrays, batch_size=3)
    assert test.group is None
    assert test.valid.tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    for name, values in arrays.items():
        found = np.asarray(test.arrays[name])
        assert found.dtype == values.dtype
        assert (found.reshape(9, *values.shape[1:])[:7] == values).all()
    # Of a size as even as can be: 4 and 4, not 6 and 2; who fills up belongs to nobody.
    owned = chunk_test_set(arrays, batch_size=6, group=np.array([0, 1, 2, -1, 0, 1, 2]))
    assert owned.group.tolist() == [[0, 1, 2, -1], [0, 1, 2, -1]]
    assert owned.valid.tolist() == [[True] * 4, [True] * 3 + [False]]


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({}, r"test=\{\}: give arrays with one entry for each test example"),
        ({"images": np.zeros((0, 2))}, "test={'images': 0}: give arrays"),
        ({"images": np.zeros((3, 2)), "labels": np.zeros(2)}, "test={'images': 3, 'labels': 2}"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(arrays, line):
    with pytest.raises(InputError, match=f"^{line}"):
        chunk_test_set(arrays)


def softmax(logits):
    return scipy.special.softmax(logits, axis=-1)


@pytest.mark.parametrize(
    "choices",
    [{"prior": False}, {"prior": True, "ownership": Ownership(shared_gate=True)}],
    ids=["plain", "shared gate and prior"],
)
def test_against_a_plain_loop(make_simulation, clients, test_arrays, choices):
    """Evaluates one client at a time, each with its whole model, in NumPy."""
    simulated = make_simulation(**choices)
    state, layout = begin(simulated), simulated.setting.federation.layout
    images, labels = prepare(jnp.asarray(test_arrays["images"])), test_arrays["labels"]
    found = simulated.evaluate(state, chunk_test_set(test_arrays, batch_size=33), clients.about)

    @jax.jit
    def apply(gates, held):
        params = layout.merge(Params(state.server.shared, state.server.experts, gates, {}))
        variables = {"params": params, "held": {"mask": held}}
        return MODULE.apply(variables, images, mutable=["routing"])[0]

    def judge(logits):
        right = logits.argmax(axis=1) == labels
        return right, -np.log(softmax(logits)[np.arange(len(labels)), labels])

    def by_class(values):
        return np.array([values[labels == y].mean() for y in range(10)])

    joint, accuracies = 0.0, []
    all_gates, found = jax.device_get((state.clients.gates, found))
    shares = np.asarray(clients.label_share)
    for client, slots in enumerate(SLOTS[:6]):
        held = (slots[:, None] == np.arange(EXPERTS)).any(axis=0)
        gates = jax.tree.map(lambda leaf, client=client: leaf[client], all_gates)
        logits = np.asarray(apply(gates, held))
        joint = joint + softmax(logits) / 6
        hit, loss = judge(logits)
        assert found.global_accuracy[client] == pytest.approx(hit.mean(), abs=1e-6)
        assert found.global_loss[client] == pytest.approx(loss.mean(), rel=1e-5)
        assert np.allclose(found.class_accuracy[client], by_class(hit), atol=1e-6)
        share = shares[client]
        if choices["prior"]:
            hit, loss = judge(logits + np.log((share + 1e-3) / 1.01))
        accuracies.append(by_class(hit) @ share)
        assert found.personal_accuracy[client] == pytest.approx(accuracies[-1], abs=1e-5)
        assert found.personal_loss[client] == pytest.approx(by_class(loss) @ share, rel=1e-4)
    hit, loss = judge(np.log(joint))
    assert found.server_accuracy == pytest.approx(hit.mean(), abs=1e-6)
    assert found.server_loss == pytest.approx(loss.mean(), rel=1e-5)
    assert found.evaluated.tolist() == [True] * 6 + [False]
    # The last client has never held an expert, so that it has no model.
    for of_client in (found.global_accuracy, found.global_loss, found.personal_loss):
        assert np.isnan(of_client).tolist() == [False] * 6 + [True]
    assert np.isnan(found.class_accuracy[6]).all()
    figures = evaluation_figures(found)
    assert figures["eval/clients"] == figures["eval/personal_clients"] == 6
    assert figures["eval/personal_accuracy_p10"] == pytest.approx(np.percentile(accuracies, 10))
    if "ownership" not in choices:
        assert found.assembled is None
        return
    hit, loss = judge(np.asarray(apply({}, np.ones(EXPERTS, bool))))
    assert found.assembled_accuracy == pytest.approx(hit.mean(), abs=1e-6)
    assert found.assembled_loss == pytest.approx(loss.mean(), rel=1e-5)


def test_a_class_that_the_test_set_lacks_is_left_out(federation, clients, test_arrays):
    simulated, state = federation
    some = test_arrays["labels"] != 3
    test = chunk_test_set({name: values[some] for name, values in test_arrays.items()})
    found = simulated.evaluate(state, test, clients.about)
    assert np.isnan(found.class_accuracy[:, 3]).all()
    whole = simulated.evaluate(state, chunk_test_set(test_arrays, 50), clients.about)
    # Clients that have none of that class lose nothing; the others' weight is what is left.
    share = np.asarray(clients.label_share)
    assert np.allclose(found.personal_weight, 1 - share[:, 3], atol=1e-6)
    none = np.isclose(share[:6, 3], 0)
    assert 0 < none.sum() < 6
    same = np.isclose(found.personal_accuracy[:6], whole.personal_accuracy[:6], atol=1e-5)
    assert same[none].all()
    assert np.isfinite(found.personal_accuracy[:6]).all()
    assert np.isfinite(found.personal_loss[:6]).all()


def test_a_client_none_of_whose_classes_are_there_has_no_personal_figure(
    federation, clients, test_arrays
):
    simulated, state = federation
    # A client with equal label shares predicts the same as without knowing them.
    share = np.zeros((7, 10), np.float32)
    share[:, 3], share[0] = 1.0, 0.1
    some = test_arrays["labels"] != 3
    test = chunk_test_set({name: values[some] for name, values in test_arrays.items()})
    found = simulated.evaluate(state, test, About(share))
    assert np.isnan(found.personal_accuracy).tolist() == [False] + [True] * 6
    assert np.isnan(found.personal_loss).tolist() == [False] + [True] * 6
    figures = evaluation_figures(found)
    assert (figures["eval/clients"], figures["eval/personal_clients"]) == (6, 1)
    expected = np.nanmean(found.class_accuracy[0])
    assert figures["eval/personal_accuracy"] == pytest.approx(expected, abs=1e-6)
    assert figures["eval/personal_accuracy_p10"] == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def one_by_one(federation, clients, test_arrays):
    """What each client makes of each example: `common` and `personal` of (C, M), one at a time."""
    simulated, state = federation
    size = len(test_arrays["labels"])
    # Every example belongs to all clients.
    everyone = clients.about._replace(owns=jnp.ones((7, 1), bool))
    # NumPy's arrays, of which a slice is no program of its own.
    test = jax.device_get(chunk_test_set(test_arrays, 1, group=np.zeros(size, int)))
    alone = [jax.tree.map(lambda x, i=i: x[i : i + 1], test) for i in range(size)]
    found = [jax.device_get(simulated.evaluate(state, one, everyone)) for one in alone]
    common = [jax.tree.map(lambda x: x.sum(axis=1), each.common) for each in found]
    personal = [each.personal for each in found]
    return [jax.tree.map(lambda *x: np.stack(x, axis=1), *each) for each in (common, personal)]


@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), nobody=st.booleans(), domains=st.booleans())
def test_own_examples_are_counted_for_their_owners_in_any_order(
    federation, clients, test_arrays, one_by_one, seed, nobody, domains
):
    """For any ownership and order of rows, the sums are those counted one by one."""
    simulated, state = federation
    rng = np.random.default_rng(seed)
    size = len(test_arrays["labels"])
    group = rng.integers(-1 if nobody else 0, 7, size)
    # A client by its number, or several clients each of the groups.
    owns = rng.integers(0, 2, (7, 7)).astype(bool) if domains else np.eye(7, dtype=bool)
    owns[4] = False  # Client 4 has none of its own.
    group[group == 4] = 2
    mine = owns[:, group] & (group >= 0)
    order = rng.permutation(size)
    arrays = {name: values[order] for name, values in test_arrays.items()}
    test = chunk_test_set(arrays, 33, group=group[order])
    about = clients.about._replace(owns=jnp.asarray(owns) if domains else None)
    found = jax.device_get(simulated.evaluate(state, test, about))
    common, personal = one_by_one
    assert np.array_equal(found.personal_weight, mine.sum(axis=1))
    assert np.array_equal(found.personal.hits[:6], (personal.hits * mine).sum(axis=1)[:6])
    assert np.allclose(found.personal.loss[:6], (personal.loss * mine).sum(axis=1)[:6], rtol=1e-4)
    assert np.array_equal(found.common.hits.sum(axis=1)[:6], common.hits.sum(axis=1)[:6])
    assert np.allclose(found.common.loss.sum(axis=1)[:6], common.loss.sum(axis=1)[:6], rtol=1e-4)
    figures = evaluation_figures(found)
    able = [c for c in range(6) if mine[c].any()]
    assert 4 not in able
    assert figures["eval/personal_clients"] == len(able)
    each = [personal.hits[c, mine[c]].mean() for c in able]
    assert figures["eval/personal_accuracy"] == pytest.approx(np.mean(each))
    assert figures["eval/personal_accuracy_p10"] == pytest.approx(np.percentile(each, 10))
    each = [personal.loss[c, mine[c]].mean() for c in able]
    assert figures["eval/personal_loss"] == pytest.approx(np.mean(each), rel=1e-4)


@pytest.mark.parametrize(("devices", "owned"), [(2, False), (8, True)])
def test_devices_share_the_examples(
    make_simulation, federation, clients, test_arrays, devices, owned
):
    simulated, state = federation
    mesh = simulation.client_mesh(devices)
    some = {name: values[:37] for name, values in test_arrays.items()}
    group = np.arange(37) % 6 if owned else None
    alone = simulated.evaluate(state, chunk_test_set(some, 20, group=group), clients.about)
    there = simulation.replicate((state, clients.about), mesh)
    test = chunk_test_set(some, 20, mesh, group)
    shared = make_simulation(prior=True, mesh=mesh).evaluate(there[0], test, there[1])
    alone, shared = jax.device_get((alone, shared))
    chex.assert_trees_all_close(alone, shared, atol=1e-5, rtol=1e-5)
    assert np.array_equal(alone.common.hits, shared.common.hits)
    if owned:
        assert np.array_equal(alone.personal.hits, shared.personal.hits)
        assert shared.personal_weight.tolist() == [7, 6, 6, 6, 6, 6, 0]


@hypothesis.settings(max_examples=5)
@hypothesis.given(order=st.permutations(range(7)))
def test_the_order_of_the_clients_changes_no_figure(federation, clients, test_arrays, order):
    simulated, state = federation
    order = np.array(order)
    group = np.arange(len(test_arrays["labels"])) % 5
    moved = state._replace(clients=jax.tree.map(lambda leaf: leaf[order], state.clients))
    share, back = clients.label_share, np.argsort(order)
    for owners, theirs in ((None, None), (group, back[group])):
        before = simulated.evaluate(
            state, chunk_test_set(test_arrays, 50, group=owners), About(share)
        )
        after = simulated.evaluate(
            moved, chunk_test_set(test_arrays, 50, group=theirs), About(share[order])
        )
        assert np.array_equal(np.asarray(before.common.hits)[order], after.common.hits)
        assert evaluation_figures(after) == pytest.approx(evaluation_figures(before), rel=1e-6)
