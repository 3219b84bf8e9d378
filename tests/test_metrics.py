from __future__ import annotations

import numpy as np
import pytest

from flexmoe_jax.metrics import coefficient_of_variation


def test_coefficient_of_variation_by_hand():
    # Mean 4, deviations -2, 0, 2: variance 8/3, CV = sqrt(8/3) / 4.
    assert coefficient_of_variation(np.array([2, 4, 6])) == pytest.approx(np.sqrt(8 / 3) / 4)
    assert coefficient_of_variation(np.full(5, 3.0)) == 0.0
    assert coefficient_of_variation(np.zeros(5)) == 0.0
