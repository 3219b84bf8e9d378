"""Products in bfloat16: in every shipped model, forward and back, and nowhere else."""

from __future__ import annotations

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmoe_jax import models
from flexmoe_jax.errors import InputError
from flexmoe_jax.models import Model, MoEClassifier, PersonalMixture, Transformer

IMAGES = jax.random.normal(jax.random.key(1), (11, 8, 8, 3))
TOKENS = jax.random.randint(jax.random.key(1), (11, 7), 0, 256)
GATE = 11 * 7 * 16 * 4
"""Multiplications of the largest gate below: units, features, experts."""

BACKBONES = {
    "mlp": models.make_backbone("mlp", widths=(32, 16)),
    "convnet": models.make_backbone("convnet", widths=(8, 16), groups=4),
    "cnn": models.make_backbone("cnn", widths=(8, 16)),
    "direct": models.make_backbone("cnn", widths=(8, 16), conv=models.conv_direct),
    "winograd": models.make_backbone("cnn", widths=(8, 16), conv=models.conv_winograd),
    "lax": models.make_backbone("cnn", widths=(8, 16), conv=models.conv_lax),
    "resnet": models.make_backbone("resnet", depth=8, widths=(4,)),
    "two": PersonalMixture(models.MLP((16,)), models.MLP((16,))),
}
MODELS: dict[str, tuple[Model, jax.Array]] = {
    name: (models.classifier(MoEClassifier(backbone, 10, 4, hidden=32, top_k=4)), IMAGES)
    for name, backbone in BACKBONES.items()
}
MODELS |= {
    f"transformer, {positions}": (
        models.decoder(Transformer(4, 1, 16, heads=2, hidden=32, top_k=4, positions=positions)),
        TOKENS,
    )
    for positions in ("rotary",)
}


def products(program: str) -> list[tuple[str, float]]:
    """Type and multiplications of each product in the text of a program."""
    found = re.findall(r"stablehlo\.(?:dot_general|convolution).*: \((.*)\) -> (\S+)", program)
    tensors = [re.findall(r"tensor<([\dx]*)x(\w+)>", " ".join(operands)) for operands in found]
    # Of (M, K) and (K, N) to (M, N) it is the square root of the product of all three sizes.
    return [
        (each[0][1], math.prod(math.sqrt(math.prod(map(int, s.split("x")))) for s, _ in each))
        for each in tensors
        if len(each) == 3
    ]


def slope(model: Model, inputs: jax.Array):
    """Parameters, and a function of them, lowered: the gradient of a loss."""
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), inputs))

    def loss(params):
        outputs, _ = model.apply(params, inputs, {})
        assert outputs.dtype == jnp.float32
        labels = jnp.arange(outputs[..., 0].size).reshape(outputs.shape[:-1]) % outputs.shape[-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[..., None], -1).mean()

    return params, jax.jit(jax.grad(loss)).lower(params)


@pytest.mark.parametrize("name", MODELS)
def test_products_are_in_bfloat16_and_gradients_nearly_the_same(name):
    model, inputs = MODELS[name]
    params, exact = slope(model, inputs)
    halved, rounded = slope(model.computed_in("bfloat16"), inputs)
    assert jax.tree.map(np.array_equal, params, halved)
    found = products(rounded.as_text())
    assert {kind for kind, work in found if work > 1.01 * GATE} == {"bf16"}
    assert {kind for kind, _ in products(exact.as_text())} == {"f32"}
    gradients = exact.compile()(params), rounded.compile()(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    one, other = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in gradients)
    assert np.vdot(one, other) > 0.98 * np.linalg.norm(one) * np.linalg.norm(other)
    assert not np.array_equal(one, other)


def test_a_model_of_ones_own_is_left_as_it_is():
    model = models.from_functions(
        lambda key, x: {"w": jnp.ones((4, 3))}, lambda p, x, held: (x @ p["w"][0], {}), {}
    )
    x = jnp.full((2, 3), 1 + 2.0**-12)
    outputs, _ = model.apply(model.init(jax.random.key(0), x), x, {})
    assert outputs.tolist() == [3 + 3 * 2.0**-12] * 2


def test_another_type_is_refused():
    line = r"^model\.dtype=float16: did you mean bfloat16\? choose one of float32, bfloat16$"
    with pytest.raises(InputError, match=line):
        MODELS["mlp"][0].computed_in("float16")
