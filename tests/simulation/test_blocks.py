from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax.errors import InputError
from flexmoe_jax.simulation import (
    client_mesh,
    over_blocks,
    over_devices,
    replicate,
    resolve_block_size,
)
from flexmoe_jax.simulation.blocks import put_rows, take_rows, together

ROWS = {"x": np.arange(8.0), "w": np.arange(16.0).reshape(8, 2)}


def visit(row):
    return row["x"] * row["w"], row["x"] + 1


def add(total, sent):
    return total + sent.sum(axis=0)


@pytest.mark.parametrize("block_size", [1, 2, 8])
@pytest.mark.parametrize("devices", [1, 4])
def test_sums_and_rows_are_those_of_a_plain_loop(devices, block_size):
    size, mesh = min(block_size, 8 // devices), client_mesh(devices)

    @jax.jit
    def run(rows, whole):
        def on_one(share, start):
            return over_blocks(visit, add, start, share, size)

        return over_devices(on_one, rows, whole, mesh)

    total, kept = run(*replicate((ROWS, np.zeros(2)), mesh))
    assert total.tolist() == (ROWS["x"][:, None] * ROWS["w"]).sum(axis=0).tolist()
    assert kept.tolist() == (ROWS["x"] + 1).tolist()


def test_rows_out_of_range_are_padding():
    table = {"a": jnp.arange(6.0).reshape(3, 2)}
    rows = jnp.array([2, 3])
    assert take_rows(table, rows)["a"][0].tolist() == [4, 5]
    put = put_rows(table, rows, {"a": jnp.full((2, 2), 9.0)})
    assert put["a"].tolist() == [[0, 1], [2, 3], [9, 9]]


def test_block_sizes():
    # On a CPU, where these tests run, automatic is one client at a time.
    assert resolve_block_size(0, 7) == 1
    assert resolve_block_size(5, 7) == 5
    # No larger than a device's share of the cohort.
    assert resolve_block_size(5, 7, devices=2) == 4


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match=r"execution.devices=9: give 0 \(all\) to 8"):
        client_mesh(9)


def test_arrays_of_a_type_move_together_and_come_back_as_they_were():
    rng = np.random.default_rng(0)
    tree = {
        "flags": jnp.array([True, False, True]),
        "matrix": jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32),
        "nothing": jnp.zeros((3, 0), jnp.float32),
        "numbers": jnp.arange(3, dtype=jnp.int32),
        "vector": jnp.asarray(rng.normal(size=3), jnp.float32),
    }
    moved = []

    def move(array):
        moved.append((array.dtype.name, array.shape))
        return array

    jax.tree.map(np.testing.assert_array_equal, together(move, tree), tree)
    assert sorted(moved) == [("bool", (3, 1)), ("float32", (3, 9)), ("int32", (3, 1))]
