"""What a client owns, on its own disk: there whole, or as it was before, whatever ends the client.

Axis legend: `K` expert slots.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flexmoe_jax.deploy import wire
from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Own, PyTree

FILE = "own.npz"


class Kept(NamedTuple):
    """What a client keeps from round to round.

    Attributes:
      before: what it owned when it began its latest round.
      after: what it owns if its answer was accepted, which it learns with the next message.
      round: of that answer; -1 for none.
      experts: those that it was sent for that round, as they were sent.
    """

    before: Own
    after: Own
    round: int
    experts: wire.Experts

    def settled(self, accepted: int) -> Own:
        """What the client owns now.

        Args:
          accepted: the latest round of which the server accepted the client's answer; -1 for none.
        """
        return self.after if self.round <= accepted else self.before


def keep(folder: Path, kept: Kept) -> None:
    """Writes what a client owns, in one step.

    Not the experts that it was sent: whoever starts anew is sent them again.

    Raises:
      OSError: it cannot be written; what was there stays.
    """
    arrays = {"round": np.asarray(kept.round)}
    for name, tree in (("before", kept.before), ("after", kept.after)):
        arrays |= {f"{name}.{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}
    content = BytesIO()
    np.savez(content, **{name: _carried(x) for name, x in arrays.items()})  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{FILE}.new"
    with temporary.open("wb") as file:
        file.write(content.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / FILE)


def recall(folder: Path, first: Kept) -> Kept:
    """Reads what a client kept; `first` where it kept nothing yet.

    Raises:
      InputError: what is there is damaged, or of another model.
    """
    path = folder / FILE
    if not path.exists():
        return first
    try:
        with np.load(path, allow_pickle=False) as found:
            before, after = (_tree(found, name, first.before) for name in ("before", "after"))
            return Kept(before, after, int(found["round"]), {})
    except Exception as error:  # Damage shows as any of a dozen errors.
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
