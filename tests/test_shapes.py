"""Shapes in annotations are checked where tests run, and nowhere else."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from flexmoe_jax import models, server
from flexmoe_jax.client import training

CALLS = {
    "a mask of other experts": lambda: models.route(jnp.zeros((2, 3)), jnp.ones(4, bool)),
    "weights of another kind": lambda: models.route(jnp.zeros((2, 3)), jnp.ones(3)),
    "pixels in a row": lambda: models.max_pool(jnp.zeros((2, 16, 3))),
    "rows of two clients": lambda: training.take_batch({}, jnp.zeros((2, 8), jnp.int32)),
    "lengths of one part": lambda: server.too_late(jnp.zeros((4, 8)), jnp.zeros((1, 3)), 2.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_shape_is_caught(name):
    with pytest.raises(TypeCheckError, match="Type-check error whilst checking the parameters"):
        CALLS[name]()


def test_users_do_not_pay_for_it():
    code = (
        "import sys, flexmoe_jax.models as models\n"
        "print('beartype' in sys.modules, hasattr(models.route, '__wrapped__'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
