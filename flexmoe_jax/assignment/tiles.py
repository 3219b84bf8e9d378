"""Products and systems of equations that are worked out by one thread.

BLAS shares larger ones out to threads that wait for each other by spinning. While any other process
has a processor, such a product of a tenth of a millisecond takes one of the scheduler's slices, a
hundred times as long. So NumPy is given tiles that BLAS leaves to the calling thread, or `einsum`.

Axis legend: `C` clients; `M`, `N` anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or jax.Array

# Side of a product that BLAS does in one thread: OpenBLAS takes more from 2^18 multiplications on.
_TILE = 64


def gram(left: Array, right: Array) -> Array:
    """`leftᵀ right` of a (C, M) and a (C, N) array.

    Arrays of JAX are left to JAX.
    """
    if not isinstance(left, np.ndarray):
        return left.T @ right
    rows, most = left.shape[0], _TILE
    whole = rows - rows % most
    product = np.empty((left.shape[1], right.shape[1]), np.result_type(left, right))
    for i in range(0, left.shape[1], most):
        for j in range(0, right.shape[1], most):
            a, b = left[:, i : i + most], right[:, j : j + most]
            tiles = np.matmul(
                a[:whole].reshape(-1, most, a.shape[1]).swapaxes(1, 2),
                b[:whole].reshape(-1, most, b.shape[1]),
            )
            rest = a[whole:].T @ b[whole:]
            product[i : i + most, j : j + most] = tiles.sum(axis=0) + rest
    return product


def solve_symmetric(matrix: Array, right: Array) -> Array:
    """Solution (N,) of a symmetric, positive definite system (N, N); left to JAX as by `gram`."""
    if not isinstance(matrix, np.ndarray):
        return right.__array_namespace__().linalg.solve(matrix, right)
    return _solve_tiles(matrix, right[:, None])[:, 0]


def _solve_tiles(matrix: Array, right: Array) -> Array:
    """By halves (Schur complement), down to what one tile holds."""
    size = matrix.shape[0]
    if size <= _TILE:
        columns = range(0, right.shape[1], 4 * _TILE)
        parts = [np.linalg.solve(matrix, right[:, j : j + 4 * _TILE]) for j in columns]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    half = size // 2
    upper, lower = matrix[:half], matrix[half:]
    first = _solve_tiles(upper[:, :half], np.concatenate([upper[:, half:], right[:half]], axis=1))
    coupling, partial = first[:, : size - half], first[:, size - half :]
    rest = lower[:, half:] - gram(lower[:, :half].T, coupling)
    second = _solve_tiles(rest, right[half:] - gram(lower[:, :half].T, partial))
    return np.concatenate([partial - gram(coupling.T, second), second])
