"""Identifies all that decides what a function compiles to, apart from its arguments."""

from __future__ import annotations

import logging
import os
import platform
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import GenericAlias, ModuleType, UnionType

import jax

from experiments.fingerprint import UnknownError, fingerprint

_COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OURS = ("examples", "experiments", "flexmoe_jax", "tests")
# Values that no function computes with: classes (their source counts), loggers, and types.
_HARMLESS = (type, logging.Logger, GenericAlias, UnionType)
_TYPES = ("__future__", "collections.abc", "typing")


def environment() -> str:
    """Returns a hash of the interpreter, all code, JAX's settings, the devices and the processor.

    Code means the installed packages by version, and all files of modules that are not installed.
    Of users' modules, the values that they hold count as well: a value may come from anywhere.

    Raises:
      UnknownError: a user's module holds a value of unknown content.
    """
    own = list(_own_modules())
    parts = [
        sys.version,
        platform.platform(),
        _processor(),
        *(f"{name}={os.environ.get(name)}" for name in _COMPILER_VARIABLES),
        *sorted(f"{name}={value}" for name, value in jax.config.values.items()),
        *(f"{d.id} {d.platform} {d.device_kind}" for d in jax.devices()),
        jax.devices()[0].client.platform_version,
        *_packages(),
        *_files_beside(own),
        *(value for module in own for value in _values(module)),
    ]
    return fingerprint(parts)


def _packages() -> Iterator[str]:
    """Yields each installed package with its version, and when it was installed."""
    for folder in _installed():
        found = Path(folder).glob("*-info")
        yield from sorted(f"{about.name} {about.stat().st_mtime_ns}" for about in found)


def _own_modules() -> Iterator[ModuleType]:
    """Yields the loaded modules that neither come with Python nor are installed, by name."""
    elsewhere = tuple(f"{folder}{os.sep}" for folder in (*_installed(), _standard()))
    for _, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and not os.path.abspath(file).startswith(elsewhere):
            yield module


def _files_beside(modules: list[ModuleType]) -> Iterator[str]:
    """Yields the files of modules, and those that they may import at any time.

    A package may import all files in its folder, another module those beside it. Files count with
    their size and the time of their last change, as Python's own compiled files do.
    """
    folders: dict[str, bool] = {}
    for module in modules:
        top = sys.modules.get(module.__name__.partition(".")[0], module)
        # A package may have no file of its own.
        whole = top if getattr(top, "__file__", None) else module
        folder = os.path.dirname(os.path.abspath(str(whole.__file__)))
        folders[folder] = folders.get(folder, False) or hasattr(whole, "__path__")
    for folder, deep in sorted(folders.items()):
        yield from sorted(_files(folder, deep))


def _files(folder: str, deep: bool) -> Iterator[str]:
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.endswith(".py"):
                about = entry.stat()
                yield f"{entry.path} {about.st_size} {about.st_mtime_ns}"
            elif deep and entry.is_dir():
                yield from _files(entry.path, deep)


def _values(module: ModuleType) -> Iterator[str]:
    """Yields the values that a user's module holds, as far as they are data.

    Raises:
      UnknownError: one may decide what a function computes, and its content is not known.
    """
    file = os.path.abspath(str(module.__file__))
    if any(file.startswith(str(Path(__file__).parents[1] / name)) for name in _OURS):
        return
    for name, value in sorted(vars(module).items()):
        if name.startswith("__"):
            continue
        try:
            yield f"{module.__name__}.{name} {fingerprint(value)}"
        except UnknownError as error:
            if not isinstance(value, _HARMLESS) and type(value).__module__ not in _TYPES:
                raise UnknownError(f"{module.__name__}.{name}, {error}") from error


def _installed() -> list[str]:
    given = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    folders = {*given, *site.getsitepackages(), site.getusersitepackages()}
    return sorted(os.path.abspath(folder) for folder in folders)


def _standard() -> str:
    return os.path.abspath(sysconfig.get_path("stdlib"))


def _processor() -> str:
    """Returns the processor's name and features, for which programs are compiled."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
