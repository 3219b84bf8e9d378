"""Compression of the updates that clients send: what travels, and what arrives.

A compressor turns an array into what would travel of it, and that back into what the server reads.
A simulation really runs both, so the loss is the true one, and the bytes are those of the arrays
that travel.

Axis legend: `K` expert slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flexmoe_jax.options.client import UploadOptions
from flexmoe_jax.types import Array, PyTree


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

    def bytes(self, tree: PyTree) -> int:
        """Bytes that travel for a tree of arrays, or of their shapes."""
        sent = jax.eval_shape(lambda t: jax.tree.map(self.encode, t), tree)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sent))


COMPRESSIONS = UploadOptions.rules()["compression"].choices


def make_compressor(name: str, kept: float = UploadOptions.kept) -> Compressor:
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
    UploadOptions.check(compression=name, kept=kept)

    def encode_int8(x: Array) -> PyTree:
        step = jnp.abs(x).max() / 127
        # A step of 0 is that of an array of zeros.
        return jnp.round(x / jnp.where(step > 0, step, 1.0)).astype(jnp.int8), step

    def decode_int8(sent: PyTree, like: Array) -> Array:
        steps, step = sent
        return (steps.astype(step.dtype) * step).astype(like.dtype)

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
    return compressors[name]


class Codec(NamedTuple):
    """How updates travel.

    Attributes:
      compressor: of the updates.
      error_feedback: see `UploadOptions`.
    """

    compressor: Compressor = make_compressor(UploadOptions.compression)
    error_feedback: bool = UploadOptions.error_feedback

    @property
    def keeps(self) -> bool:
        """Whether clients keep back what compression takes from their updates."""
        return self.error_feedback and not self.compressor.lossless


def encode(codec: Codec, shared: PyTree, experts: PyTree) -> tuple[PyTree, PyTree]:
    """What travels of Δψ and Δθ, leaves (K, ...); every expert is compressed by itself."""
    send = codec.compressor.encode
    return jax.tree.map(send, shared), jax.tree.map(jax.vmap(send), experts)


def decode(
    codec: Codec, sent: tuple[PyTree, PyTree], like: tuple[PyTree, PyTree]
) -> tuple[PyTree, PyTree]:
    """What arrives of what travelled.

    Args:
      codec: that encoded it.
      sent: from `encode`.
      like: trees with the shapes and types of Δψ and Δθ, leaves (...) and (K, ...).
    """
    read = codec.compressor.decode

    def each(function: Callable[..., Array], tree: PyTree, parts: PyTree) -> PyTree:
        leaves, found = jax.tree.flatten(tree)
        structure: Any = found
        sent = structure.flatten_up_to(parts)
        return structure.unflatten(map(function, sent, leaves))

    return each(read, like[0], sent[0]), each(jax.vmap(read), like[1], sent[1])


def init_residual(codec: Codec, shared: PyTree, experts: PyTree, slots: int) -> PyTree:
    """Nothing kept back yet by a client: zeros like ψ, and like θ, leaves (K, ...); or ()."""
    if not codec.keeps:
        return ()
    return (
        jax.tree.map(jnp.zeros_like, shared),
        jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), experts),
    )
