"""Matrix products and linear systems that use only one thread.

BLAS splits larger ones over threads that wait for each other by spinning. If another process uses a
core at that time, a product of a tenth of a millisecond takes a full time slice of the scheduler,
a hundred times as long. So NumPy gets tiles that BLAS computes in the calling thread, or `einsum`.

Axis legend: `C` clients; `M`, `N` anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or jax.Array

# Tile size of products that BLAS computes in one thread: from 2^18 multiplications on, OpenBLAS
# uses more threads.
_TILE = 64


def gram(left: Array, right: Array) -> Array:
    """Computes `leftᵀ right` of a (C, M) and a (C, N) array.

    For JAX arrays, JAX computes the product.
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
    """Solves a symmetric, positive definite system (N, N) for (N,); JAX arrays as in `gram`."""
    if not isinstance(matrix, np.ndarray):
        return right.__array_namespace__().linalg.solve(matrix, right)
    return _solve_tiles(matrix, right[:, None])[:, 0]


def _solve_tiles(matrix: Array, right: Array) -> Array:
    """Solves by recursive halving (Schur complement), down to the size of one tile."""
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
