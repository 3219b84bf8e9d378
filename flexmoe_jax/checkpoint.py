"""Checkpoints of a federation's state: written by orbax, and verified before they are read.

A checkpoint is a folder named after its round. The folder gets this name in one atomic step, after
orbax's files and a checksum of each file are on disk. A process that is killed at any moment
therefore leaves the earlier checkpoints intact. orbax itself does not detect a changed bit in an
array; the checksums do.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flexmoe_jax.errors import InputError, printable, require_package
from flexmoe_jax.reading import UnreadableError, open_regular, read_json
from flexmoe_jax.types import State

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_CHECKSUMS, _ARRAYS = "checksums.json", "arrays.json"
_UNFINISHED = "unfinished"
# Attempts to delete a file that cannot be deleted yet, and seconds between two attempts.
_TRIES, _MOMENT = 40, 0.05
# Round numbers as this module writes them: no `007`, and no digits of other scripts.
_ROUND = re.compile(r"0|[1-9][0-9]{0,8}")


class Restored(NamedTuple):
    """The result of reading a run's checkpoints.

    Attributes:
      state: the state from the newest usable checkpoint, or None.
      passed_over: one line about each newer checkpoint that was not used.
    """

    state: State | None
    passed_over: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run, one for each saved round; only the newest are kept.

    In a run with several processes, every process calls every method, and all share the folder.

    Args:
      folder: folder of the checkpoints; created if it does not exist.
      keep: how many checkpoints to keep, at least 1.

    Raises:
      InputError: Orbax is not installed, or `keep` is no number of at least 1.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int) -> None:
        """Stores the arguments; reads and writes nothing."""
        require_package("orbax", "checkpoint", "checkpoints are written by Orbax")
        if keep < 1:
            raise InputError("keep", keep, "give a number of at least 1")
        self._folder, self._keep = Path(folder).resolve(), keep

    def rounds(self) -> list[int]:
        """Returns the saved rounds in ascending order; other files in the folder are ignored."""
        if not self._folder.is_dir():
            return []
        named = (path for path in self._folder.iterdir() if _ROUND.fullmatch(path.name))
        return sorted(int(path.name) for path in named if path.is_dir())

    def save(self, state: State) -> None:
        """Saves the state under its number of completed rounds, and deletes old checkpoints.

        Raises:
          OSError: the state could not be written; the earlier checkpoints are unchanged.
        """
        import orbax.checkpoint as ocp

        host = _on_host(_with_raw_key(state))
        unfinished = self._folder / _UNFINISHED
        try:
            with _one_error(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    self._clear()  # An earlier process that was killed may have left files.
                    _require_space(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(host)))
                _wait_for_all("ready to save")
                self._checkpointer.save(unfinished, args=ocp.args.StandardSave(host))
                if jax.process_index() == 0:
                    _write_json(unfinished / _ARRAYS, _shapes(host))
                    _write_json(unfinished / _CHECKSUMS, _checksums(unfinished))
                    if os.path.lexists(self._folder / str(int(state.server.round))):
                        self._set_aside(int(state.server.round))
                    os.replace(unfinished, self._folder / str(int(state.server.round)))
                    self._delete_old()
        except OSError:
            self._clear()
            raise
        _wait_for_all("saved")

    def restore(self, like: State, at_most: int | None = None) -> Restored:
        """Reads the newest undamaged checkpoint of a round up to `at_most`.

        If all undamaged checkpoints are newer than `at_most`, it reads the newest one. All
        checkpoints newer than the one read, damaged or not, are moved to the folder
        `FOLDER-set-aside`, so that the run can save these rounds again.

        Args:
          like: gives the structure, shapes, types and devices of the arrays.
          at_most: the newest round to read; None for no limit.

        Raises:
          InputError: a checkpoint is undamaged, but of another model or version of the code.
        """
        faults: dict[int, str | None] = {}
        for step in reversed(self.rounds()):
            faults[step] = self._fault(step)
            if faults[step] is None and (at_most is None or step <= at_most):
                break
        # If all undamaged checkpoints are newer than `at_most`, take the newest: that is better
        # than to start the run again.
        whole = [step for step, fault in faults.items() if fault is None]
        wanted = [step for step in whole if at_most is None or step <= at_most] or whole[:1]
        # Process 0 decides for all.
        chosen = int(multihost_utils.broadcast_one_to_all(np.int32(wanted[0] if wanted else -1)))
        passed_over: list[str] = []
        for step in (step for step in faults if step > chosen):
            fault = faults[step] or f"is not used, since the metrics reach to round {at_most} only"
            aside = self._set_aside(step) if jax.process_index() == 0 else self._aside
            passed_over.append(f"the checkpoint of round {step} {fault}: moved to {aside}")
        _wait_for_all("set aside")
        state = self._read(chosen, like) if chosen >= 0 else None
        return Restored(state, tuple(passed_over))

    def newest(self, like: State) -> Restored:
        """Reads the newest undamaged checkpoint, and moves no checkpoint.

        Args:
          like: gives the structure, shapes, types and devices of the arrays.

        Raises:
          InputError: the checkpoint is of another model or another version of the code.
        """
        passed_over: list[str] = []
        for step in reversed(self.rounds()):
            fault = self._fault(step)
            if fault is None:
                return Restored(self._read(step, like), tuple(passed_over))
            passed_over.append(f"the checkpoint of round {step} {fault}")
        return Restored(None, tuple(passed_over))

    def close(self) -> None:
        """Stops orbax's threads, if orbax was used."""
        if "_checkpointer" in self.__dict__:
            self._checkpointer.close()

    @cached_property
    def _checkpointer(self) -> ocp.Checkpointer:
        # Created on first use: importing orbax would delay a run's first round.
        import orbax.checkpoint as ocp

        return ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def _fault(self, step: int) -> str | None:
        folder = self._folder / str(step)
        try:
            known = read_json(folder / _CHECKSUMS)
            if _ARRAYS not in known:
                raise UnreadableError(f"says nothing of {_ARRAYS}")
            names = {str(path.relative_to(folder)) for path in _files(folder)}
            lost = sorted(known.keys() - names)
            # Unknown files are not damage: a file system or a user may have put them there.
            wrong = lost or [n for n in sorted(known) if _sha256(folder / n) != known[n]]
        except PermissionError:
            raise  # The checkpoint is not damaged: it is usable again once it may be read.
        except (OSError, UnreadableError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            return f"is damaged ({_CHECKSUMS}: {printable(said)})"
        return f"is damaged ({printable(wrong[0])})" if wrong else None

    def _read(self, step: int, like: State) -> State:
        import orbax.checkpoint as ocp

        folder = self._folder / str(step)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _with_raw_key(like))
        there, here = self._arrays(folder), _shapes(target)
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                remedy = (
                    f"holds {name} as {there.get(name)} where {here.get(name)} is needed: it is of "
                    "another model or version of the code; use another workdir"
                )
                raise InputError("checkpoint", folder, remedy)
        restored: State = self._checkpointer.restore(folder, args=ocp.args.StandardRestore(target))
        kind = jax.random.key_impl(like.server.key)
        key = jax.random.wrap_key_data(restored.server.key, impl=kind)
        return restored._replace(server=restored.server._replace(key=key))

    def _arrays(self, folder: Path) -> dict[str, Any]:
        try:
            return read_json(folder / _ARRAYS)
        except (FileNotFoundError, UnreadableError) as error:
            remedy = f"its {_ARRAYS} cannot be read ({error}); move the checkpoint away"
            raise InputError("checkpoint", folder, remedy) from error

    def _delete_old(self) -> None:
        """Deletes all but the newest `keep` checkpoints that this class saved."""
        folders = [self._folder / str(step) for step in self.rounds()]
        ours = [path for path in folders if (path / _CHECKSUMS).is_file() and not path.is_symlink()]
        for old in ours[: -self._keep]:
            shutil.rmtree(old)

    def _clear(self) -> None:
        """Deletes unfinished checkpoints; retries, since Orbax's threads may still write."""
        names = (_UNFINISHED, f"{_UNFINISHED}.orbax-*")
        for _ in range(_TRIES):
            left = [path for name in names for path in self._folder.glob(name)]
            for rest in left:
                shutil.rmtree(rest, ignore_errors=True)
            if not any(rest.exists() for rest in left):
                return
            time.sleep(_MOMENT)

    @property
    def _aside(self) -> Path:
        return self._folder.with_name(f"{self._folder.name}-set-aside")

    def _set_aside(self, step: int) -> Path:
        """Moves the file or folder of a round aside, without overwriting an existing one."""
        names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(2)))
        aside = next(p for name in names if not os.path.lexists(p := self._aside / name))
        self._aside.mkdir(exist_ok=True)
        os.replace(self._folder / str(step), aside)
        return aside


def _with_raw_key(state: State) -> State:
    key = jax.random.key_data(state.server.key)
    return state._replace(server=state.server._replace(key=key))


def _on_host(state: State) -> State:
    # orbax would split every replicated array into one part per device, with a compiled program.
    if jax.process_count() > 1:
        return state
    host: State = jax.device_get(state)
    return host


def _wait_for_all(event: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(event)


def _shapes(state: State) -> dict[str, str]:
    """Returns the type and shape of every array of a state, by its path in the state."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file of a checkpoint, by its path in the checkpoint."""
    return {str(path.relative_to(folder)): _sha256(path) for path in sorted(_files(folder))}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS)


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict[str, str]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _require_space(folder: Path, size: int) -> None:
    # Checked first, because orbax reports a full disk from several threads in very long messages.
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@contextmanager
def _one_error(folder: Path) -> Iterator[None]:
    """Turns every form in which orbax reports an OS error into one `OSError` with the folder."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    before, logger.disabled = logger.disabled, True

    def skip_late_answers(unraisable: Any) -> None:
        # TensorStore's threads raise it after orbax has failed, at any later time.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = skip_late_answers
    try:
        yield
        sys.unraisablehook = hook
    except Exception as error:
        number: Any = error.errno if isinstance(error, OSError) else None
        # TensorStore has no exception type for OS errors: the message holds the number.
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            number = int(code[1])
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error
    finally:
        logger.disabled = before
