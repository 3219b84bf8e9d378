"""Store a client's own state on its disk; a crash leaves the complete new or old file.

Axis legend: `K` expert slots.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flexmoe_jax.data import digest
from flexmoe_jax.deploy import wire
from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Own, PyTree

FILE = "own.npz"
# File with hashes of the examples that the client joined with.
_EXAMPLES = "examples.txt"


class Kept(NamedTuple):
    """The state that a client keeps between rounds.

    Attributes:
      before: its own state when its latest round began.
      after: its own state if the server accepted its answer; the next message tells whether.
      round: index of its latest round; -1 if there was none.
      experts: the experts that it received for that round, before training.
    """

    before: Own
    after: Own
    round: int
    experts: wire.Experts

    def settled(self, accepted: int) -> Own:
        """Return the client's current own state.

        Args:
          accepted: the latest round in which the server accepted its answer; -1 if there was none.
        """
        return self.after if self.round <= accepted else self.before


def keep(folder: Path, kept: Kept) -> None:
    """Write a client's own state to disk atomically.

    The received experts are not written: after a restart, the server sends them again.

    Raises:
      OSError: if the file cannot be written; the old file then stays.
    """
    arrays = {"round": np.asarray(kept.round)}
    for name, tree in (("before", kept.before), ("after", kept.after)):
        arrays |= {f"{name}.{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}
    content = BytesIO()
    np.savez(content, **{name: _carried(x) for name, x in arrays.items()})  # type: ignore[arg-type]
    _write(folder / FILE, content.getvalue())


def require_same_examples(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Check that a client returns with the examples that it joined with; remember them at first.

    Args:
      folder: folder of the client's own state.
      arrays: its training examples, leaves (N, ...).

    Raises:
      InputError: the examples are others.
      OSError: if the hash cannot be written.
    """
    path = folder / _EXAMPLES
    found = "".join(f"{name} {digest(np.asarray(arrays[name]))}\n" for name in sorted(arrays))
    if not path.exists():
        _write(path, found.encode())
    elif path.read_text(errors="replace") != found:
        remedy = "has joined this federation with other examples: give those, or begin a new run"
        raise InputError("data", "other training examples", remedy)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def recall(folder: Path, first: Kept) -> Kept:
    """Read a client's state from disk; return `first` if there is no file yet.

    Raises:
      InputError: if the file is damaged, or belongs to another model.
    """
    path = folder / FILE
    if not path.exists():
        return first
    try:
        with np.load(path, allow_pickle=False) as found:
            before, after = (_tree(found, name, first.before) for name in ("before", "after"))
            return Kept(before, after, int(found["round"]), {})
    except Exception as error:  # A damaged file can raise many kinds of errors.
        remedy = f"cannot be read ({type(error).__name__}: {error}); move it away to start anew"
        raise InputError("folder", path, remedy) from error


def _tree(found: np.lib.npyio.NpzFile, name: str, like: Own) -> Own:
    leaves, tree = jax.tree.flatten(like)
    structure: Any = tree
    read = [_read(found[f"{name}.{i}"], leaf) for i, leaf in enumerate(leaves)]
    own: Own = structure.unflatten(read)
    return own


def _carried(array: np.ndarray) -> np.ndarray:
    return array.view(wire.CARRIED.get(array.dtype, array.dtype))


def _read(array: np.ndarray, like: PyTree) -> np.ndarray:
    kind = np.dtype(like.dtype)
    if array.dtype != wire.CARRIED.get(kind, kind) or array.shape != like.shape:
        raise ValueError(f"{array.dtype}{array.shape} where {kind}{like.shape} is needed")
    return array.view(kind)
