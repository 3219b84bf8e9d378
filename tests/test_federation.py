from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax import data, models, simulation, tasks
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.server import Admission, FitnessOptions, mean, trimmed_mean

LOCAL = LocalTraining(optax.sgd(0.1), balance=0.0)


def federate(clients: data.ClientData, classes: int = 10, **choices) -> Federation:
    module = models.MoEClassifier(models.MLP((4,)), classes=classes, experts=4, hidden=3)
    model = models.classifier(module).after(lambda images: images / 255)
    sample = {name: values[:2] for name, values in clients.arrays.items()}
    settings = {"capacity": np.full(7, 2), "policy": make_policy("random"), "local": LOCAL}
    return Federation(model, sample, **(settings | choices))


@pytest.mark.parametrize(
    ("choices", "line"),
    [
        ({"capacity": [1.5] * 7}, r"capacity=\[1.5, .*: give whole numbers, one a client"),
        ({"capacity": 3}, "capacity=3: give whole numbers, one a client"),
        ({"capacity": np.zeros(0, int)}, r"capacity=\[\]: give whole numbers"),
        ({"capacity": np.full(7, 5)}, "capacity=5: give 0 to 4, the number of experts"),
        ({"capacity": np.array([-1, 2])}, "capacity=-1: give 0 to 4"),
        ({"layers": "both"}, "assignment.layers=both: choose one of same, each"),
        (
            {"ownership": models.Ownership(("expert",))},
            "model.private=expert: is of a MoE layer, .* set clients.capacity=4",
        ),
        ({"ownership": models.Ownership(("hed",))}, "model.private=hed: .* backbone, expert, gate"),
    ],
)
def test_choices_that_do_not_fit_together_are_refused(clients, choices, line):
    with pytest.raises(InputError, match=f"^{line}"):
        federate(clients, **choices)


@pytest.mark.parametrize(
    ("choices", "line"),
    [
        ({"capacity": np.array([1, 2])}, r"capacity=\[1, 2\]: give one for each of the 7 clients"),
        ({"classes": 3}, "labels=9: the model tells classes 0 to 2 apart"),
        ({"classes": 12}, "label_share=10 classes: not the model's"),
        (
            {"task": tasks.regression(), "fitness": FitnessOptions("loss")},
            "labels=int32 of shape .*: regression takes finite",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused(clients, choices, line):
    federation = federate(clients, **choices)
    with pytest.raises(InputError, match=f"^{line}"):
        simulation.simulate(federation, clients)


def test_without_a_prior_the_model_may_tell_more_classes_apart(clients):
    simulation.simulate(federate(clients, classes=12, prior=False), clients)
    # Nor need clients say which classes they have.
    parts = [np.arange(7 * c, 7 * c + 7) for c in range(7)]
    nameless = data.join({n: np.asarray(x) for n, x in clients.arrays.items()}, parts)
    simulation.simulate(federate(clients, prior=False), nameless)
    with pytest.raises(InputError, match=r"label_share=0 classes: .* or take no prior"):
        simulation.simulate(federate(clients), nameless)


def test_a_model_that_names_other_layers_than_its_parameters_is_refused(clients):
    module = models.MoEClassifier(models.MLP((4,)), classes=10, experts=4)
    model = models.classifier(module).after(lambda images: images / 255)

    def other_names(params, features, held):
        outputs, routings = model.head(params, features, held)
        return outputs, {"blend": routings["mixture"]}

    with pytest.raises(InputError, match=r"model=routings of blend: .* marked for mixtu"):
        federate(clients).replace(model=model._replace(head=other_names))


def functions(clients: data.ClientData, experts=(4, 3, 10), rules=None, run=None, **others):
    """A model of plain functions, linear in images and experts, with its gate."""

    def init(key, images):
        return {"w": jnp.zeros(experts), "gate": jnp.zeros((4, 64)), **others}

    def apply(params, images, held):
        x = images.reshape(-1, 64) / 255
        routing = models.route(x @ params["gate"].T, held["mixture"])
        mixed = jnp.einsum("be,efy,bf->by", routing.combine, params["w"], x[:, :3])
        return mixed, {"mixture": routing}

    rules = rules or {"w": models.EXPERT, "gate": models.GATE}
    return federate(clients).replace(model=models.from_functions(init, run or apply, rules))


def test_foreign_models_that_cannot_be_dealt_out_are_refused(clients):
    assert functions(clients).layout.experts == 4
    with pytest.raises(InputError, match=r"^rules=moe/\*: matches none of gate, w"):
        functions(clients, rules={"moe/*": models.EXPERT})
    # Experts are the first axis of all that is theirs.
    with pytest.raises(InputError, match=r"^model\.experts=.*w has 3: .*lead with them"):
        functions(clients, experts=(3, 4, 10))
    with pytest.raises(InputError, match=r"^model=seed of int32: .*floating-point"):
        functions(clients, seed=jnp.zeros((), jnp.int32))

    # A client holds two of the four.
    def with_all_four(params, images, held):
        x = images.reshape(-1, 64) / 255
        logits = x @ params["gate"].T + jnp.arange(4.0)
        routing = models.route(logits, held["mixture"])
        return routing.combine @ params["w"][:, 0], {"mixture": routing}

    with pytest.raises(InputError, match=r"^model=ValueError: .*stacks of 2 of its 4 experts"):
        functions(clients, run=with_all_four)


def test_a_variant_is_the_same_but_for_what_is_replaced(clients):
    plain = federate(clients)
    assert (plain.clients, plain.slots, plain.groups) == (7, 2, 1)
    assert plain.layout.layers == ("mixture",)
    other = plain.replace(capacity=np.array([3, 0, 1, 1, 1, 1, 1]), layers="each")
    assert (other.slots, other.groups, other.group) == (3, 1, {"mixture": 0})
    assert other.model is plain.model
    # Where nobody has room for an expert there is one empty slot.
    assert plain.replace(capacity=np.zeros(7, int)).slots == 1


def test_noise_and_robust_means_are_aggregators(clients):
    assert federate(clients).aggregation.mean is not mean
    noised = federate(clients, admission=Admission(clip=2.0, noise_multiplier=0.5))
    assert noised.site.send_all
    assert not federate(clients).site.send_all
    chosen = trimmed_mean(0.1)
    assert federate(clients, aggregator=chosen).aggregation is chosen


def test_the_trunk_is_shared_unless_a_part_of_it_is_private(clients):
    layout = federate(clients)
    assert layout.shares_trunk
    assert not layout.assembles
    assert not federate(clients, ownership=models.Ownership(("backbone",))).shares_trunk
    assert federate(clients, ownership=models.Ownership(("head",))).shares_trunk
    assert federate(clients, ownership=models.Ownership(shared_gate=True)).assembles
    both = models.Ownership(("head",), shared_gate=True)
    assert not federate(clients, ownership=both).assembles


def test_outputs_may_be_any_tree(clients):
    """A task of two answers is checked as one of a single array is."""
    seen = []
    plain = tasks.classification()
    task = plain._replace(
        loss=lambda outputs, batch: plain.loss(outputs["class"], batch),
        hits=lambda outputs, batch: plain.hits(outputs["class"], batch),
        adjust=None,
        check=lambda arrays, shapes: seen.append(shapes),
    )

    model = functions(clients).model

    def answer_twice(params, features, held):
        logits, routing = model.head(params, features, held)
        return {"class": logits, "sum": logits.sum(axis=1, keepdims=True)}, routing

    federation = federate(clients).replace(model=model._replace(head=answer_twice), task=task)
    federation.check({name: np.asarray(values) for name, values in clients.arrays.items()})
    assert seen == [{"class": (10,), "sum": (1,)}]


def test_what_is_given_beforehand_tells_nothing_of_single_updates(clients):
    private = Admission(clip=2.0, noise_multiplier=0.5)
    with pytest.raises(InputError, match=r"^fitness\.affinity=1\.0: .*not private: give 0"):
        federate(clients, admission=private, fitness=FitnessOptions(affinity=1.0))
    federate(clients, admission=private, fitness=FitnessOptions(affinity=1.0, profile="given"))
