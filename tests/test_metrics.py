from __future__ import annotations

import numpy as np
import pytest

from flexmoe_jax.metrics import accuracies, coefficient_of_variation
from flexmoe_jax.types import Evaluation


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
        hits=np.array([[1, 1], [4, 3], [4, 6]]),
        examples=np.array([4, 6]),
        personal_hits=np.array([1.0, 0.0, 5.0]),
        personal_weight=np.array([2.0, 0.0, 5.0]),
        server_hits=np.array(8),
        evaluated=np.array([True, True, False]),
    )
    return sums._replace(**changes)


def test_figures_are_means_over_those_for_whom_they_exist():
    assert accuracies(evaluation()) == pytest.approx(
        {
            "eval/clients": 2,
            "eval/personal_clients": 1,
            "eval/global_accuracy": (2 / 10 + 7 / 10) / 2,
            "eval/personal_accuracy": 1 / 2,
            "eval/server_accuracy": 8 / 10,
        }
    )


def test_figures_of_nobody_are_left_out():
    nobody = accuracies(evaluation(evaluated=np.zeros(3, bool)))
    assert nobody == {"eval/clients": 0, "eval/personal_clients": 0}
    unmeasured = accuracies(evaluation(personal_weight=np.zeros(3)))
    assert unmeasured["eval/personal_clients"] == 0
    assert "eval/personal_accuracy" not in unmeasured


def test_figures_that_do_not_exist_are_nan():
    found = evaluation(examples=np.array([4, 0]), hits=np.array([[1, 0], [4, 0], [4, 0]]))
    assert np.allclose(found.class_accuracy[:, 0], [1 / 4, 1, 1])
    assert np.isnan(found.class_accuracy[:, 1]).all()
    assert np.isnan(found.personal_accuracy[1])
    assert np.isnan(found._replace(evaluated=np.zeros(3, bool)).server_accuracy)
