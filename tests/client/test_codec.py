from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexmoe_jax.client import (
    COMPRESSIONS,
    Codec,
    Compressor,
    decode,
    encode,
    init_residual,
    make_compressor,
)
from flexmoe_jax.errors import InputError

UPDATE = {
    "w": jnp.array([[0.5, -4.0, 0.25], [0.0, 1.0, -0.125]], jnp.float32),
    "b": jnp.array([2.0], jnp.float32),
}


def round_trip(compressor: Compressor, tree):
    return jax.tree.map(lambda x: compressor.decode(compressor.encode(x), x), tree)


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
    arrived = round_trip(make_compressor("top_k", 0.5), UPDATE)
    assert arrived["w"].tolist() == [[0.5, -4.0, 0.0], [0.0, 1.0, 0.0]]
    assert arrived["b"].tolist() == [2.0]


def test_int8_by_hand():
    # Steps of 4/127: 0.5 is 15.875 of them, 0.25 is 7.9375, 1 is 31.75, 0.125 is 3.97.
    arrived = round_trip(make_compressor("int8"), UPDATE)["w"]
    steps = np.array([[16, -127, 8], [0, 32, -4]])
    assert np.allclose(arrived, steps * 4 / 127, atol=1e-6)


# One shape: every other would be compiled anew.
floats = hnp.arrays(np.float32, (3, 5), elements=st.floats(-8, 8, width=32))


@given(floats)
def test_errors_stay_within_what_each_promises(x):
    x = jnp.asarray(x)
    top = np.abs(x).max()
    error = {name: np.abs(round_trip(make_compressor(name, 0.5), x) - x) for name in COMPRESSIONS}
    assert error["none"].max() == 0
    assert (error["bfloat16"] <= np.abs(x) * 2.0**-8 + 1e-37).all()
    assert error["int8"].max() <= top / 254 * 1.0001
    # No entry that top-k drops is greater than one that it keeps.
    assert error["top_k"].max() <= np.median(np.abs(x)) + 1e-6


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_every_expert_is_compressed_by_itself(name):
    codec = Codec(make_compressor(name, 0.5))
    weights = jnp.array([[0.5, -4.0, 0.25, 0.125], [100.0, 1.0, 2.0, -3.0]], jnp.float32)
    experts = {"a": {"w": weights}}
    sent = encode(codec, UPDATE, experts)
    shared, arrived = decode(codec, sent, (UPDATE, experts))
    alone = [round_trip(codec.compressor, weights[k]) for k in range(2)]
    assert np.array_equal(arrived["a"]["w"], alone)
    whole = round_trip(codec.compressor, UPDATE)
    assert all(np.array_equal(shared[name], whole[name]) for name in UPDATE)


def test_what_is_sent_can_be_read_without_what_was_meant():
    # Shapes and types of the update are all that the reader needs.
    codec = Codec(make_compressor("top_k", 0.5))
    experts = {"a": {"w": jnp.arange(8.0).reshape(2, 4)}}
    zeros = jax.tree.map(jnp.zeros_like, (UPDATE, experts))
    sent = encode(codec, UPDATE, experts)
    one, other = (decode(codec, sent, like) for like in ((UPDATE, experts), zeros))
    for left, right in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert np.array_equal(left, right)


def test_only_what_loses_something_keeps_it_back():
    for name, feedback, keeps in (
        ("none", True, False),
        ("int8", True, True),
        ("int8", False, False),
    ):
        codec = Codec(make_compressor(name), feedback)
        assert codec.keeps == keeps
        kept = init_residual(codec, UPDATE, {"a": {"w": jnp.ones((4, 5))}}, slots=2)
        assert bool(kept) == keeps
    assert jax.tree.map(jnp.shape, kept) == ()
    shared, experts = init_residual(
        Codec(make_compressor("int8")), UPDATE, {"a": {"w": jnp.ones((4, 5))}}, slots=2
    )
    assert (shared["w"].shape, experts["a"]["w"].shape) == ((2, 3), (2, 5))
    assert not any(leaf.any() for leaf in jax.tree.leaves((shared, experts)))


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
