from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot

from flexmoe_jax import plot
from flexmoe_jax.errors import InputError

mpl.use("agg")


@pytest.fixture(autouse=True)
def fresh():
    yield
    pyplot.close("all")


def test_clients_of_a_kind_stand_together():
    assignment = np.array([[1, 0], [0, 1], [1, 0]], bool)
    axes = plot.holders(assignment, groups=["b", "a", "b"])
    (image,) = axes.images
    assert image.get_array().tolist() == [[0, 1, 1], [1, 0, 0]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b"]
    assert axes.get_xticks().tolist() == [0, 1.5]


def test_loads_stand_beside_their_bounds():
    axes = plot.loads([3, 5, 4], load_min=3, load_max=[4, 5, 5])
    assert [patch.get_height() for patch in axes.patches] == [3, 5, 4]
    assert len(axes.collections) == 2


@pytest.mark.parametrize(
    ("draw", "line"),
    [
        (lambda: plot.holders([1, 0]), "assignment=shape (2,): give an array (C, E)"),
        (lambda: plot.holders([[1, 0]], groups=["a", "b"]), "groups=2 names: give one for each"),
        (lambda: plot.loads([[1.0]]), "load=shape (1, 1): give an array (E,)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, line):
    with pytest.raises(InputError) as refused:
        draw()
    assert line in str(refused.value)
