"""Runs many clients in one program: devices share the clients and process them block by block.

Nothing here is specific to federated learning: a function of one client is mapped over rows, and
the outputs of the rows are accumulated on the way. The number of devices and the number of clients
side by side affect only speed. On a CPU, one client at a time keeps its activations in cache. On
an accelerator, the mapped client axis fills the chip.

Axis legend: `P` rows, one per client, `p` rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Array, PyTree

CLIENTS, EXPERTS = "clients", "experts"
AXES = CLIENTS, EXPERTS
"""The axes of a mesh: all devices share a cohort; those along `EXPERTS` share the experts, too."""
WHOLE, ALONG_FIRST = PartitionSpec(), PartitionSpec(AXES)
"""A full copy on each device; or the first axis split over all devices."""
BY_EXPERT = PartitionSpec(EXPERTS)
"""The first axis, E, split over the devices along `EXPERTS`."""


def client_mesh(devices: int = 0, experts: int = 1) -> Mesh:
    """Makes a mesh of devices over all processes.

    Args:
      devices: number of devices; 0 for all.
      experts: number of devices that share one copy of the experts; 1 for a copy on each device.

    Raises:
      InputError: `devices` is negative or more than the available devices, or `experts` does not
        divide it.
    """
    there = jax.device_count()
    if not 0 <= devices <= there:
        raise InputError("execution.devices", devices, f"give 0 (all) to {there}")
    chosen = jax.devices()[: devices or there]
    if experts < 1 or len(chosen) % experts:
        remedy = f"give a divisor of the number of devices, {len(chosen)}"
        raise InputError("execution.expert_devices", experts, remedy)
    shape = len(chosen) // experts, experts
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 2, devices=chosen)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a full copy of every array on each device of the mesh.

    If there are several processes, each passes its own copy, and all copies must be equal. This is
    not checked: a check would send all copies between processes, and it would refuse NaN, which is
    not equal to itself.
    """
    everywhere = NamedSharding(mesh, WHOLE)
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    def put(leaf: np.ndarray) -> Array:
        return jax.make_array_from_callback(leaf.shape, everywhere, lambda part: leaf[part])

    return jax.tree.map(lambda leaf: put(np.asarray(leaf)), jax.device_get(tree))


def resolve_block_size(block_size: int, cohort: int, devices: int = 1) -> int:
    """Replaces 0 (automatic) by a number, and limits it to a device's share of the cohort.

    Automatic means 1 on CPU. Elsewhere it means the device's whole share, up to 64 clients.
    """
    automatic = 1 if jax.default_backend() == "cpu" else 64
    return min(block_size or automatic, -(-cohort // devices))


def over_devices(
    function: Callable[[PyTree, PyTree], tuple[Any, PyTree]],
    split: PyTree,
    whole: PyTree,
    mesh: Mesh,
    *,
    merge: Callable[[Any, tuple[str, ...]], Any] = lax.psum,
    spec: PartitionSpec = ALONG_FIRST,
    of_whole: PyTree = WHOLE,
    of_total: PyTree = WHOLE,
) -> tuple[Any, PyTree]:
    """Runs a function of (a share of `split`, all of `whole`) on every device of a mesh.

    Args:
      function: its first output is merged over the devices. Its second output is concatenated
        along the first axis.
      split: arrays that are divided among the devices, along the axis that `spec` maps to `AXES`.
      whole: arrays that each device receives in full, except where `of_whole` splits them.
      mesh: from `client_mesh`. With a single device the plain function runs, so that JAX can also
        run it without compiling it.
      merge: (a device's first output, names of the axes) -> the merged output of all devices.
      spec: the partition of `split`.
      of_whole: the partitions of `whole`, a tree of specs or one for all.
      of_total: the partitions of the merged output.
    """
    if mesh.size == 1:
        return function(split, whole)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec, of_whole),
        out_specs=(of_total, ALONG_FIRST),
        check_vma=False,
    )
    def on_one(split: PyTree, whole: PyTree) -> tuple[Any, PyTree]:
        total, joined = function(split, whole)
        return merge(total, AXES), joined

    outputs: tuple[Any, PyTree] = on_one(split, whole)
    return outputs


def over_blocks(
    visit: Callable[[PyTree], tuple[PyTree, PyTree]],
    add: Callable[[Any, PyTree], Any],
    zero: Any,
    rows: PyTree,
    block_size: int,
) -> tuple[Any, PyTree]:
    """Visits every row and accumulates what the rows send, block by block.

    Args:
      visit: row -> (output to be accumulated, output to be kept for this row).
      add: (total so far, outputs of a block to be accumulated, leaves (p, ...)) -> total.
      zero: the total of no rows.
      rows: leaves (P, ...), P a multiple of the block size.
      block_size: p, rows that are processed side by side.

    Returns:
      The total, and the kept outputs, leaves (P, ...).
    """

    def run(total: Any, block: PyTree) -> tuple[Any, PyTree]:
        if block_size > 1:
            sent, kept = jax.vmap(visit)(block)
        else:
            # A single row is taken out of its block. With an axis of length one, XLA would copy
            # all parameters at every training step.
            sent, kept = jax.tree.map(lambda x: x[None], visit(jax.tree.map(lambda x: x[0], block)))
        return add(total, sent), kept

    blocks = jax.tree.map(lambda x: x.reshape(len(x) // block_size, block_size, *x.shape[1:]), rows)
    total, kept = lax.scan(run, zero, blocks)
    return total, jax.tree.map(lambda x: x.reshape(len(x) * block_size, *x.shape[2:]), kept)


def together(move: Callable[[Array], Array], rows: PyTree) -> PyTree:
    """Moves leaves (P, ...) of numbers and booleans as one array of each type.

    Devices wait for each other at every array that they exchange, however small it is.
    """
    leaves, structure = jax.tree.flatten(rows)
    moved: list[Array] = list(leaves)
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        places = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        flat = [leaves[i].reshape(len(leaves[i]), -1) for i in places]
        ends = np.cumsum([part.shape[1] for part in flat])[:-1]
        parts = jnp.split(move(jnp.concatenate(flat, axis=1)), ends, axis=1)
        for i, part in zip(places, parts, strict=True):
            moved[i] = part.reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, moved)


def take_rows(table: PyTree, rows: Array) -> PyTree:
    """Gathers rows (..., ) of leaves (C, ...); an index out of range yields an arbitrary row."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), table)


def put_rows(table: PyTree, rows: Array, new: PyTree) -> PyTree:
    """Returns the table with new rows (P, ...); an index out of range is ignored."""
    return jax.tree.map(lambda old, row: old.at[rows].set(row, mode="drop"), table, new)
