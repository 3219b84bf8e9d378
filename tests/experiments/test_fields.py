from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.build import build
from experiments.cli import flat_fields
from experiments.configs import base, cifar10, digits, emnist_digits
from experiments.fields import client_capacities, load_model_name
from flexmoe_jax.errors import InputError


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 7), st.integers(0, 5))
def test_a_range_is_dealt_out_evenly(clients, low, extra, seed):
    high = min(low + extra, 8)
    dealt = client_capacities(f"{low}-{high}", clients, 8, seed)
    counts = np.bincount(dealt, minlength=9)[low : high + 1]
    assert counts.sum() == clients
    assert counts.max() - counts.min() <= 1
    assert (dealt == client_capacities(list(range(low, high + 1)), clients, 8, seed)).all()


def test_a_number_serves_all():
    assert client_capacities(3, 4, 8, 0).tolist() == [3, 3, 3, 3]
    assert client_capacities("3", 4, 8, 0).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"clients.capacity": 0}, "clients.capacity=0: choose 1 to model.experts=8"),
        ({"clients.capacity": "9"}, "clients.capacity=9: choose 1 to model.experts=8"),
        ({"clients.capacity": "3-1"}, "clients.capacity=3-1: turn the range around: 1-3"),
        ({"clients.capacity": "few"}, "clients.capacity=few: give a number"),
        ({"clients.capacity": [1, 2.5]}, "clients.capacity=[1, 2.5]: give a number"),
        ({"clients.capacity": True}, "clients.capacity=True: give a number"),
        ({"clients.per_round": 21}, "clients.per_round=21: choose at most clients.count=20"),
        (
            {"clients.newcomers": 5, "clients.per_round": 16},
            "clients.per_round=16: choose at most 15, those of clients.count=20 that are no",
        ),
        (
            {"clients.newcomers": 20},
            "clients.newcomers=20: choose 0 to 19: of 20 clients at least one must train",
        ),
        ({"clients.newcomers": -1}, "clients.newcomers=-1: choose 0 or more"),
        ({"clients.count": 0}, "clients.count=0: choose 1 or more"),
        ({"clients.count": 1500}, "clients.count=1500"),
        ({"partition.name": "dirichlett"}, "partition.name=dirichlett: did you mean dirichlet?"),
        ({"partition.alpha": 0.0}, "partition.alpha=0.0"),
        (
            {"partition.name": "k_class", "partition.classes_per_client": 11},
            "partition.classes_per_client=11",
        ),
        ({"assignment.policy": "flx"}, "assignment.policy=flx: did you mean flex?"),
        ({"assignment.solver": "simplx"}, "assignment.solver=simplx"),
        ({"assignment.slack": -0.1}, "assignment.slack=-0.1"),
        ({"assignment.load": "bytes"}, "assignment.load=bytes"),
        ({"model.backbone": "resnett"}, "model.backbone=resnett: did you mean resnet?"),
        ({"model.widths": ("a",)}, "model.widths=('a',)"),
        ({"model.top_k": 9}, "model.top_k=9"),
        ({"local.batch_size": 0}, "local.batch_size=0: choose 1 or more"),
        ({"local.epochs": 0}, "local.epochs=0: choose 1 or more"),
        ({"local.learning_rate": float("nan")}, "local.learning_rate=nan"),
        ({"local.optimizer": "adma"}, "local.optimizer=adma: did you mean adam?"),
        ({"fitness.beta": 0.0}, "fitness.beta=0.0"),
        ({"fitness.initial": float("inf")}, "fitness.initial=inf"),
        ({"fitness.initial": 1e300}, "fitness.initial=1e+300: choose a number of at most 1e+30"),
        ({"fitness.optimism": -1e31}, "fitness.optimism=-1e+31: choose a number of at most 1e+30"),
        ({"fitness.alpha": float("inf")}, "fitness.alpha=inf"),
        ({"assignment.exploration": 1e200}, "assignment.exploration=1e+200: choose a number in"),
        (
            {"assignment.backend": "SCS", "assignment.diversity": 1.0},
            "assignment.backend=SCS: too inexact",
        ),
        ({"fitness.score": "f1"}, "fitness.score=f1"),
        ({"data.train_limit": -1}, "data.train_limit=-1"),
        ({"data.name": "dgits", "data.dir": "."}, "data.name=dgits"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_cannot_work_is_refused(fields, line):
    config = digits.get_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError) as refusal:
        build(config)
    assert str(refusal.value).startswith(line)
    assert "\n" not in str(refusal.value)


def test_bounds_that_no_slack_can_meet_are_not_an_error():
    config = digits.get_config()
    config.model.backbone = "mlp"
    config.assignment.slack = 0.0
    config.assignment.load = "samples"  # no choice of holders gives every expert the same samples
    simulation = build(config).simulation
    (solution,) = simulation.assign(simulation.init(jax.random.key(0)), np.arange(20))
    assert solution.status in ("relaxed", "violated")
    assert solution.violation.max() > 0
    assert (solution.assignment.sum(axis=1) >= 1).all()


def test_a_misspelt_field_of_a_config_file_is_refused():
    config = digits.get_config()
    config.local.learning_rat = 0.5
    with pytest.raises(
        InputError, match=r"local\.learning_rat=0\.5: .* mean local\.learning_rate\?"
    ):
        build(config)


@pytest.mark.parametrize("module", [digits, emnist_digits, cifar10])
def test_shipped_configs_only_set_fields_that_exist(module):
    assert flat_fields(module.get_config()).keys() == flat_fields(base.get_config()).keys()


@pytest.mark.parametrize("given", ["1-", "-3", "-", "1-2-3", "a-b", "²-3", "1-" + "9" * 5000])
def test_half_a_range_is_refused(given):
    with pytest.raises(InputError, match=r"clients\.capacity"):
        client_capacities(given, 4, 8, 0)


@pytest.mark.parametrize(
    ("load", "capacity", "name"),
    [
        ("auto", 2, "clients"),
        ("auto", "3-3", "clients"),
        ("auto", [2, 2], "clients"),
        ("auto", "1-4", "usage"),
        ("auto", "1-999999999", "usage"),
        ("auto", [1, 2], "usage"),
        ("auto", "memory", "usage"),
        ("clients", "1-4", "clients"),
        ("samples", 2, "samples"),
    ],
)
def test_load_is_use_where_capacities_differ(load, capacity, name):
    assert load_model_name(load, capacity) == name
