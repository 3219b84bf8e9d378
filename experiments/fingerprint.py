"""Identifies what compiled programs are made from: settings, code, packages and the machine.

Equal fingerprints must mean equal programs, so whatever is not known here is refused.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import os
import platform
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
_COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class UnknownError(TypeError):
    """Raised for an object whose content is not known here."""


def fingerprint(thing: Any) -> str:
    """Returns a hash of an object's content, the same in every process.

    Functions are identified by their place in the source and the values that they enclose, so the
    fingerprint is only valid together with `surroundings`, which identifies the source.

    Args:
      thing: records, containers, functions, arrays and numbers, nested in any way.

    Raises:
      UnknownError: it contains another kind of object.
    """
    found = hashlib.sha256()
    for word in _words(thing, {}):
        found.update(f"{len(word)}:".encode() + word)
    return found.hexdigest()


def surroundings() -> str:
    """Returns a hash of all that decides what a function compiles to, apart from its arguments.

    These are the interpreter, the installed packages, the files of all code that is not installed,
    JAX's settings, and the processor.
    """
    parts = [
        sys.version,
        platform.platform(),
        _processor(),
        *(f"{name}={os.environ.get(name)}" for name in _COMPILER_VARIABLES),
        *sorted(f"{name}={value}" for name, value in jax.config.values.items()),
        *(f"{d.id} {d.platform} {d.device_kind}" for d in jax.devices()),
        jax.devices()[0].client.platform_version,
        *_stamps(),
    ]
    return fingerprint(parts)


def _words(thing: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[bytes]:
    """Yields an object's content piece by piece.

    Args:
      thing: the object.
      seen: by their `id`, the number of each object met before, and the object itself, so that
        no other one gets its `id`.
    """
    if isinstance(thing, _PLAIN):
        yield f"{type(thing).__name__} {thing!r}".encode()
    elif id(thing) in seen:
        yield f"again {seen[id(thing)][0]}".encode()
    elif (name := _name_of(thing)) is not None:
        yield f"named {name}".encode()
    else:
        seen[id(thing)] = len(seen), thing
        yield f"{type(thing).__module__}.{type(thing).__qualname__}".encode()
        for part in _parts(thing):
            yield from (part,) if isinstance(part, _Raw) else _words(part, seen)
        yield b"end"


class _Raw(bytes):
    """Bytes that are content, not an object."""


def _parts(thing: Any) -> Iterator[Any]:
    """Yields the parts of an object that make its content."""
    if isinstance(thing, FunctionType):
        yield from _parts_of_function(thing)
    elif isinstance(thing, MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, Mapping):
        yield from ((key, thing[key]) for key in sorted(thing, key=repr))
    elif isinstance(thing, (tuple, list)):
        yield from thing
    elif isinstance(thing, (set, frozenset)):
        yield from sorted(thing, key=repr)
    elif isinstance(thing, jax.ShapeDtypeStruct):
        yield from (thing.shape, str(thing.dtype), repr(thing.sharding))
    elif isinstance(thing, (np.ndarray, np.generic, jax.Array)):
        value = np.asarray(thing)
        if value.dtype.hasobject:
            raise UnknownError("an array of objects")
        yield from (value.shape, str(value.dtype), _Raw(value.tobytes()))
    elif isinstance(thing, jax.stages.Wrapped) and hasattr(thing, "_jit_info"):
        yield from (inspect.unwrap(thing), repr(thing._jit_info))
    elif isinstance(thing, np.dtype):
        yield str(thing)
    elif is_dataclass(thing):
        yield from ((field.name, getattr(thing, field.name)) for field in fields(thing))
    else:
        raise UnknownError(f"{type(thing).__module__}.{type(thing).__qualname__}")


def _parts_of_function(function: FunctionType) -> Iterator[Any]:
    code = function.__code__
    if not Path(code.co_filename).is_file():
        raise UnknownError(f"{function.__qualname__}, which is in no file")
    yield from (function.__module__, function.__qualname__, code.co_firstlineno, _constants(code))
    yield from (function.__defaults__, function.__kwdefaults__)
    try:
        yield from (cell.cell_contents for cell in function.__closure__ or ())
    except ValueError as error:
        raise UnknownError(f"{function.__qualname__}, which encloses an empty cell") from error


def _constants(code: CodeType) -> str:
    """Tells functions of one line apart."""
    return hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest()


def _name_of(thing: Any) -> str | None:
    """Returns the name under which a module holds an object, which its source then defines."""
    if isinstance(thing, ModuleType):
        return thing.__name__
    if isinstance(thing, enum.Enum):
        return f"{type(thing).__module__}.{type(thing).__qualname__}.{thing.name}"
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    held: Any = sys.modules.get(module)
    for part in name.split("."):
        held = inspect.getattr_static(held, part, None)
    return f"{module}.{name}" if held is thing else None


def _stamps() -> Iterator[str]:
    """Yields each installed package with its version, and each file of code that is not installed.

    Files count with their size and time of change, as Python's own compiled files do.
    """
    installed = {Path(path).resolve() for path in _installed()}
    for folder in sorted(installed):
        yield from sorted(
            f"{found.name} {found.stat().st_mtime_ns}" for found in folder.glob("*-info")
        )
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    tops = {name.partition(".")[0] for name in list(sys.modules)}
    folders = {folder for name in tops for folder in _folder_of(sys.modules.get(name))}
    for folder, deep in sorted(folders):
        if standard in (folder, *folder.parents) or installed & {folder, *folder.parents}:
            continue
        yield from sorted(_files(folder, deep))


def _folder_of(module: ModuleType | None) -> Iterator[tuple[Path, bool]]:
    """Yields the folder that holds a module and may hold what it imports, and whether it is deep.

    A package may import from all folders in its own, another module from its folder alone.
    """
    found = getattr(module, "__file__", None)
    if found:
        yield Path(found).resolve().parent, hasattr(module, "__path__")


def _files(folder: str | Path, deep: bool) -> Iterator[str]:
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.endswith(".py"):
                about = entry.stat()
                yield f"{entry.path} {about.st_size} {about.st_mtime_ns}"
            elif deep and entry.is_dir():
                yield from _files(entry.path, deep)


def _installed() -> Iterator[str]:
    yield from (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    yield from (*site.getsitepackages(), site.getusersitepackages())


def _processor() -> str:
    """Returns the processor's name and features, for which programs are compiled."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
