"""Keeps compiled programs on disk, so that a later launch need not trace them again.

JAX's own cache of compiled programs needs the lowered program to find one, and most of a start is
spent on tracing and lowering it.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import serialize_executable
from jax.stages import Compiled, Lowered

from experiments.environment import environment
from experiments.fingerprint import UnknownError, fingerprint
from experiments.workdir import write_atomically

# Programs that are kept; a launch has three. The ones not used for longest are removed.
_MOST = 300
_DIGEST = hashlib.sha256().digest_size
# JAX reports this in the thread that compiled a program and wrote it to JAX's own cache.
_COMPILED = "/jax/compilation_cache/cache_misses"
_reported = threading.local()


def _listen(event: str, **about: Any) -> None:
    if event == _COMPILED:
        _reported.compiled = True


jax.monitoring.register_event_listener(_listen)


def open_cache() -> DiskCache | None:
    """Returns the cache of programs beside JAX's own cache.

    None if JAX is told to keep no programs, or a user's module holds what may decide about them and
    is not known.
    """
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    try:
        return DiskCache(Path(folder) / "launched")
    except UnknownError as error:
        logging.info("Programs are not kept without tracing, because of %s", error)
        return None


class DiskCache:
    """Programs in a folder, one file each. See `flexmoe_jax.simulation.precompile.ProgramCache`.

    A file that is missing, damaged (it begins with its SHA-256) or not readable is as good as none.
    """

    def __init__(self, folder: Path) -> None:
        """Takes the folder, which may not exist yet."""
        self._folder = folder
        self._environment = environment()

    def find(self, name: str, made_from: Any) -> Callable[[], Compiled] | None:
        """Returns a function that loads the program; None if it is not here."""
        path = self._path(name, made_from)
        try:
            content = path.read_bytes() if path else b""
            digest, packed = content[:_DIGEST], content[_DIGEST:]
            if not path or hashlib.sha256(packed).digest() != digest:
                return None
            os.utime(path)
        except OSError:
            return None
        return lambda: _load(packed)

    def compile(
        self, name: str, made_from: Any, lowered: Lowered, options: dict[str, Any]
    ) -> Compiled:
        """Compiles a program, and keeps it.

        A program that JAX finds in its own cache is not kept: what a CPU's program consists of is
        lost when it is loaded, and only using what is written then would show it.
        """
        _reported.compiled = False
        program = lowered.compile(options)
        if _reported.compiled and (path := self._path(name, made_from)) is not None:
            self._keep(path, program)
        return program

    def _keep(self, path: Path, program: Compiled) -> None:
        try:
            devices = [device.id for device in _executable(program).local_devices()]
            content = pickle.dumps((devices, *serialize_executable.serialize(program)))
            packed = zlib.compress(content, level=1)
            self._folder.mkdir(parents=True, exist_ok=True)
            # Should two launches write it at once, the digest tells whether it is whole.
            write_atomically(path, hashlib.sha256(packed).digest() + packed)
            self._make_room()
        except Exception as error:  # The backend can raise any exception.
            logging.info("%s is not kept: %s", path.name, error)

    def _make_room(self) -> None:
        by_age = sorted(self._folder.glob("*.program"), key=lambda kept: kept.stat().st_mtime)
        for oldest in by_age[:-_MOST]:
            oldest.unlink(missing_ok=True)

    def _path(self, name: str, made_from: Any) -> Path | None:
        """Returns the program's file; None if it is not known what the program is made from."""
        try:
            key = fingerprint((self._environment, name, made_from))
        except UnknownError as error:
            logging.info("The program %s is not kept, because it is made from %s", name, error)
            return None
        return self._folder / f"{name}-{key[:40]}.program"


def _load(packed: bytes) -> Compiled:
    devices, program, arguments, results = pickle.loads(zlib.decompress(packed))
    by_id = {device.id: device for device in jax.devices()}
    found: Compiled = serialize_executable.deserialize_and_load(
        program, arguments, results, execution_devices=[by_id[number] for number in devices]
    )
    return found


def _executable(program: Compiled) -> Any:
    return program.runtime_executable()
