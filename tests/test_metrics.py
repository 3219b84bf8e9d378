from __future__ import annotations

import numpy as np
import pytest

from flexmoe_jax.metrics import accuracies, coefficient_of_variation
from flexmoe_jax.types import Evaluation


def test_coefficient_of_variation_by_hand():
    # Mean 4, deviations -2, 0, 2: variance 8/3, CV = sqrt(8/3) / 4.
    assert coefficient_of_variation(np.array([2, 4, 6])) == pytest.approx(np.sqrt(8 / 3) / 4)
    assert coefficient_of_variation(np.full(5, 3.0)) == 0.0
    assert coefficient_of_variation(np.zeros(5)) == 0.0


def test_accuracies_are_means_over_those_who_have_held_an_expert():
    figures = np.array([0.2, 0.4, 0.9])
    evaluation = Evaluation(np.ones((3, 2)), figures, figures + 0.1, np.array(0.7), figures < 0.5)
    found = accuracies(evaluation)
    assert found == pytest.approx(
        {
            "eval/global_accuracy": 0.3,
            "eval/personal_accuracy": 0.4,
            "eval/server_accuracy": 0.7,
            "eval/clients": 2,
        }
    )
    assert accuracies(evaluation._replace(evaluated=np.zeros(3, bool))) == {"eval/clients": 0}
