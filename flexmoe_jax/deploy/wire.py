"""Convert parameters to Flower's records and back: one record for ψ, and one for each expert.

A record holds one flat array for each dtype, in the order of the tree's leaves. Both ends know the
shapes and names from the model, so a record holds numbers only. A record is rejected unless its
sizes and dtypes are exactly those of the model.

Axis legend: `K` expert slots, `G` groups of MoE layers, `L` MoE layers, `E` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flexmoe_jax.errors import printable
from flexmoe_jax.types import Feedback, PyTree, Upload

# Dtypes that .npy files do not support are sent as integers of the same size.
CARRIED = {np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16)}

Expert = tuple[int, int]
"""The group of MoE layers, and the number of the expert in it."""
Experts = dict[Expert, PyTree]
"""Parameters of some experts: for each expert a tree by MoE layer, leaves (...)."""


class WireError(ValueError):
    """A message does not fit the model or the round; the text gives the reason in one line."""


def pack(tree: PyTree) -> ArrayRecord:
    """Convert a tree of arrays to a record."""
    by_type: dict[np.dtype[Any], list[np.ndarray]] = {}
    for leaf in jax.tree.leaves(tree):
        by_type.setdefault(np.dtype(leaf.dtype), []).append(np.asarray(leaf).ravel())
    arrays = {}
    for kind, leaves in by_type.items():
        flat = np.concatenate(leaves)
        arrays[str(kind)] = Array(flat.view(CARRIED.get(kind, kind)))
    return ArrayRecord(arrays)


def unpack(record: ArrayRecord, like: PyTree) -> PyTree:
    """Convert a record to the tree that it holds.

    Args:
      record: from `pack`, or from an untrusted sender.
      like: a tree of arrays, or of their shapes.

    Raises:
      WireError: if the record does not hold exactly such a tree.
    """
    leaves, found = jax.tree.flatten(like)
    structure: Any = found
    wanted: dict[str, int] = {}
    for leaf in leaves:
        kind = str(np.dtype(leaf.dtype))
        wanted[kind] = wanted.get(kind, 0) + int(np.prod(leaf.shape))
    if set(record) != set(wanted):
        odd = printable(", ".join(sorted(record)) or "nothing", 80)
        raise WireError(f"holds {odd} where the model has {', '.join(sorted(wanted))}")
    flat = {kind: _numbers(record[kind], kind, size) for kind, size in wanted.items()}
    taken = dict.fromkeys(flat, 0)

    def take(leaf: Any) -> np.ndarray:
        kind, size = str(np.dtype(leaf.dtype)), int(np.prod(leaf.shape))
        begin = taken[kind]
        taken[kind] = begin + size
        return flat[kind][begin : begin + size].reshape(leaf.shape)

    return structure.unflatten([take(leaf) for leaf in leaves])


def _numbers(array: Array, kind: str, size: int) -> np.ndarray:
    wanted = np.dtype(kind)
    carried = CARRIED.get(wanted, wanted)
    # Check the size before reading: data that are too large are never decoded.
    if len(array.data) > size * carried.itemsize + 1024:
        raise WireError(f"holds {len(array.data)} bytes where the model has {size} {kind}")
    try:
        found = array.numpy()
    except Exception as error:  # Untrusted bytes can raise any error.
        raise WireError(f"holds an array that cannot be read ({type(error).__name__})") from error
    if found.dtype != carried or found.shape != (size,):
        shape = printable(f"{found.dtype}{list(found.shape)}", 80)
        raise WireError(f"holds {shape} where the model has {carried}[{size}]")
    return found.view(wanted)


def name_of(expert: Expert) -> str:
    """Return the name of an expert's record."""
    return f"expert.{expert[0]}.{expert[1]}"


def held(slots: np.ndarray, experts: int) -> dict[Expert, int]:
    """Return the experts in slots (G, K), with the slot of each; E marks an empty slot."""
    return {
        (g, int(e)): k
        for g, of_group in enumerate(np.asarray(slots))
        for k, e in enumerate(of_group)
        if 0 <= e < experts
    }


def pack_experts(
    experts: Mapping[str, PyTree],
    group: Mapping[str, int],
    wanted: Mapping[Expert, int],
    skip: Collection[Expert] = (),
) -> dict[str, ArrayRecord]:
    """Convert experts to records, by record name.

    Args:
      experts: parameters by MoE layer, leaves (n, ...).
      group: MoE layer -> its group.
      wanted: the experts to convert, and the index of each along the axis n.
      skip: experts in `wanted` to leave out.
    """
    return {
        name_of(expert): pack(cut(experts, group, expert[0], place))
        for expert, place in wanted.items()
        if expert not in skip
    }


def cut(experts: Mapping[str, PyTree], group: Mapping[str, int], g: int, place: int) -> PyTree:
    """Return one expert of a group, by MoE layer, from stacks (n, ...)."""
    of_group = {layer: stack for layer, stack in experts.items() if group[layer] == g}
    return jax.tree.map(lambda leaf: np.asarray(leaf[place]), of_group)


def one_of_each(experts: Mapping[str, PyTree], group: Mapping[str, int]) -> Callable[[int], PyTree]:
    """Return a function from a group to the shapes of one expert; stacks are (n, ...)."""

    def of_group(g: int) -> PyTree:
        stacks = {layer: stack for layer, stack in experts.items() if group[layer] == g}
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacks)

    return of_group


def stack_experts(
    found: Experts, group: Mapping[str, int], slots: np.ndarray, like: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """Stack the experts in slots (G, K) to (K, ...) by MoE layer; empty slots are zeros.

    Args:
      found: parameters of each expert.
      group: MoE layer -> its group.
      slots: (G, K) expert in each slot.
      like: shapes (n, ...) of stacks, by MoE layer.
    """
    many = np.asarray(slots).shape[1]

    def stack(layer: str) -> PyTree:
        empty = jax.tree.map(lambda x: np.zeros((many, *x.shape[1:]), x.dtype), like[layer])
        for k, e in enumerate(np.asarray(slots)[group[layer]]):
            one = found.get((group[layer], int(e)))
            if one is not None:
                jax.tree.map(lambda into, x, k=k: into.__setitem__(k, x), empty, one[layer])
        return empty

    return {layer: stack(layer) for layer in like}


def pack_upload(
    upload: Upload, group: Mapping[str, int], slots: np.ndarray, experts: int
) -> RecordDict:
    """Convert a client's upload to records: ψ, each expert that it holds, and the feedback."""
    there = held(slots, experts)
    numbers: Any = {name: float(getattr(upload, name)) for name in ("loss", "units", "examples")}
    return RecordDict(
        {
            "numbers": ConfigRecord(numbers),
            "feedback": pack(upload.feedback),
            "shared": pack(upload.shared),
            **pack_experts(upload.experts, group, there),
        }
    )


def unpack_upload(
    records: RecordDict, like: Upload, group: Mapping[str, int], slots: np.ndarray, experts: int
) -> Upload:
    """Convert records to a client's upload, leaves (K, ...); empty slots are zeros.

    Args:
      records: from an untrusted sender.
      like: shapes of the upload.
      group: MoE layer -> its group.
      slots: (G, K) the experts that the client was assigned.
      experts: E.

    Raises:
      WireError: if the records do not hold such an upload.
    """
    there, one = held(slots, experts), one_of_each(like.experts, group)
    wanted = {"numbers", "feedback", "shared", *map(name_of, there)}
    given = set(records) - {"answer"}
    if given != wanted:
        odd = printable(", ".join(sorted(given ^ wanted)), 120)
        raise WireError(f"lacks, or has beside what was asked for: {odd}")
    found = {expert: _part(records, name_of(expert), one(expert[0])) for expert in there}
    numbers: Any = records["numbers"]
    if not isinstance(numbers, ConfigRecord) or set(numbers) != {"loss", "units", "examples"}:
        raise WireError("numbers: give loss, units and examples")
    if not all(isinstance(x, float) for x in numbers.values()):
        raise WireError("numbers: loss, units and examples are floats")
    told: dict[str, Any] = dict(numbers)
    sums: Any = {name: np.float32(told[name]) for name in ("loss", "units", "examples")}
    return Upload(
        shared=_part(records, "shared", like.shared),
        experts=stack_experts(found, group, slots, like.experts),
        feedback=Feedback(*_part(records, "feedback", like.feedback)),
        **sums,
    )


def _part(records: RecordDict, name: str, like: PyTree) -> PyTree:
    record = records.get(name)
    if not isinstance(record, ArrayRecord):
        raise WireError(f"{name}: no arrays")
    try:
        return unpack(record, like)
    except WireError as error:
        raise WireError(f"{name} {error}") from error


def check_upload(upload: Upload, most_examples: int, units_of_one: float) -> None:
    """Check that the numbers that a client reports in its upload are possible.

    Args:
      upload: of a client.
      most_examples: the most examples that it can have trained on, counted once per step.
      units_of_one: the most units of one example.

    Raises:
      WireError: if a number is impossible; names the number.
    """
    examples, units = float(upload.examples), float(upload.units)
    if not (0 <= examples <= most_examples):
        raise WireError(f"says {examples:.0f} examples where it can have {most_examples}")
    if not (0 <= units <= examples * units_of_one * 1.001):
        raise WireError(f"says {units:.0f} units of {examples:.0f} examples")
    usage, correct, loss = (np.asarray(part, np.float64) for part in upload.feedback)
    if not (np.isfinite(usage).all() and np.isfinite(correct).all()):
        raise WireError("feedback is not all numbers")
    if (usage < 0).any() or (correct < 0).any() or (correct > usage * 1.001 + 1e-6).any():
        raise WireError("feedback has more right than there were, or fewer than none")
    if (usage.sum(axis=-1) > units * 1.001 + 1e-6).any():
        raise WireError(f"feedback has more than the {units:.0f} units")
    if not np.isfinite(loss).all() and np.isfinite(float(upload.loss)):
        raise WireError("feedback's loss is not all numbers")


def bytes_of(records: RecordDict) -> int:
    """Count the bytes of all arrays in the records."""
    total = 0
    for record in records.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
    return total
