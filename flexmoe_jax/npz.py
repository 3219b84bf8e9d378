"""Safe readers for `.npz` and `.npy` files, with limits and one error type for all damage.

`np.load` trusts the file: a header of a hundred bytes can request terabytes, a small archive can
unpack to as much, and a changed bit can raise any of a dozen errors. The functions here compare the
sizes with each other and with the available memory before they allocate any, and read files to the
end so that checksums are verified. They read only plain arrays as `np.save` and `np.savez` write
them: no Python objects and no structured arrays.
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
# Largest size in bytes of an array's header (`np.save` writes 128), and of an archive's directory.
_HEADER = 10_000
_DIRECTORY = 2**24
_CHUNK = 2**20
# After the mark: two disk numbers, members on this disk and in total, and the size and offset of
# the directory in bytes.
_END_MARK, _END = b"PK\x05\x06", struct.Struct("<4H2L")
# A DEFLATE stream cannot unpack to more than this many times its length.
_MOST_PACKED = 1040
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1
# Booleans, signed and unsigned integers, floats, complex numbers, time differences, dates, text
# and bytes.
_KINDS = "biufcmMUS"
_LAST_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Archive:
    """An open `.npz` file; see `open_npz`.

    Attributes:
      names: the names of its arrays, and of any other members.
    """

    def __init__(self, file: zipfile.ZipFile) -> None:
        """Reads the list of members."""
        self._file = file
        self._members = {info.filename.removesuffix(SUFFIX): info for info in file.infolist()}
        self.names = tuple(self._members)

    def __contains__(self, name: object) -> bool:
        """Whether the archive has an array of this name."""
        return name in self._members

    def read(self, name: str) -> np.ndarray:
        """Reads one array, in C order and the machine's byte order.

        Raises:
          KeyError: there is no array of this name.
          UnreadableError: the array is damaged, not a plain array, or larger than memory.
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
    """Opens a file written by `np.savez` or `np.savez_compressed`.

    Raises:
      UnreadableError: the file is not such an archive, or is damaged. The methods of the archive
        raise it too.
      OSError: the file cannot be opened, most often `FileNotFoundError`.
    """
    with open_regular(path) as raw:
        with _one_error():
            members = _count_members(raw)
            file = zipfile.ZipFile(raw)
            if len(file.infolist()) != members:
                raise UnreadableError("its list of members is damaged")
            for info in file.infolist():
                # Opening compares the name in the directory with the name before the member. An
                # optional array with a damaged name would otherwise just seem to be missing.
                file.open(info).close()
            archive = Archive(file)
        yield archive


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a file written by `np.save`; the array is in C order and the machine's byte order.

    Raises:
      UnreadableError: the file is damaged, not a plain array, or larger than memory.
      OSError: the file cannot be opened.
    """
    with open_regular(path) as file, _one_error():
        return _read_array(file, os.fstat(file.fileno()).st_size)


def _count_members(raw: BinaryIO) -> int:
    """Reads the number of members from the record at the end of an archive.

    `zipfile` does not compare this number with the directory.

    Raises:
      UnreadableError: there is no such record, or the directory is too large to be genuine; zipfile
        would create one object per member.
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
    """Reads an array from a stream whose declared length is `size` bytes."""
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
    # Read one byte more, because zipfile verifies the checksum only at the end of a member.
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
        # Parsing a damaged header can issue Python warnings.
        warnings.simplefilter("ignore")
        return readers[version](head)


def _check_text(array: np.ndarray) -> None:
    """Checks that texts contain only valid Unicode characters."""
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
    except Exception as error:  # A damaged file can raise many exceptions.
        raise UnreadableError(str(error) or type(error).__name__) from error
