"""Models taken out of a federation predict what evaluation says that they do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax import client, models, simulation
from flexmoe_jax.errors import InputError
from flexmoe_jax.simulation import assembled_model, client_model
from flexmoe_jax.tasks import cross_entropy
from tests.conftest import CAPACITY
from tests.simulation.conftest import DEEP, EXPERTS


@pytest.fixture(scope="module", params=["one layer", "each of two", "own heads"])
def trained(request, make_simulation, clients, digits):
    """A federation, a state in which all clients but the last hold experts, its evaluation."""
    choices = {
        "one layer": {"prior": True, "ownership": models.Ownership(shared_gate=True)},
        "each of two": {"model": DEEP, "layers": "each"},
        "own heads": {"ownership": models.Ownership(("head", "backbone")), "prior": True},
    }
    simulated = make_simulation(**choices[request.param])
    state, rng = simulated.init(jax.random.key(0)), np.random.default_rng(0)
    slots = np.full(state.clients.slots.shape, EXPERTS, np.int32)
    for (number, group), _ in np.ndenumerate(slots[:6, :, 0]):
        held = rng.choice(EXPERTS, CAPACITY[number], replace=False)
        slots[number, group, : held.size] = np.sort(held)
    state = state._replace(clients=state.clients._replace(slots=jnp.asarray(slots)))
    arrays = {"images": digits.test_images, "labels": digits.test_labels}
    found = simulated.evaluate(state, simulation.chunk_test_set(arrays), clients.about)
    return simulated.setting.federation, state, found


def figures(model, digits):
    """Hits and losses (M,) on the test set."""

    @jax.jit
    def judge(params, images, labels):
        logits = model.apply(params, images)
        return logits.argmax(axis=1) == labels, cross_entropy(logits, labels)

    return jax.device_get(judge(model.params, digits.test_images, digits.test_labels))


def test_a_clients_model_is_the_one_that_is_evaluated(trained, clients, digits):
    federation, state, found = trained
    for number in (0, 5):
        plain = client_model(federation, state, number)
        assert plain.log_share is None
        hits, losses = figures(plain, digits)
        assert hits.mean() == pytest.approx(found.global_accuracy[number], abs=1e-6)
        assert losses.mean() == pytest.approx(found.global_loss[number], rel=1e-5)

        share = np.asarray(clients.label_share)[number]
        own = client_model(federation, state, number, share)
        assert (own.log_share is not None) == federation.prior
        if federation.prior:
            assert np.allclose(own.log_share, client.log_shares(share))
        _, losses = figures(own, digits)
        of_class = [losses[digits.test_labels == y].mean() for y in range(10)]
        assert share @ np.array(of_class) == pytest.approx(found.personal_loss[number], rel=1e-4)


def test_it_has_the_experts_that_the_client_holds_and_no_others(trained):
    federation, state, _ = trained
    whole = federation.layout.merge(federation.layout.split(federation.shapes))
    sizes = dict(
        zip(federation.layout.paths, federation.layout.tree.flatten_up_to(whole), strict=True)
    )
    for number in range(6):
        model = client_model(federation, state, number)
        for layer, group in federation.group.items():
            slots = np.asarray(state.clients.slots[number, group])
            assert model.experts[layer] == tuple(slots[slots < EXPERTS])
            assert len(model.experts[layer]) == CAPACITY[number]
        for path, of in zip(federation.layout.paths, federation.layout.layer, strict=True):
            first = (CAPACITY[number],) if of else sizes[path].shape[:1]
            assert model.params[path].shape == (*first, *sizes[path].shape[1:])


def test_all_experts_together(trained, digits):
    federation, state, found = trained
    if not federation.assembles:
        with pytest.raises(InputError, match=r"^model=assembled: parts that stay .*: .*gate/bias"):
            assembled_model(federation, state)
        return
    model = assembled_model(federation, state)
    assert model.experts == {"mixture": (0, 1, 2, 3)}
    hits, losses = figures(model, digits)
    assert hits.mean() == pytest.approx(found.assembled_accuracy, abs=1e-6)
    assert losses.mean() == pytest.approx(found.assembled_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (7, "client=7: give 0 to 6"),
        (-1, "client=-1: give 0 to 6"),
        (6, "client=6: has not held any expert yet"),
    ],
)
def test_clients_without_a_model_are_refused(trained, number, line):
    federation, state, _ = trained
    with pytest.raises(InputError, match=f"^{line}"):
        client_model(federation, state, number)
