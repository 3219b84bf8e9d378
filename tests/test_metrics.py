from __future__ import annotations

import numpy as np
import pytest

from flexmoe_jax.metrics import coefficient_of_variation, evaluation_figures
from flexmoe_jax.types import Evaluation, Tally


def test_coefficient_of_variation_by_hand():
    # Mean 4, deviations -2, 0, 2: variance 8/3, CV = sqrt(8/3) / 4.
    assert coefficient_of_variation(np.array([2, 4, 6])) == pytest.approx(np.sqrt(8 / 3) / 4)
    assert coefficient_of_variation(np.full(5, 3.0)) == 0.0
    # Nothing is not evenly spread; it is not spread at all.
    assert np.isnan(coefficient_of_variation(np.zeros(5)))
    assert np.isnan(coefficient_of_variation(np.zeros(0)))


def evaluation(**changes) -> Evaluation:
    """Three clients, the last of which has never held an expert; 4 and 6 examples of two classes.

    The first client has two examples of its own and gets one right; the second has none.
    """
    sums = Evaluation(
        common=Tally(np.array([[1, 1], [4, 3], [4, 6]]), np.array([[8, 4], [2, 3], [0, 0]])),
        units=np.array([4, 6]),
        personal=Tally(np.array([1.0, 0.0, 5.0]), np.array([3.0, 0.0, 9.0])),
        personal_weight=np.array([2.0, 0.0, 5.0]),
        server=Tally(np.array(8), np.array(5.0)),
        assembled=None,
        evaluated=np.array([True, True, False]),
    )
    return sums._replace(**changes)


def test_figures_are_means_over_those_for_whom_they_exist():
    expected = {
        "eval/clients": 2,
        "eval/personal_clients": 1,
        "eval/global_accuracy": (2 / 10 + 7 / 10) / 2,
        "eval/global_loss": (12 / 10 + 5 / 10) / 2,
        "eval/personal_accuracy": 1 / 2,
        "eval/personal_accuracy_p10": 1 / 2,
        "eval/personal_loss": 3 / 2,
        "eval/server_accuracy": 8 / 10,
        "eval/server_loss": 5 / 10,
    }
    assert evaluation_figures(evaluation()) == pytest.approx(expected)
    one_model = {"eval/assembled_accuracy": 6 / 10, "eval/assembled_loss": 7 / 10}
    together = evaluation(assembled=Tally(np.array(6), np.array(7.0)))
    assert evaluation_figures(together) == pytest.approx(expected | one_model)


def test_the_tenth_percentile_is_of_clients():
    # Accuracies 0, 1, ..., 10 elevenths: the tenth percentile is the second lowest.
    own = Tally(np.arange(11.0), np.zeros(11))
    many = evaluation(
        common=Tally(np.zeros((11, 2)), np.zeros((11, 2))),
        personal=own,
        personal_weight=np.full(11, 11.0),
        evaluated=np.ones(11, bool),
    )
    assert evaluation_figures(many)["eval/personal_accuracy_p10"] == pytest.approx(1 / 11)


def test_figures_of_nobody_are_left_out():
    nobody = evaluation_figures(evaluation(evaluated=np.zeros(3, bool)))
    assert nobody == {"eval/clients": 0, "eval/personal_clients": 0}
    unmeasured = evaluation_figures(evaluation(personal_weight=np.zeros(3)))
    assert unmeasured["eval/personal_clients"] == 0
    assert not {key for key in unmeasured if key.startswith("eval/personal_")} - {
        "eval/personal_clients"
    }


def test_a_task_in_which_nothing_is_right_has_losses_alone():
    tallies = {name: getattr(evaluation(), name) for name in ("common", "personal", "server")}
    without = {name: tally._replace(hits=None) for name, tally in tallies.items()}
    found = evaluation_figures(evaluation(**without, assembled=Tally(None, np.array(7.0))))
    assert found.keys() == {
        "eval/clients",
        "eval/personal_clients",
        *(f"eval/{name}_loss" for name in ("global", "personal", "server", "assembled")),
    }


def test_figures_that_do_not_exist_are_nan():
    common = Tally(np.array([[1, 0], [4, 0], [4, 0]]), np.zeros((3, 2)))
    found = evaluation(units=np.array([4, 0]), common=common)
    # The last client has never held an expert.
    assert np.allclose(found.class_accuracy[:, 0], [1 / 4, 1, np.nan], equal_nan=True)
    assert np.isnan([found.global_accuracy[2], found.global_loss[2], found.personal_loss[2]]).all()
    assert np.isnan(found.class_accuracy[:, 1]).all()
    assert np.isnan(found.personal_accuracy[1])
    assert np.isnan(found.personal_loss[1])
    assert np.isnan([found.assembled_accuracy, found.assembled_loss]).all()
    nobody = found._replace(evaluated=np.zeros(3, bool))
    assert np.isnan([nobody.server_accuracy, nobody.server_loss]).all()
