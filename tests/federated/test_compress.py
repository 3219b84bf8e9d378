from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flexmoe_jax.federated import COMPRESSIONS, make_compressor
from flexmoe_jax.federated.compress import compress_update, init_residual, move_residual
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Plan

UPDATE = {"w": jnp.array([[0.5, -4.0, 0.25], [0.0, 1.0, -0.125]]), "b": jnp.array([2.0])}


def test_bytes_by_hand():
    # Seven numbers in two arrays: float32, two bytes each, one byte each and a float32 an array,
    # and a float32 with an int32 place for half of 6 and half of 1 (of every array at least one).
    expected = {"none": 28, "bfloat16": 14, "int8": 7 + 2 * 4, "top_k": (3 + 1) * 8}
    assert {name: make_compressor(name, 0.5).bytes(UPDATE) for name in COMPRESSIONS} == expected


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_bytes_are_those_of_the_arrays_that_travel(name):
    compressor = make_compressor(name, 0.3)
    sent = jax.tree.map(compressor.encode, UPDATE)
    assert compressor.bytes(UPDATE) == sum(
        np.asarray(leaf).nbytes for leaf in jax.tree.leaves(sent)
    )


def test_top_k_by_hand():
    arrived = make_compressor("top_k", 0.5).round_trip(UPDATE)
    assert arrived["w"].tolist() == [[0.5, -4.0, 0.0], [0.0, 1.0, 0.0]]
    assert arrived["b"].tolist() == [2.0]


def test_int8_by_hand():
    # Steps of 4/127: 0.5 is 15.875 of them, 0.25 is 7.9375, 1 is 31.75, 0.125 is 3.97.
    arrived = make_compressor("int8").round_trip(UPDATE)["w"]
    steps = np.array([[16, -127, 8], [0, 32, -4]])
    assert np.allclose(arrived, steps * 4 / 127, atol=1e-6)


# One shape: every other would be compiled anew.
floats = hnp.arrays(np.float32, (3, 5), elements=st.floats(-8, 8, width=32))


@given(floats)
def test_errors_stay_within_what_each_promises(x):
    x = jnp.asarray(x)
    top = np.abs(x).max()
    error = {name: np.abs(make_compressor(name, 0.5).round_trip(x) - x) for name in COMPRESSIONS}
    assert error["none"].max() == 0
    assert (error["bfloat16"] <= np.abs(x) * 2.0**-8 + 1e-37).all()
    assert error["int8"].max() <= top / 254 * 1.0001
    # What top-k drops is no greater than anything it keeps.
    assert error["top_k"].max() <= np.median(np.abs(x)) + 1e-6


def test_what_is_kept_back_arrives_in_the_end():
    compressor = make_compressor("top_k", 0.4)
    experts = {"w": jnp.arange(8.0).reshape(2, 4)}
    residual = jax.tree.map(jnp.zeros_like, (UPDATE, experts))
    arrived = jax.tree.map(jnp.zeros_like, (UPDATE, experts))
    for _ in range(12):
        *sent, residual = compress_update(compressor, UPDATE, experts, residual)
        arrived = jax.tree.map(jnp.add, arrived, tuple(sent))
    for total, kept, each in zip(
        *map(jax.tree.leaves, (arrived, residual, (UPDATE, experts))), strict=True
    ):
        assert np.allclose(total + kept, 12 * each, atol=1e-4)
        assert np.abs(total - 12 * each).max() <= 5 * np.abs(each).max()


def test_without_error_feedback_it_is_lost():
    assert compress_update(make_compressor("int8"), UPDATE, {"w": jnp.ones((1, 2))}, ())[2] == ()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("zip",), "upload.compression=zip: choose one of none, bfloat16, int8, top_k"),
        (("top_k", 0.0), "upload.kept=0.0: choose a number in"),
    ],
)
def test_bad_input_is_refused(arguments, line):
    with pytest.raises(InputError, match=line):
        make_compressor(*arguments)


def test_what_is_kept_back_of_an_expert_goes_with_it():
    # Three clients, two slots, four experts; client 2 takes no part, client 3 is padding.
    before = jnp.array([[0, 2], [1, 3], [0, 1]])
    kept = jnp.array([[10.0, 12.0], [21.0, 23.0], [30.0, 31.0]])
    plan = Plan(
        clients=jnp.array([1, 0, 3]),
        slots=jnp.array([[0, 1], [2, 4], [4, 4]]),
        load=jnp.zeros(4),
        steps=jnp.ones(3),
        tamper=jnp.ones(3),
    )
    shared = {"w": jnp.array([1.0, 2.0, 3.0])}
    found = move_residual((shared, {"w": kept}), before, plan)
    # Client 0 keeps what it has of expert 2, now in its first slot; client 1 that of expert 1.
    assert found[1]["w"].tolist() == [[12.0, 0.0], [0.0, 21.0], [30.0, 31.0]]
    assert found[0] is shared
    assert move_residual((), before, plan) == ()
    zeros = init_residual(UPDATE, {"w": jnp.ones((4, 5))}, clients=3, slots=2)
    assert (zeros[0]["w"].shape, zeros[1]["w"].shape) == ((3, 2, 3), (3, 2, 5))
