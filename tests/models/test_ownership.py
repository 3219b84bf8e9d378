"""Ownership of parameters in a model of any library: a tree with marks on some of its leaves."""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.errors import InputError
from flexmoe_jax.models import EXPERT, GATE, Marked, Ownership, check_capacity, lay_out, mark_paths


def tree(first: int = 4, second: int = 4) -> dict[str, Any]:
    """Two MoE layers in blocks, and what is around them."""

    def block(experts: int) -> dict[str, Any]:
        return {"attend": jnp.ones((2, 2)), "moe": {"mlp": {"w": jnp.ones((experts, 2))}}}

    blocks: dict[str, Any] = {"one": block(first), "two": block(second)}
    for experts, name in ((first, "one"), (second, "two")):
        blocks[name]["moe"]["router"] = {"w": jnp.ones((experts, 3))}
    return {"embed": jnp.ones(5), "blocks": blocks, "head": {"w": jnp.ones(5)}}


RULES = {"*/moe/mlp/*": EXPERT, "*/router/w": GATE}


def test_marks_by_paths():
    marked = mark_paths(tree(), RULES)
    layout = lay_out(marked)
    assert layout.layers == ("blocks/one/moe", "blocks/two/moe")
    assert dict(zip(layout.paths, layout.owner, strict=True)) == {
        "blocks/one/attend": "shared",
        "blocks/one/moe/mlp/w": "experts",
        "blocks/one/moe/router/w": "gate",
        "blocks/two/attend": "shared",
        "blocks/two/moe/mlp/w": "experts",
        "blocks/two/moe/router/w": "gate",
        "embed": "shared",
        "head/w": "shared",
    }
    parts = layout.split(marked)
    assert parts.experts["blocks/one/moe"] == {
        "mlp": {"w": marked["blocks"]["one"]["moe"]["mlp"]["w"].value}
    }


FLAT = {"w": jnp.ones((4, 2)), "gate": jnp.ones((4, 2))}
DEEP = {"experts": {"mlp": {"in": {"w": jnp.ones((4, 2))}}}, "router": {"gate": jnp.ones((4, 2))}}


@pytest.mark.parametrize(
    ("params", "layers"),
    [
        (FLAT, {"gate": "mixture", "w": "mixture"}),
        ({"one": {"moe": DEEP}, "two": {"moe": FLAT, "bias": jnp.ones(2)}},
         {"one/moe/experts/mlp/in/w": "one/moe", "one/moe/router/gate": "one/moe",
          "two/bias": "", "two/moe/gate": "two/moe", "two/moe/w": "two/moe"}),
        # One gate for the experts of two modules, and a layer of its own within one of them.
        ({"gate": jnp.ones(4), "blocks": [{"w": jnp.ones(4), "moe": FLAT}, {"w": jnp.ones(4)}]},
         {"blocks/0/moe/gate": "blocks/0/moe", "blocks/0/moe/w": "blocks/0/moe",
          "blocks/0/w": "mixture", "blocks/1/w": "mixture", "gate": "mixture"}),
        # Experts without a gate beside those that have one.
        ({"fixed": {"experts": {"w": jnp.ones(4)}}, "moe": FLAT},
         {"fixed/experts/w": "fixed", "moe/gate": "moe", "moe/w": "moe"}),
    ],
)  # fmt: skip
def test_a_layer_is_the_innermost_module_with_experts_and_a_gate(params, layers):
    layout = lay_out(mark_paths(params, {"*w": EXPERT, "*gate": GATE}))
    assert dict(zip(layout.paths, layout.layer, strict=True)) == layers
    assert set(layout.layers) == set(layers.values()) - {""}
    chex.assert_trees_all_equal(layout.merge(layout.split(params)), params)


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ({"*/moe/w": EXPERT}, r"rules=\*/moe/w: matches none of blocks/one/attend, "),
        ({"head": EXPERT}, "rules=head: matches none"),
        ({"head/w": "experts"}, "rules=experts: mark parameters as expert or gate"),
        ({"*/moe/*": EXPERT, "*/w": GATE}, "rules=blocks/one/moe/mlp/w: .* to expert and to gate"),
    ],
)
def test_rules_that_mark_nothing_are_refused(rules, line):
    with pytest.raises(InputError, match=f"^{line}"):
        mark_paths(tree(), rules)


PARTS = ("embed", "head", "head/w", "blocks/one", "blocks/one/attend", "blocks/two/moe", "blocks")


@given(st.sets(st.sampled_from(PARTS), max_size=3), st.booleans())
def test_every_leaf_has_one_owner_and_comes_back(private, shared_gate):
    layout = lay_out(mark_paths(tree(), RULES), Ownership(tuple(private), shared_gate))
    parts = layout.split(tree())
    chex.assert_trees_all_equal(layout.merge(parts), tree())
    for path, owner in zip(layout.paths, layout.owner, strict=True):
        theirs = any(f"{path}/".startswith(f"{start}/") for start in private)
        assert (owner == "private") == theirs
        if "router" in path and not theirs:
            assert owner == ("experts" if shared_gate else "gate")
    least = (
        4
        if any(
            "moe" in p and o == "private" for p, o in zip(layout.paths, layout.owner, strict=True)
        )
        else 1
    )
    check_capacity(layout, [least, 4])
    if least == 4:
        with pytest.raises(InputError, match=r"^model\.private=blocks/.*: .*capacity=4"):
            check_capacity(layout, [3, 4])


@pytest.mark.parametrize(
    ("shapes", "private", "line"),
    [
        (
            mark_paths(tree(), RULES),
            ("blocks/three",),
            "model.private=blocks/three: .*blocks, embed",
        ),
        (mark_paths(tree(), RULES), ("hea",), "model.private=hea: "),
        (mark_paths(tree(4, 3), RULES), (), "model.experts=.*has 4, .*has 3: give every MoE layer"),
        (
            {
                "gate": {"w": Marked(jnp.ones(4), GATE)},
                "mixture": {"gate": {"w": Marked(jnp.ones(4), GATE)}},
            },
            (),
            "model=mixture: names the layer",
        ),
    ],
)
def test_models_that_cannot_be_laid_out_are_refused(shapes, private, line):
    with pytest.raises(InputError, match=f"^{line}"):
        lay_out(shapes, Ownership(private))
