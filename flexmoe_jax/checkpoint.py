"""Checkpoints of a federation's state: written by orbax, checked before they are read.

A checkpoint is a folder named after its round. It gets that name in one step, when orbax's files
and a checksum of each are on disk, so a process killed at any moment leaves the earlier ones as
they were. orbax itself does not notice a changed bit in an array: the checksums do.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flexmoe_jax.errors import InputError
from flexmoe_jax.types import State

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_CHECKSUMS, _ARRAYS = "checksums.json", "arrays.json"
_UNFINISHED = "unfinished"


class Restored(NamedTuple):
    """What was found of a run.

    Attributes:
      state: the newest that could be used, or None.
      passed_over: one line on each newer checkpoint, which has been moved out of the way.
    """

    state: State | None
    passed_over: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run, one for each saved round; the newest few are kept.

    In a run over several processes all of them call every method, and share the folder.

    Args:
      folder: where they lie; made if it is not there.
      keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Only remembers the folder."""
        self._folder, self._keep = folder.resolve(), keep

    def rounds(self) -> list[int]:
        """The saved rounds, rising."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def save(self, state: State) -> None:
        """Saves the state under its number of completed rounds, and deletes the oldest.

        Raises:
          OSError: it could not be written; the earlier checkpoints are as they were.
        """
        import orbax.checkpoint as ocp

        host = _on_host(_with_raw_key(state))
        unfinished = self._folder / _UNFINISHED
        try:
            with _one_error(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    self._clear()  # What an earlier process left when it was killed.
                    _require_space(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(host)))
                _wait_for_all("ready to save")
                self._checkpointer.save(unfinished, args=ocp.args.StandardSave(host))
                if jax.process_index() == 0:
                    _write_json(unfinished / _ARRAYS, _shapes(host))
                    _write_json(unfinished / _CHECKSUMS, _checksums(unfinished))
                    os.replace(unfinished, self._folder / str(int(state.round)))
                    for old in self.rounds()[: -self._keep]:
                        shutil.rmtree(self._folder / str(old))
        except OSError:
            self._clear()
            raise
        _wait_for_all("saved")

    def restore(self, like: State, at_most: int | None = None) -> Restored:
        """Reads the newest checkpoint that is whole.

        Those that are newer, yet damaged or not wanted, go to a folder `FOLDER-set-aside`, so that
        the run can save these rounds again.

        Args:
          like: gives the structure, shapes, types and places of the arrays.
          at_most: the newest round that is wanted, if not all are.

        Raises:
          InputError: a checkpoint is whole, but of another model or another version of the code.
        """
        passed_over: list[str] = []
        for step in reversed(self.rounds()):
            fault = self._fault(step, at_most)
            # Process 0 decides for all.
            if not multihost_utils.broadcast_one_to_all(np.array(fault is not None)):
                return Restored(self._read(step, like), tuple(passed_over))
            passed_over.append(f"the checkpoint of round {step} {fault}: moved to {self._aside}")
            if jax.process_index() == 0:
                self._set_aside(step)
            _wait_for_all("set aside")
        return Restored(None, tuple(passed_over))

    def close(self) -> None:
        """Ends orbax's threads, if it has any."""
        if "_checkpointer" in self.__dict__:
            self._checkpointer.close()

    @cached_property
    def _checkpointer(self) -> ocp.Checkpointer:
        # Made when first needed: loading orbax would hold up a run's first round.
        import orbax.checkpoint as ocp

        return ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def _fault(self, step: int, at_most: int | None) -> str | None:
        if at_most is not None and step > at_most:
            return f"is not used, since the metrics reach to round {at_most} only"
        folder = self._folder / str(step)
        try:
            known, found = dict(_read_json(folder / _CHECKSUMS)), _checksums(folder)
        except PermissionError:
            raise  # Not damaged, and well again once it may be read.
        except (OSError, ValueError, TypeError) as error:
            return f"is damaged ({_CHECKSUMS}: {error})"
        if found == known:
            return None
        names = sorted({*found, *known})
        return "is damaged (" + next(n for n in names if found.get(n) != known.get(n)) + ")"

    def _read(self, step: int, like: State) -> State:
        import orbax.checkpoint as ocp

        folder = self._folder / str(step)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _with_raw_key(like))
        there, here = _read_json(folder / _ARRAYS), _shapes(target)
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                remedy = (
                    f"holds {name} as {there.get(name)} where {here.get(name)} is needed: it is of "
                    "another model or version of the code; use another workdir"
                )
                raise InputError("checkpoint", folder, remedy)
        restored: State = self._checkpointer.restore(folder, args=ocp.args.StandardRestore(target))
        return restored._replace(key=jax.random.wrap_key_data(restored.key))

    def _clear(self) -> None:
        for rest in self._folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(rest, ignore_errors=True)

    @property
    def _aside(self) -> Path:
        return self._folder.with_name(f"{self._folder.name}-set-aside")

    def _set_aside(self, step: int) -> None:
        shutil.rmtree(self._aside / str(step), ignore_errors=True)
        self._aside.mkdir(exist_ok=True)
        os.replace(self._folder / str(step), self._aside / str(step))


def _with_raw_key(state: State) -> State:
    return state._replace(key=jax.random.key_data(state.key))


def _on_host(state: State) -> State:
    # orbax would cut every replicated array into a part for each device, by a program of its own.
    if jax.process_count() > 1:
        return state
    host: State = jax.device_get(state)
    return host


def _wait_for_all(event: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(event)


def _shapes(state: State) -> dict[str, str]:
    """Type and shape of every array of a state, by its place in it."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, by its path in it."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS)
    return {str(path.relative_to(folder)): _sha256(path) for path in sorted(paths)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict[str, str]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path) -> dict[str, str]:
    content: dict[str, str] = json.loads(path.read_bytes())
    return content


def _require_space(folder: Path, size: int) -> None:
    # Asked first, since orbax reports a full disk from several threads at once, at great length.
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@contextmanager
def _one_error(folder: Path) -> Iterator[None]:
    """Makes one `OSError` that names the folder of all the ways in which orbax says it."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    before, logger.disabled = logger.disabled, True

    def skip_late_answers(unraisable: Any) -> None:
        # Of TensorStore's threads, after orbax has given up: they may come at any time from then.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = skip_late_answers
    try:
        yield
        sys.unraisablehook = hook
    except Exception as error:
        number: Any = error.errno if isinstance(error, OSError) else None
        # TensorStore has no exception of its own for it.
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            number = int(code[1])
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error
    finally:
        logger.disabled = before
