"""The wire format: messages survive the round trip, and anything else is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.deploy import wire
from flexmoe_jax.deploy.carrier import from_bytes, to_bytes
from flexmoe_jax.types import Feedback, Upload

GROUP = {"one": 0, "two": 1}
SLOTS = np.array([[1, 3, 4], [0, 2, 3]], np.int32)  # G, K; of 4 experts


def upload(seed: int = 0) -> Upload:
    rng = np.random.default_rng(seed)

    def some(*shape: int):
        return np.asarray(rng.normal(size=shape), np.float32)

    experts = {layer: {"w": some(3, 2, 5), "b": some(3, 5)} for layer in GROUP}
    experts["one"] = jax.tree.map(
        lambda x: np.where(np.arange(3).reshape(-1, *[1] * (x.ndim - 1)) < 2, x, 0).astype(
            np.float32
        ),
        experts["one"],
    )
    usage = np.array([[3, 2, 0], [1, 0, 4]], np.float32)
    shared = {
        "a": some(4, 3),
        "h": jnp.asarray(some(7), jnp.bfloat16),
        "i": np.arange(6, dtype=np.int8),
    }
    return Upload(
        shared,
        experts,
        Feedback(usage, usage / 2, usage * 0.3),
        np.float32(0.7),
        np.float32(5),
        np.float32(5),
    )


def like():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), upload())


def read(records: RecordDict) -> Upload:
    found = wire.unpack_upload(records, like(), GROUP, SLOTS, 4)
    wire.check_upload(found, 10, 1.0)
    return found


def test_an_upload_comes_back_as_it_was():
    sent = upload()
    records = from_bytes(to_bytes(wire.pack_upload(sent, GROUP, SLOTS, 4)))
    # One record for ψ and one for each expert held; not for the empty slot.
    experts = {f"expert.{g}.{e}" for g, of in enumerate(SLOTS) for e in of if e < 4}
    assert set(records) == {"shared", "numbers", "feedback"} | experts
    jax.tree.map(np.testing.assert_array_equal, read(records), sent)


def test_bytes_are_those_of_the_numbers():
    records = wire.pack_upload(upload(), GROUP, SLOTS, 4)
    numbers = 12 * 4 + 7 * 2 + 6 + 5 * (10 + 5) * 4 + 3 * 6 * 4
    assert numbers < wire.bytes_of(records) < numbers + 130 * 10


@st.composite
def mutated(draw):
    """Returns an upload that was tampered with."""
    records = wire.pack_upload(upload(draw(st.integers(0, 3))), GROUP, SLOTS, 4)
    names = sorted(records.array_records)
    name = draw(st.sampled_from(names))
    kind = draw(
        st.sampled_from(["bytes", "drop", "add", "dtype", "size", "swap", "numbers", "type"])
    )
    part = next(iter(records[name]))
    array = records[name][part]
    if kind == "bytes":
        data = bytearray(array.data)
        for _ in range(draw(st.integers(1, 8))):
            data[draw(st.integers(0, 127))] = draw(st.integers(0, 255))
        records[name][part] = Array(array.dtype, array.shape, array.stype, bytes(data))
    elif kind == "drop":
        del records[name]
    elif kind == "add":
        records[f"expert.0.{draw(st.integers(4, 9))}"] = records[name]
    elif kind == "dtype":
        records[name] = ArrayRecord({"float64": Array(np.zeros(3))})
    elif kind == "size":
        records[name][part] = Array(np.zeros(draw(st.integers(0, 10_000)), np.float32))
    elif kind == "swap":
        records[name] = ArrayRecord({part: array, "other": array})
    elif kind == "numbers":
        value = draw(st.sampled_from([-1.0, 1e9, float("inf"), float("nan"), 3, "x", [1.0]]))
        which = draw(st.sampled_from(["units", "examples"]))
        records["numbers"] = ConfigRecord({**records["numbers"], which: value})
    else:
        records[name] = ConfigRecord({"a": 1})
    return kind, records


@settings(max_examples=500)
@given(mutated())
def test_no_mutated_upload_enters_or_breaks_anything(case):
    kind, records = case
    try:
        found = read(from_bytes(to_bytes(records)))
    except wire.WireError:
        return
    # A changed byte of a header may still say the same; what was read is then what was sent.
    assert kind in ("bytes", "size"), kind
    assert all(
        np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(found.feedback)
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"examples": np.float32(11)}, "11 examples where it can have 10"),
        ({"units": np.float32(6)}, "6 units of 5 examples"),
        ({"units": np.float32(np.nan)}, "units"),
        ({"feedback": Feedback(*[np.full((2, 3), -1.0, np.float32)] * 3)}, "fewer than none"),
        ({"feedback": Feedback(*[np.full((2, 3), 1e9, np.float32)] * 3)}, "more than the 5 units"),
        (
            {"feedback": Feedback(*np.float32([[[1e-6] * 3], [[1e-3] * 3], [[0.0] * 3]]))},
            "more right than there were",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, why):
    with pytest.raises(wire.WireError, match=why):
        wire.check_upload(upload()._replace(**change), 10, 1.0)


def test_an_object_that_numpy_would_unpickle_is_refused():
    evil = np.array([print], object)
    from io import BytesIO

    buffer = BytesIO()
    np.save(buffer, evil, allow_pickle=True)
    records = wire.pack_upload(upload(), GROUP, SLOTS, 4)
    part = next(iter(records["shared"]))
    records["shared"][part] = Array("object", (1,), "numpy.ndarray", buffer.getvalue())
    with pytest.raises(wire.WireError, match="shared"):
        read(records)
