"""Who owns which parameter of a model: marks on parameters, and the split that follows from them.

Axis legend: `E` experts, `K` expert slots, `L` MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from flexmoe_jax.errors import InputError
from flexmoe_jax.types import ROUTER, Params, PyTree

EXPERT, GATE = "expert", "gate"
"""The parts of a MoE layer that a parameter can belong to; its first axis is the expert axis."""


def _static() -> Any:
    field: Any = flax.struct.field  # Flax does not type it.
    return field(pytree_node=False)


@flax.struct.dataclass
class Marked(nn.meta.AxisMetadata[Any]):
    """A parameter of a MoE layer, in a box that Flax removes when the parameter is used.

    Attributes:
      value: the parameter; its first axis is the expert axis.
      part: `EXPERT` or `GATE`.
    """

    value: Any
    part: str = _static()

    def unbox(self) -> Any:
        """Returns the parameter."""
        return self.value

    def replace_boxed(self, val: Any) -> Marked:
        """Returns another value with the same mark."""
        return Marked(val, self.part)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Marked:
        """Refuses `nn.scan` and `nn.vmap`: they would put another axis before the expert axis."""
        raise InputError("model", "nn.scan", "MoE layers must stand one by one: call each layer")

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Marked:
        """Refuses `nn.scan` and `nn.vmap`, as `add_axis` does."""
        raise InputError("model", "nn.scan", "MoE layers must stand one by one: call each layer")


def mark(init: Callable[..., Any], part: str) -> Callable[..., Marked]:
    """Wraps an initialiser: its parameter is marked as a part of each expert, or of the gate."""

    def init_marked(*arguments: Any) -> Marked:
        return Marked(init(*arguments), part)

    return init_marked


def mark_paths(params: PyTree, rules: Mapping[str, str]) -> PyTree:
    """Marks parameters of a model from another library by their paths.

    Args:
      params: any pytree; a path is the names on the way to a leaf, joined by "/".
      rules: shell-style pattern of paths to `EXPERT` or `GATE`: `{"*/moe/w_*": "expert"}`.

    Raises:
      InputError: a rule matches nothing or names another part, or rules mark one parameter as both
        parts.
    """
    paths, leaves, tree = _by_path(params)
    for pattern, part in rules.items():
        if part not in (EXPERT, GATE):
            raise InputError("rules", part, f"mark parameters as {EXPERT} or {GATE}")
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise InputError("rules", pattern, f"matches none of {', '.join(paths)}")

    def boxed(path: str, leaf: Any) -> Any:
        parts = {part for pattern, part in rules.items() if fnmatchcase(path, pattern)}
        if len(parts) > 1:
            remedy = f"rules give it to {EXPERT} and to {GATE}; give narrower patterns"
            raise InputError("rules", path, remedy)
        return Marked(leaf, parts.pop()) if parts else leaf

    return tree.unflatten([boxed(*pair) for pair in zip(paths, leaves, strict=True)])


class Ownership(NamedTuple):
    """Who owns which part of a model's parameters; the default is FLEX-MoE's.

    Attributes:
      private: parts that stay with their client, by the first names of their paths: "head", or
        "backbone/local".
      shared_gate: whether a gate's row for an expert is sent and averaged together with that
        expert, instead of staying with its client.
    """

    private: tuple[str, ...] = ()
    shared_gate: bool = False


FLEX_MOE = Ownership()


class _Absent:
    """Placeholder in a tree for a missing parameter; any computation with it fails."""


class Layout(NamedTuple):
    """The layout of a model's parameters: the owner and the MoE layer of each leaf.

    Attributes:
      experts: E; 1 for a model without MoE layers, which counts as a single expert.
      layers: the L MoE layers, named by the paths of their modules, in the order of the leaves. A
        layer is the innermost module that contains both experts and a gate. If that is the model
        itself, the layer is named `mixture`.
      paths: of all leaves, in the tree's order.
      owner: the owner of each leaf, a field of `Params`.
      layer: the MoE layer of each leaf; empty for none.
      tree: structure of the model's parameters.
    """

    experts: int
    layers: tuple[str, ...]
    paths: tuple[str, ...]
    owner: tuple[str, ...]
    layer: tuple[str, ...]
    tree: Any

    def split(self, params: PyTree) -> Params:
        """Splits the model's parameters, marked or not, by their owners."""
        leaves = self.tree.flatten_up_to(nn.meta.unbox(params))
        parts: dict[str, dict[tuple[str, ...], Any]] = {name: {} for name in Params._fields}
        for path, owner, layer, leaf in zip(
            self.paths, self.owner, self.layer, leaves, strict=True
        ):
            names = tuple(path.split("/"))
            inside = layer and owner in ("experts", "gate")
            parts[owner][(layer, *names[_depth(layer) :]) if inside else names] = leaf
        return Params(**{name: _unflatten(part) for name, part in parts.items()})

    def merge_shared(self, shared: PyTree) -> PyTree:
        """Returns the model's tree with only ψ; computing with any other parameter fails."""
        flat = _flatten(shared)
        return self.tree.unflatten([flat.get(tuple(p.split("/")), _Absent()) for p in self.paths])

    def merge(self, params: Params) -> PyTree:
        """Inverse of `split`; stacks may hold K experts instead of E."""
        flat: dict[tuple[str, ...], Any] = {}
        for name, part in params._asdict().items():
            inside = name in ("experts", "gate")
            for names, leaf in _flatten(part).items():
                path = (*_names(names[0]), *names[1:]) if inside else names
                flat[path] = leaf
        return self.tree.unflatten([flat[tuple(path.split("/"))] for path in self.paths])

    def assembled(self, params: Params) -> Params:
        """Puts all experts in one model; layers that have a router use it as their gate."""
        leaves = dict(zip(self.paths, self.tree.flatten_up_to(self.merge(params)), strict=True))

        def chosen(path: str, layer: str) -> Any:
            inside = path.split("/")[_depth(layer) :]
            twin = "/".join([*_names(layer), ROUTER, *inside[1:]])
            return leaves.get(twin, leaves[path]) if layer and inside[0] == "gate" else leaves[path]

        return self.split(self.tree.unflatten(list(map(chosen, self.paths, self.layer))))


def lay_out(shapes: PyTree, ownership: Ownership = FLEX_MOE) -> Layout:
    """Determines who owns each parameter of a model.

    Args:
      shapes: the model's parameters with their marks, or their shapes.
      ownership: which parts are private, and whether gates are shared.

    Raises:
      InputError: a private part that the model does not have, a layer with the reserved name
        `ROOT`, or MoE layers that differ in the number of their experts.
    """
    marks = _marks(shapes)
    modules = _layers(marks)
    paths, leaves, tree = _by_path(nn.meta.unbox(shapes))
    for start in ownership.private:
        if not any(f"{path}/".startswith(f"{start}/") for path in paths):
            tops = ", ".join(dict.fromkeys(path.split("/")[0] for path in paths))
            remedy = f"the model has no such part; its parts are {tops}"
            raise InputError("model.private", start, remedy)
    if {"", ROOT} <= set(modules.values()):
        remedy = "names the layer whose parts stand at the top; give the other layer another name"
        raise InputError("model", ROOT, remedy)
    counts = {
        path: leaf.shape[0] if leaf.shape else 0
        for path, leaf in zip(paths, leaves, strict=True)
        if path in marks
    }
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{path} has {count}" for path, count in counts.items())
        remedy = "give every MoE layer as many experts, and let all its parameters lead with them"
        raise InputError("model.experts", found, remedy)

    def owner(path: str) -> str:
        if any(f"{path}/".startswith(f"{start}/") for start in ownership.private):
            return "private"
        part = marks.get(path)
        if part is None:
            return "shared"
        return "experts" if part == EXPERT or ownership.shared_gate else "gate"

    layer = tuple((modules[path] or ROOT) if path in marks else "" for path in paths)
    return Layout(
        experts=next(iter(counts.values()), 1),
        layers=tuple(dict.fromkeys(name for name in layer if name)),
        paths=tuple(paths),
        owner=tuple(map(owner, paths)),
        layer=layer,
        tree=tree,
    )


def check_capacity(layout: Layout, capacity: Sequence[int]) -> None:
    """Refuses private parts of a MoE layer if some client cannot hold all experts.

    Raises:
      InputError: naming the private part.
    """
    for path, owner, layer in zip(layout.paths, layout.owner, layout.layer, strict=True):
        if layer and owner == "private" and min(capacity) < layout.experts:
            part, count = path.rpartition("/")[0] or path, layout.experts
            found = (
                f"is of a MoE layer, of which some clients hold {min(capacity)} of {count} experts"
            )
            remedy = f"set clients.capacity={count}; gates alone stay by model.gate=private"
            raise InputError("model.private", part, f"{found}: {remedy}")


ROOT = "mixture"
"""Name of the MoE layer whose parts are at the top of the model's tree."""


def _layers(marks: Mapping[str, str]) -> dict[str, str]:
    """Finds the MoE layer of each marked parameter: `blocks/0/moe` of `blocks/0/moe/experts/w_in`.

    The layer is the innermost module around the parameter that contains both experts and a gate, at
    any depth. If there is none, it is the module around the parameter's own module.
    """
    experts = [path for path, part in marks.items() if part == EXPERT]
    with_experts = {module for expert in experts for module in _around(expert)}
    gates = [_around(path) for path, part in marks.items() if part == GATE]
    layers = {next((m for m in around if m in with_experts), None) for around in gates}

    def layer(path: str) -> str:
        around = _around(path)
        return next((module for module in around if module in layers), around[:2][-1])

    return {path: layer(path) for path in marks}


def _around(path: str) -> list[str]:
    """The modules around a parameter, innermost first: `a/b`, `a` and the model for `a/b/c`."""
    names = path.split("/")
    return ["/".join(names[:depth]) for depth in reversed(range(len(names)))]


def _names(layer: str) -> tuple[str, ...]:
    return () if layer == ROOT else tuple(layer.split("/"))


def _depth(layer: str) -> int:
    return len(_names(layer))


def _marks(params: PyTree) -> dict[str, str]:
    """Returns the part of each marked leaf, by its path."""
    found, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, Marked)
    )
    return {_text(path): leaf.part for path, leaf in found if isinstance(leaf, Marked)}


def _by_path(params: PyTree) -> tuple[list[str], list[Any], Any]:
    found, tree = jax.tree_util.tree_flatten_with_path(params)
    return [_text(path) for path, _ in found], [leaf for _, leaf in found], tree


def _text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# Flax does not type these functions.
_flatten: Any = flatten_dict
_unflatten: Any = unflatten_dict
