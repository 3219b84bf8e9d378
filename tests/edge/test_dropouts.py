from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.edge import draw_dropouts
from flexmoe_jax.errors import InputError


@given(st.data(), st.sampled_from(["before", "during"]), st.integers(0, 2**32))
def test_a_clients_draw_does_not_depend_on_the_others(
    data: st.DataObject, stage: str, seed: int
) -> None:
    everybody = np.arange(30)
    cohort = np.array(data.draw(st.lists(st.sampled_from(range(30)), unique=True)), np.int64)
    draw = {"stage": stage, "seed": seed, "round_index": 5}
    expected = draw_dropouts(0.5, everybody, **draw)
    assert np.array_equal(draw_dropouts(0.5, cohort, **draw), expected[cohort])
    # Whoever drops out at one probability does so at every higher one.
    assert (draw_dropouts(0.2, everybody, **draw) <= expected).all()


def test_probabilities_are_met() -> None:
    probability = np.repeat([0.0, 0.3, 1.0], 10_000)
    cohort = np.arange(30_000)
    dropped = draw_dropouts(probability, cohort, stage="during", seed=0, round_index=0)
    rate = dropped.reshape(3, -1).mean(axis=1)
    assert rate[0] == 0.0
    assert rate[1] == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 10_000))
    assert rate[2] == 1.0


def test_stages_rounds_and_seeds_draw_apart() -> None:
    cohort = np.arange(64)
    draws = {
        draw_dropouts(0.5, cohort, stage=stage, seed=seed, round_index=round_index).tobytes()
        for stage in ("before", "during")
        for seed in (0, 1)
        for round_index in (0, 1)
    }
    assert len(draws) == 8


def test_a_probability_above_1_is_refused() -> None:
    with pytest.raises(InputError, match=r"edge.dropout_before=1.5: give a probability"):
        draw_dropouts(1.5, np.arange(3), stage="before", seed=0, round_index=0)
