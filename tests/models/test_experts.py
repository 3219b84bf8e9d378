"""Two ways to compute experts: the same numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.models import expert_mlp, route
from flexmoe_jax.models import experts as module

D, H = 5, 7


def draw(seed: int, batch: int, experts: int, top_k: int) -> tuple[Any, Any, Any]:
    """Draws a stack, examples and combine weights; not all experts are held, nor used."""
    rng = np.random.default_rng(seed)
    shapes = {"w_in": (D, H), "b_in": (H,), "w_out": (H, D), "b_out": (D,)}
    stack = {
        name: jnp.asarray(rng.normal(size=(experts, *shape)), jnp.float32)
        for name, shape in shapes.items()
    }
    held = jnp.asarray(rng.random(experts) < 0.7)
    logits = jnp.asarray(3 * rng.normal(size=(batch, experts)), jnp.float32)
    combine = route(logits, held, top_k).combine
    return stack, jnp.asarray(rng.normal(size=(batch, D)), jnp.float32), combine


def by_hand(stack: Any, x: np.ndarray, combine: np.ndarray) -> np.ndarray:
    """Computes the sum example by example and expert by expert, in double precision."""
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in stack.items()}
    out = np.zeros(x.shape)
    for b, e in np.argwhere(np.asarray(combine) > 0):
        hidden = np.maximum(np.asarray(x[b], np.float64) @ wide["w_in"][e] + wide["b_in"][e], 0)
        out[b] += float(combine[b, e]) * (hidden @ wide["w_out"][e] + wide["b_out"][e])
    return out


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([1, 31, 32, 97]),
)
@settings(max_examples=6)
def test_experts_on_their_own_examples_are_the_experts(
    seed: int, experts: int, top_k: int, batch: int
) -> None:
    top_k = min(top_k, experts)
    stack, x, combine = draw(seed, batch, experts, top_k)
    aim = jnp.asarray(np.random.default_rng(seed).normal(size=(batch, D)), jnp.float32)

    def of(form: Any, *numbers: Any) -> Any:
        return jax.value_and_grad(lambda *n: (aim * form(*n)).sum(), (0, 1, 2))(*numbers)

    own = partial(module._own_rows, top_k=top_k)
    expected = by_hand(stack, x, combine)
    np.testing.assert_allclose(jax.jit(own)(stack, x, combine), expected, rtol=2e-5, atol=2e-5)
    used = combine > 0
    found, wanted = (
        jax.jit(partial(of, form))(stack, x, combine) for form in (own, module._all_pairs)
    )
    # The weights that are 0 have no gradient; in the other form they have.
    slopes = *wanted[1][:2], jnp.where(used, wanted[1][2], 0.0)
    for given_leaf, leaf in zip(
        jax.tree.leaves(found), jax.tree.leaves((wanted[0], slopes)), strict=True
    ):
        scale = 1e-4 * float(jnp.abs(leaf).max()) + 1e-5
        np.testing.assert_allclose(given_leaf, leaf, rtol=1e-4, atol=scale)


def test_under_vmap_they_are_the_same() -> None:
    stacks, xs, weights = (
        jax.tree.map(lambda *leaf: jnp.stack(leaf), *of)
        for of in zip(*(draw(seed, 97, 6, 2) for seed in range(3)), strict=True)
    )

    def loss(stack: Any, x: Any, combine: Any) -> Any:
        return (module._own_rows(stack, x, combine, 2) ** 2).sum()

    slope = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1, 2))))(stacks, xs, weights)
    # Of clients one after the other.
    alone = jax.jit(partial(jax.lax.map, lambda args: jax.value_and_grad(loss, (0, 1, 2))(*args)))
    for a, b in zip(
        jax.tree.leaves(slope), jax.tree.leaves(alone((stacks, xs, weights))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()) + 1e-5)
    # Several stacks on the same examples, as when clients are compared.
    shared = jax.vmap(loss, (0, None, None))(stacks, xs[0], weights[0])
    apart = jax.lax.map(lambda stack: loss(stack, xs[0], weights[0]), stacks)
    np.testing.assert_allclose(shared, apart, rtol=1e-4)


@pytest.mark.parametrize(
    ("batch", "experts", "top_k", "own"),
    [(512, 2, 1, True), (16, 8, 1, False), (512, 2, 2, False), (64, 4, 1, True)],
)
def test_the_form_follows_from_the_sizes(batch: int, experts: int, top_k: int, own: bool) -> None:
    stack, x, combine = draw(0, batch, experts, top_k)

    def loops(*args: Any) -> bool:
        return "while" in str(
            jax.make_jaxpr(lambda *given: expert_mlp(*given, *args))(stack, x, combine)
        )

    assert loops(top_k) == own
    # Without the number of experts that an example uses always all.
    assert not loops()
