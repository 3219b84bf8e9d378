"""Compute how many experts fit into a device's memory.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexmoe_jax.errors import InputError


def experts_in_memory(
    memory: np.ndarray,
    *,
    shared_bytes: float,
    expert_bytes: float,
    optimizer_copies: float,
    activation_bytes: float,
    experts: int,
    tiers: Sequence[str] | np.ndarray | None = None,
) -> np.ndarray:
    """Compute the capacity k_c: the largest number of experts that each client can train.

    Training stores every parameter, its gradient and its optimiser state, and the activations of
    one batch for the backward pass:

        (2 + copies) · (shared + k · expert) + activations ≤ memory

    The capacity is the largest whole number k that satisfies this, at most E. Activations do not
    grow with k: top-k routing sends an example to the same number of experts, however many experts
    the client has.

    Args:
      memory: (C,) bytes that training may use; `inf` for no limit.
      shared_bytes: bytes of the parameters that every client trains (ψ, and its gate).
      expert_bytes: bytes of one expert's parameters.
      optimizer_copies: numbers of optimiser state for each parameter: SGD 0, momentum 1, Adam 2.
      activation_bytes: bytes stored for the backward pass of one batch.
      experts: E.
      tiers: (C,) names of the clients' devices, for the error message.

    Returns:
      (C,) int64 from 1 to E.

    Raises:
      InputError: if a client is too small for one expert (the message gives the bytes that it would
        need), or a size is not valid.
    """
    if not expert_bytes > 0:
        raise InputError("expert_bytes", expert_bytes, "give the bytes of one expert, above 0")
    if experts < 1:
        raise InputError("model.experts", experts, "give at least 1")
    memory = np.asarray(memory, np.float64)
    per_byte = 2 + optimizer_copies
    fixed = per_byte * shared_bytes + activation_bytes
    fit = np.floor((memory - fixed) / (per_byte * expert_bytes))
    too_small = np.flatnonzero(~(fit >= 1))
    if too_small.size:
        client = int(too_small[0])
        device = f"client {client}" if tiers is None else f"client {client} ({tiers[client]})"
        others = f", as {too_small.size} clients in all" if too_small.size > 1 else ""
        raise InputError(
            "edge.memory",
            f"{memory[client]:.0f}",
            f"{device}{others}, needs {fixed + per_byte * expert_bytes:.0f} bytes to train one "
            "expert; give it more memory, or shrink the model or local.batch_size",
        )
    capacity: np.ndarray = np.minimum(fit, experts).astype(np.int64)
    return capacity
