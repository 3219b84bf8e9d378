"""Writes one file per client, with the same examples as in a simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.examples import Examples


def write_clients(examples: Examples, folder: Path) -> list[Path]:
    """Writes each client's examples to a file that `experiments.join` takes.

    Clients are named after their numbers, so that the server numbers them as the simulation does.

    Args:
      examples: the examples and their owners.
      folder: folder for the files; it is created if missing.

    Returns:
      The paths of the files, by the clients' numbers.
    """
    clients = examples.clients
    folder.mkdir(parents=True, exist_ok=True)
    index, sizes = np.asarray(clients.index), np.asarray(clients.size)
    digits = len(str(len(sizes) - 1))
    found = []
    for number, size in enumerate(sizes):
        rows = index[number, :size]
        arrays = {f"train_{name}": np.asarray(x)[rows] for name, x in clients.arrays.items()}
        if examples.group is not None:
            own = examples.group == number
            if clients.owns is not None:
                own = (examples.group >= 0) & np.asarray(clients.owns)[number][examples.group]
            if own.any():
                arrays |= {f"test_{name}": x[own] for name, x in examples.test.items()}
        for name in ("train_labels", "test_labels"):
            if name in arrays:
                arrays[name] = np.asarray(examples.classes)[arrays[name]]
        path = folder / f"client_{number:0{digits}}.npz"
        np.savez(path, **arrays)  # type: ignore[arg-type]
        found.append(path)
    return found
