from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexmoe_jax.npz import open_npz, read_npy
from flexmoe_jax.reading import UnreadableError

PLAIN = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
    hnp.datetime64_dtypes(endianness="?"),
)


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_npz(path) as archive:
        return {name: archive.read(name) for name in archive.names}


def write(path: Path, content: bytes, name: str = "a.npy", **changes: int) -> Path:
    """An archive of one member, whose directory entry may contradict the member."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, content)
        for key, value in changes.items():
            setattr(file.filelist[0], key, value)
    return path


def header(descr: str, shape: str, order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    padded = text + " " * (117 - len(text)) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode("latin1")


@given(
    hnp.arrays(PLAIN, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    st.booleans(),
    st.booleans(),
)
def test_arrays_come_back_as_numpy_reads_them(tmp_path_factory, array, packed, fortran):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    given_ = np.asfortranarray(array) if fortran else array
    (np.savez_compressed if packed else np.savez)(path, a=given_, b=np.arange(3))
    with open_npz(path) as archive:
        assert archive.names == ("a", "b")
        assert "a" in archive
        assert "c" not in archive
        found = archive.read("a")
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.flags.c_contiguous
    assert found.shape == given_.shape
    assert np.array_equal(found, given_, equal_nan=array.dtype.kind in "fcmM")
    np.save(path.with_suffix(".npy"), given_)
    assert read_npy(path.with_suffix(".npy")).tobytes() == found.tobytes()


def test_texts_come_back(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array(["cat", "日本"]), b=np.array([b"x"]))
    assert read_all(path)["a"].tolist() == ["cat", "日本"]
    assert read_all(path)["b"].tolist() == [b"x"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_bit_anywhere_is_found_or_changes_nothing(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, a=np.arange(40).reshape(5, 8), name=np.array(["cat"]))
    whole, known = path.read_bytes(), read_all(path)
    refused = 0
    for bit in range(0, 8 * len(whole), 11):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            found = read_all(path)
        except UnreadableError:
            refused += 1
            continue
        assert found.keys() == known.keys()
        assert all(np.array_equal(found[name], known[name]) for name in known)
    assert refused > len(whole) // 4


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_an_archive_cut_short_is_refused(tmp_path, share):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(40))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UnreadableError):
        read_all(path)


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}, None], object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header("'<f4'", "(1000000000000,)"), "128 bytes where its header asks for 4,0"),
        (header("'<f4'", "(2, -3)"), "bytes where its header"),
        (header("'<f4'", "(4,)") + b"\0" * 15, "143 bytes where its header asks for 144"),
        (header("'<f4'", "(4,)") + b"\0" * 17, "145 bytes where its header asks for 144"),
        (header("'<U0'", "(1000000000000,)"), "not a plain array"),
        (header("'|O'", "(2,)") + b"\0" * 16, "not a plain array"),
        (header("[('a', '<i4')]", "(2,)") + b"\0" * 8, "not a plain array"),
        (header("'|V4'", "(2,)") + b"\0" * 8, "not a plain array"),
        (header("'<f4'", "(" * 60 + ")" * 60), "."),
        (header("'<U1'", "(1,)") + b"\xff" * 4, "characters that there are not"),
        (header("'<U1'", "(1,)") + struct.pack("<L", 0xD800), "characters that there are not"),
        (header("'\\d'", "(1,)"), "."),
        (header("__import__('os').abort()", "(1,)"), "."),
        (b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**32 - 1) + b" " * 20_000, "."),
        (b"\x93NUMPY\x09\x00" + b" " * 200, "version"),
        (b"not an array", "."),
        (b"", "."),
        (pickled(), "not a plain array"),
    ],
)
def test_members_that_are_no_plain_arrays_are_refused(tmp_path, recwarn, content, reason):
    path = write(tmp_path / "a.npz", content)
    with pytest.raises(UnreadableError, match=reason):
        read_all(path)
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UnreadableError, match=reason):
        read_npy(tmp_path / "a.npy")
    assert not recwarn.list


def test_what_unpacks_to_more_than_memory_is_refused_before(tmp_path):
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("a.npy", "w", force_zip64=True) as member,
    ):
        member.write(header("'<f4'", f"({2**24},)"))
        for _ in range(64):
            member.write(bytes(2**20))
    assert path.stat().st_size < 100_000
    assert read_all(path)["a"].shape == (2**24,)
    # The same bytes, said to be ten terabytes.
    size = 10**13 + 128
    bomb = write(tmp_path / "a.npz", header("'<f4'", f"({10**13 // 4},)"), file_size=size)
    tracemalloc.start()
    with pytest.raises(UnreadableError, match=r"cannot unpack|GB of memory"):
        read_all(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("change", [{"compress_type": zipfile.ZIP_LZMA}, {"flag_bits": 1}])
def test_other_ways_of_packing_are_refused(tmp_path, change):
    path = write(tmp_path / "a.npz", header("'<f4'", "(1,)") + b"\0" * 4, **change)
    with pytest.raises(UnreadableError):
        read_all(path)


def test_other_members_are_named_and_read_by_nobody(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(3))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("notes.txt", "mine")
    with open_npz(path) as archive:
        assert archive.names == ("a", "notes.txt")
        assert archive.read("a").tolist() == [0, 1, 2]
        with pytest.raises(UnreadableError):
            archive.read("notes.txt")
        with pytest.raises(KeyError):
            archive.read("b")


def test_a_list_of_members_without_end_is_refused(tmp_path):
    path = write(tmp_path / "a.npz", b"")
    content = bytearray(path.read_bytes())
    content[-10:-6] = struct.pack("<L", 2**31)
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match="lists more members"):
        read_all(path)
