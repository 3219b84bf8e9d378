"""A token decoder with mixture-of-experts layers, small enough for clients.

y = head(norm(h)), h = embedding, and in every block  h += attention(norm(h)), h += layer(norm(h)),
where the layer is a `MoELayer`, or a plain MLP in blocks without experts (Vaswani et al. 2017;
norms first, as in Xiong et al. 2020; experts in place of MLPs, as in Fedus et al. 2022).

Axes: `B` batch, `S` tokens, `D` features, `A` heads, `F` features of a head, `H` hidden units, `V`
vocabulary, `E` experts.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from flexmoe_jax.errors import InputError
from flexmoe_jax.models.dense import Dense
from flexmoe_jax.models.model import Model, from_linen
from flexmoe_jax.models.moe import MoELayer
from flexmoe_jax.options.models import ModelOptions
from flexmoe_jax.types import Array


class Attention(nn.Module):
    """Causal self-attention.

    Attributes:
      heads: A, a divisor of D.
      rotary: whether queries and keys are rotated by their positions (Su et al. 2021).
    """

    heads: int
    rotary: bool

    @nn.compact
    def __call__(self, x_BxSxD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Lets each token attend to itself and to the tokens before it."""
        features = x_BxSxD.shape[-1]
        joint = Dense(3 * features, use_bias=False, name="qkv")(x_BxSxD)
        q, k, v = (
            part.reshape(*part.shape[:-1], self.heads, -1) for part in jnp.split(joint, 3, axis=-1)
        )
        if self.rotary:
            q, k = rotate(q), rotate(k)
        length = x_BxSxD.shape[1]
        score_BxAxSxS = jnp.einsum("bsaf,btaf->bast", q, k) * q.shape[-1] ** -0.5
        seen = (jnp.arange(length)[:, None] >= jnp.arange(length)[None])[None, None]
        weight = jax.nn.softmax(jnp.where(seen, score_BxAxSxS.astype(jnp.float32), -1e30), axis=-1)
        mixed = jnp.einsum("bast,btaf->bsaf", weight.astype(v.dtype), v)
        return Dense(features, use_bias=False, name="out")(mixed.reshape(x_BxSxD.shape))


def rotate(x_BxSxAxF: Float[Array, "B S A F"]) -> Float[Array, "B S A F"]:
    """Rotates pairs of features by angles that grow with the position (Su et al. 2021, eq. 34)."""
    # NumPy computes the angles: a compiled program would recompute them for every rotated number.
    half = x_BxSxAxF.shape[-1] // 2
    rate_F = 10_000.0 ** (-np.arange(half) / half)
    length = x_BxSxAxF.shape[1]
    # The length is unknown while a model is exported.
    xp: Any = np if isinstance(length, int) else jnp
    angle_SxF = xp.arange(length)[:, None] * rate_F
    sin, cos = (jnp.asarray(f(angle_SxF)[None, :, None], x_BxSxAxF.dtype) for f in (xp.sin, xp.cos))
    return _turn(x_BxSxAxF, cos, sin)


@jax.custom_vjp
def _turn(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates pairs of features that are half a row apart; the backward pass rotates them back."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _turn_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return _turn(x, cos, sin), (cos, sin)


def _turn_backward(angle: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    cos, sin = angle
    return _turn(dy, cos, -sin), None, None


_turn.defvjp(_turn_forward, _turn_backward)


def normalise(norm: nn.Module, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Normalises x (..., D) in single precision, and returns the result in the type of x."""
    normal: Array = norm(x.astype(jnp.float32))
    return normal.astype(x.dtype)


class Block(nn.Module):
    """Attention, then experts or an MLP, each added to the residual stream.

    Attributes:
      heads: A.
      rotary: see `Attention`.
      layer: the layer after the attention, (B, S, D) -> (B, S, D).
    """

    heads: int
    rotary: bool
    layer: nn.Module

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Maps (B, S, D) to the same shape."""
        x = x + Attention(self.heads, self.rotary)(normalise(nn.RMSNorm(), x))
        return x + self.layer(normalise(nn.RMSNorm(), x))


class MLPLayer(nn.Module):
    """Two layers D→H→D.

    Attributes:
      hidden: H.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Maps (..., D) to the same shape."""
        return Dense(x.shape[-1])(nn.relu(Dense(self.hidden)(x)))


class Transformer(nn.Module):
    """A decoder of tokens, which are bytes by default.

    Attributes:
      experts: E of every MoE layer; 0 for a dense model.
      depth: blocks.
      width: D.
      heads: A.
      hidden: H of each expert, and of each MLP in blocks without experts.
      every: every n-th block has experts, counted backwards from the last block.
      top_k: experts per token.
      shared_experts: additional experts beside the E; see `MoELayer`.
      router: see `MoELayer`.
      vocabulary: V.
      positions: `rotary`, or `learnt` for up to `length` tokens.
      length: the largest S if positions are learnt.
    """

    experts: int
    depth: int = 2
    width: int = 96
    heads: int = ModelOptions.heads
    hidden: int = ModelOptions.hidden
    every: int = ModelOptions.moe_every
    top_k: int = ModelOptions.top_k
    shared_experts: int = ModelOptions.shared_experts
    router: bool = ModelOptions.router
    vocabulary: int = 256
    positions: str = ModelOptions.positions
    length: int = 512

    def setup(self) -> None:
        """Creates the parts, and refuses fields that do not fit together.

        Raises:
          InputError: naming the field.
        """
        ModelOptions.check(positions=self.positions)
        if self.width % (2 * self.heads):
            remedy = f"choose a divisor of half of model.width={self.width}"
            raise InputError("model.heads", self.heads, remedy)
        rotary = self.positions == "rotary"
        self.embedding = nn.Embed(self.vocabulary, self.width)
        if not rotary:
            self.position = nn.Embed(self.length, self.width)
        self.blocks = [Block(self.heads, rotary, self._layer(i)) for i in range(self.depth)]
        self.norm = nn.RMSNorm()
        self.head = Dense(self.vocabulary, use_bias=False)

    def _layer(self, block: int) -> nn.Module:
        if self.experts and (self.depth - 1 - block) % self.every == 0:
            return MoELayer(
                self.experts,
                self.hidden,
                self.top_k,
                self.shared_experts,
                context=True,
                with_router=self.router,
                parent=None,
            )
        return MLPLayer(self.hidden, parent=None)

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Returns the features of tokens, before any expert.

        Raises:
          InputError: more tokens than learnt positions.
        """
        x = self.embedding(tokens)
        if self.positions == "rotary":
            return x
        if x.shape[1] > self.length:
            raise InputError("tokens", x.shape[1], f"positions are learnt for up to {self.length}")
        return x + self.position(jnp.arange(x.shape[1])[None])

    def decode(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Returns the logits of the next tokens."""
        for block in self.blocks:
            x = block(x)
        return self.head(normalise(self.norm, x)).astype(jnp.float32)

    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S V"]:
        """Returns the logits (B, S, V) of the next token after each of the tokens (B, S)."""
        return self.decode(self.embed(tokens))


def decoder(module: Transformer) -> Model:
    """Returns the decoder as a `Model` whose trunk is the embedding."""
    return from_linen(module, trunk="embed", head="decode")
