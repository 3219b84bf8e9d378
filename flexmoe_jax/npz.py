"""Arrays of `.npz` and `.npy` files, read with limits; all damage is one error.

`np.load` believes what a file says of itself: a header of a hundred bytes asks for terabytes, a
small archive unpacks to as much, and a changed bit shows as any of a dozen errors. Here sizes are
compared with each other and with the memory there is before any is taken, and checksums are read to
the end. What is read are plain arrays as `np.save` and `np.savez` write them: no Python objects, no
structures.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import BinaryIO, Protocol

import numpy as np

from flexmoe_jax.reading import UnreadableError, open_regular, require_memory

SUFFIX = ".npy"
# Bytes of an array's header, of which `np.save` writes 128, and of an archive's list of members.
_HEADER = 10_000
_DIRECTORY = 2**24
_CHUNK = 2**20
# After the mark: numbers of disks, members on this disk and in all, bytes of their list.
_END_MARK, _END = b"PK\x05\x06", struct.Struct("<4H2L")
# No stream of DEFLATE unpacks to more than this many times its length.
_MOST_PACKED = 1040
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1
# Whole and other numbers, complex ones, truth values, dates, texts and bytes.
_KINDS = "biufcmMUS"
_LAST_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Archive:
    """An open `.npz` file; see `open_npz`.

    Attributes:
      names: of its arrays, and of whatever else it holds.
    """

    def __init__(self, file: zipfile.ZipFile) -> None:
        """Lists the members."""
        self._file = file
        self._members = {info.filename.removesuffix(SUFFIX): info for info in file.infolist()}
        self.names = tuple(self._members)

    def __contains__(self, name: object) -> bool:
        """Whether there is such an array."""
        return name in self._members

    def read(self, name: str) -> np.ndarray:
        """One array, in C order and the machine's byte order.

        Raises:
          KeyError: there is none of this name.
          UnreadableError: it is damaged, no plain array, or larger than memory.
        """
        info = self._members[name]
        with _one_error():
            if info.compress_type not in _METHODS or info.flag_bits & _ENCRYPTED:
                raise UnreadableError("it is packed in another way than np.savez does")
            if info.file_size > _MOST_PACKED * (info.compress_size + 1):
                raise UnreadableError("it cannot unpack to what it says")
            with self._file.open(info) as stream:
                return _read_array(stream, info.file_size)


@contextmanager
def open_npz(path: str | os.PathLike[str]) -> Iterator[Archive]:
    """Opens the file that `np.savez` or `np.savez_compressed` wrote.

    Raises:
      UnreadableError: it is none, or damaged; so do the archive's methods.
      OSError: the system does not let us, above all `FileNotFoundError`.
    """
    with open_regular(path) as raw:
        with _one_error():
            members = _count_members(raw)
            file = zipfile.ZipFile(raw)
            if len(file.infolist()) != members:
                raise UnreadableError("its list of members is damaged")
            for info in file.infolist():
                # Compares the name in the list with the one before the member: of an array that
                # may be left out, nobody would ask for a damaged name.
                file.open(info).close()
            archive = Archive(file)
        yield archive


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of a file that `np.save` wrote, in C order and the machine's byte order.

    Raises:
      UnreadableError: it is damaged, no plain array, or larger than memory.
      OSError: the system does not let us.
    """
    with open_regular(path) as file, _one_error():
        return _read_array(file, os.fstat(file.fileno()).st_size)


def _count_members(raw: BinaryIO) -> int:
    """Members by the record at an archive's end, which zipfile does not compare with its list.

    Raises:
      UnreadableError: there is none, or the list is too long to be honest: each becomes an object.
    """
    size = raw.seek(0, os.SEEK_END)
    raw.seek(max(0, size - _END.size - 2**16))
    _, found, end = raw.read().rpartition(_END_MARK)
    if not found or len(end) < _END.size:
        raise UnreadableError("it is no zip file, or cut short")
    *_, members, listed, _ = _END.unpack(end[: _END.size])
    if listed > _DIRECTORY:
        raise UnreadableError("it lists more members than np.savez writes")
    return int(members)


def _read_array(stream: _Stream, size: int) -> np.ndarray:
    """Reads an array of a stream that says of itself that it has `size` bytes."""
    head = BytesIO(stream.read(min(size, _HEADER)))
    shape, fortran, dtype = _read_header(head)
    if dtype.kind not in _KINDS or not dtype.itemsize:
        raise UnreadableError("it holds Python objects, structures or nothing, not a plain array")
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or head.tell() + needed != size:
        found = f"{size:,} bytes where its header asks for {head.tell() + needed:,}"
        raise UnreadableError(f"it has {found}")
    require_memory(needed)
    content = np.empty(needed, np.uint8)
    at, rest = 0, head.read()
    while rest:
        content[at : at + len(rest)] = np.frombuffer(rest, np.uint8)
        at += len(rest)
        rest = stream.read(min(_CHUNK, needed - at))
    # One byte more: a zip file's checksum is compared where its member ends.
    if at < needed or stream.read(1):
        raise UnreadableError("it ends too soon, or too late")
    array = content.view(dtype).reshape(shape, order="F" if fortran else "C")
    _check_text(array)
    return np.ascontiguousarray(array, dtype.newbyteorder("=")).reshape(shape)


def _read_header(head: BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(head)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise UnreadableError("its header is of a version that np.save does not need")
    with warnings.catch_warnings():
        # Of what Python makes of a damaged header.
        warnings.simplefilter("ignore")
        return readers[version](head)


def _check_text(array: np.ndarray) -> None:
    """Refuses texts that cannot be written anywhere."""
    if array.dtype.kind != "U" or not array.size:
        return
    codes = array.reshape(-1).view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
    first, last = _SURROGATES
    if codes.max() > _LAST_CODE_POINT or ((codes >= first) & (codes <= last)).any():
        raise UnreadableError("it holds texts of characters that there are not")


@contextmanager
def _one_error() -> Iterator[None]:
    try:
        yield
    except UnreadableError:
        raise
    except MemoryError as error:
        raise UnreadableError("it takes more memory than there is") from error
    except Exception as error:  # Damage shows in many ways.
        raise UnreadableError(str(error) or type(error).__name__) from error
