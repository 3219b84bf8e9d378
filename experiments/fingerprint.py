"""Identifies what compiled programs are made from: settings, functions and what they enclose.

Equal fingerprints must mean equal programs, so whatever is not known here is refused.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))


class UnknownError(TypeError):
    """Raised for an object whose content is not known here."""


def fingerprint(thing: Any) -> str:
    """Returns a hash of an object's content, the same in every process.

    Functions and classes are identified by their names in modules, and functions by what they
    enclose, so the fingerprint is only valid together with `environment`, which identifies the
    source of all modules.

    Args:
      thing: records, containers, functions, arrays and numbers, nested in any way.

    Raises:
      UnknownError: it contains another kind of object.
    """
    found = hashlib.sha256()
    for word in _words(thing, {}):
        found.update(f"{len(word)}:".encode() + word)
    return found.hexdigest()


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
        yield _name_of_kind(thing).encode()
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
    code, module = function.__code__, sys.modules.get(function.__module__)
    if code.co_filename != getattr(module, "__file__", None):
        raise UnknownError(f"{function.__qualname__}, which is in no file of a module")
    yield from (function.__module__, function.__qualname__, code.co_firstlineno)
    yield from (function.__defaults__, function.__kwdefaults__, *_parts_of_code(code))
    try:
        yield from (cell.cell_contents for cell in function.__closure__ or ())
    except ValueError as error:
        raise UnknownError(f"{function.__qualname__}, which encloses an empty cell") from error


def _parts_of_code(code: CodeType) -> Iterator[Any]:
    """Yields what tells functions of one line apart: bytecode, names and constants."""
    yield from (code.co_code, code.co_names)
    for constant in code.co_consts:
        yield tuple(_parts_of_code(constant)) if isinstance(constant, CodeType) else constant


def _name_of_kind(thing: Any) -> str:
    """Returns the name of an object's class, if its source is known."""
    kind = type(thing)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__ != "builtins" and _name_of(kind) is None:
        raise UnknownError(f"{name}, a class that no module holds")
    return name


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
