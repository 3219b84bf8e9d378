"""Compression of the updates that clients send: what travels, and what arrives.

A compressor turns a tree of arrays into the tree that would travel, and that back into what the
server reads. The simulation really runs both, so the loss is the true one, and the bytes are those
of the arrays that travel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Array, Plan, PyTree


class Compressor(NamedTuple):
    """Compression of one array.

    Attributes:
      encode: array of floats -> tree of what travels.
      decode: (what travels, an array of the shape and type wanted) -> array.
      lossless: whether what arrives is what was sent.
    """

    encode: Callable[[Array], PyTree]
    decode: Callable[[PyTree, Array], Array]
    lossless: bool = False

    def round_trip(self, tree: PyTree) -> PyTree:
        """What arrives of a tree."""
        return jax.tree.map(lambda leaf: self.decode(self.encode(leaf), leaf), tree)

    def bytes(self, tree: PyTree) -> int:
        """Bytes that travel for a tree of arrays, or of their shapes."""
        sent = jax.eval_shape(lambda t: jax.tree.map(self.encode, t), tree)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sent))


COMPRESSIONS = ("none", "bfloat16", "int8", "top_k")


def make_compressor(name: str, kept: float = 0.1) -> Compressor:
    """Looks a compressor up by name.

    `none`: as it is. `bfloat16`: rounded to 8 bits of precision. `int8`: 255 even steps between
    minus and plus the array's greatest magnitude, which travels along. `top_k`: the entries of
    greatest magnitude, with their places (Aji and Heafield 2017, arXiv 1704.05021).

    Args:
      name: one of `COMPRESSIONS`.
      kept: part of the entries that `top_k` sends, in (0, 1]; of every array at least one.

    Raises:
      InputError: another name, or a part out of range.
    """
    if not 0 < kept <= 1:
        raise InputError("upload.kept", kept, "choose a number in (0, 1]")

    def encode_int8(x: Array) -> PyTree:
        step = jnp.abs(x).max() / 127
        # A step of 0 is that of an array of zeros.
        return jnp.round(x / jnp.where(step > 0, step, 1.0)).astype(jnp.int8), step

    def decode_int8(sent: PyTree, like: Array) -> Array:
        steps, step = sent
        return (steps * step).astype(like.dtype)

    def encode_top_k(x: Array) -> PyTree:
        flat = x.ravel()
        place = jax.lax.top_k(jnp.abs(flat), max(1, round(kept * flat.size)))[1]
        return flat[place], place.astype(jnp.int32)

    def decode_top_k(sent: PyTree, like: Array) -> Array:
        value, place = sent
        return jnp.zeros(like.size, like.dtype).at[place].set(value).reshape(like.shape)

    compressors = {
        "none": Compressor(lambda x: x, lambda sent, like: sent, lossless=True),
        "bfloat16": Compressor(
            lambda x: x.astype(jnp.bfloat16), lambda sent, like: sent.astype(like.dtype)
        ),
        "int8": Compressor(encode_int8, decode_int8),
        "top_k": Compressor(encode_top_k, decode_top_k),
    }
    if name not in compressors:
        raise InputError("upload.compression", name, f"choose one of {', '.join(COMPRESSIONS)}")
    return compressors[name]


def compress_update(
    compressor: Compressor, shared: PyTree, experts: PyTree, residual: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """What arrives of one client's update, and what is kept back for its next one.

    Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847): what compression
    took from this update is added to the next.

    Args:
      compressor: to use; every expert is compressed by itself.
      shared: Δψ of the client.
      experts: Δθ of its experts, leaves (K, ...).
      residual: kept back so far, a pair of trees like these; () for no error feedback.

    Returns:
      Δψ and Δθ as they arrive, and the new residual.
    """
    if residual:
        shared, experts = jax.tree.map(jnp.add, (shared, experts), residual)
    each = jax.vmap(compressor.round_trip) if experts else compressor.round_trip
    arrived = compressor.round_trip(shared), each(experts)
    kept = jax.tree.map(jnp.subtract, (shared, experts), arrived) if residual else ()
    return *arrived, kept


def init_residual(shared: PyTree, experts: PyTree, clients: int, slots: int) -> PyTree:
    """Nothing kept back yet: zeros like ψ, leaves (C, ...), and like θ, leaves (C, K, ...)."""
    return (
        jax.tree.map(lambda x: jnp.zeros((clients, *x.shape), x.dtype), shared),
        jax.tree.map(lambda x: jnp.zeros((clients, slots, *x.shape[1:]), x.dtype), experts),
    )


def move_residual(residual: PyTree, slots: Array, plan: Plan) -> PyTree:
    """Moves what was kept back of experts to the slots that a plan gives them.

    What was kept back of an expert that a client no longer holds is lost.

    Args:
      residual: as `init_residual` makes it; () for none.
      slots: (C, K) int32 each client's experts before the plan.
      plan: of the round.
    """
    if not residual:
        return ()
    of_shared, of_experts = residual
    before = slots.at[plan.clients].get(mode="clip")  # (P, K)
    same = plan.slots[:, :, None] == before[:, None, :]  # (P, new K, old K)

    def move(kept: Array) -> Array:
        old = kept.at[plan.clients].get(mode="clip")
        new = jnp.einsum("pkj,pj...->pk...", same.astype(kept.dtype), old)
        return kept.at[plan.clients].set(new, mode="drop")

    return of_shared, jax.tree.map(move, of_experts)
