"""Compression of the updates that clients send.

A compressor encodes an array for sending, and decodes it to the array that the server reads. A
simulation runs both functions, so its compression error is the real one, and it counts the bytes of
the encoded arrays.

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
      encode: array of floats -> encoded tree, as it is sent.
      decode: (encoded tree, an array of the target shape and type) -> array.
      lossless: whether decoding restores the array exactly.
    """

    encode: Callable[[Array], PyTree]
    decode: Callable[[PyTree, Array], Array]
    lossless: bool = False

    def bytes(self, tree: PyTree) -> int:
        """Returns the encoded size in bytes of a tree of arrays, or of their shapes."""
        sent = jax.eval_shape(lambda t: jax.tree.map(self.encode, t), tree)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sent))


COMPRESSIONS = UploadOptions.rules()["compression"].choices


def make_compressor(name: str, kept: float = UploadOptions.kept) -> Compressor:
    """Makes a compressor by name.

    `none`: no compression. `bfloat16`: rounded to 8 bits of precision. `int8`: 255 evenly spaced
    values between minus and plus the array's greatest magnitude; the step is sent too. `top_k`: the
    entries of greatest magnitude and their positions (Aji and Heafield 2017, arXiv 1704.05021).

    Args:
      name: one of `COMPRESSIONS`.
      kept: fraction of the entries that `top_k` sends, in (0, 1]; at least one entry per array.

    Raises:
      InputError: the name is unknown, or the fraction is out of range.
    """
    UploadOptions.check(compression=name, kept=kept)

    def encode_int8(x: Array) -> PyTree:
        step = jnp.abs(x).max() / 127
        # The step is 0 for an array of zeros.
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
    """How updates are compressed.

    Attributes:
      compressor: the compressor of the updates.
      error_feedback: see `UploadOptions`.
    """

    compressor: Compressor = make_compressor(UploadOptions.compression)
    error_feedback: bool = UploadOptions.error_feedback

    @property
    def keeps(self) -> bool:
        """Whether clients keep the compression error of their updates, for error feedback."""
        return self.error_feedback and not self.compressor.lossless


def encode(codec: Codec, shared: PyTree, experts: PyTree) -> tuple[PyTree, PyTree]:
    """Encodes Δψ, and Δθ with leaves (K, ...); every expert is compressed separately."""
    send = codec.compressor.encode
    return jax.tree.map(send, shared), jax.tree.map(jax.vmap(send), experts)


def decode(
    codec: Codec, sent: tuple[PyTree, PyTree], like: tuple[PyTree, PyTree]
) -> tuple[PyTree, PyTree]:
    """Decodes updates.

    Args:
      codec: the codec that encoded them.
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
    """Returns a client's initial residual: zeros like ψ, and like θ with leaves (K, ...); or ()."""
    if not codec.keeps:
        return ()
    return (
        jax.tree.map(jnp.zeros_like, shared),
        jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), experts),
    )
