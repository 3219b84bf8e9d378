"""Plots of assignments and loads, with Matplotlib (extra `plot`).

Each function draws on the given axes, or on the current ones, and returns the axes.

Axis legend: `C` clients, `E` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flexmoe_jax.errors import InputError, require_package

__all__ = [
    "holders",
    "loads",
]

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE = "#0072b2", "#d55e00"


def holders(
    assignment: npt.ArrayLike, groups: Sequence[object] | None = None, axes: Any = None
) -> Axes:
    """Plots which client holds which experts.

    Args:
      assignment: (C, E) bool, as `Solution.assignment`; numbers, as rounds held, show as shades.
      groups: (C,) the kind of each client. Clients of a kind are drawn side by side, so that
        specialised experts show as blocks. None to keep the order of the clients.
      axes: Matplotlib axes to draw on; None for the current ones.

    Raises:
      InputError: the array is not (C, E), `groups` is of another length, or Matplotlib is missing.
    """
    table = _table("assignment", assignment, 2)
    kinds = None if groups is None else [str(group) for group in groups]
    if kinds is not None and len(kinds) != len(table):
        raise InputError("groups", f"{len(kinds)} names", f"give one for each of {len(table)}")
    order = np.arange(len(table)) if kinds is None else np.argsort(kinds, kind="stable")
    axes = _axes(axes)
    axes.imshow(table[order].T, aspect="auto", cmap="Blues", interpolation="nearest", vmin=0)
    axes.set(xlabel="client", ylabel="expert", yticks=range(table.shape[1]))
    axes.set_yticks(np.arange(table.shape[1] + 1) - 0.5, minor=True)
    axes.grid(which="minor", axis="y", color="white")
    axes.tick_params(which="minor", left=False)
    if kinds is None:
        return axes
    names, begins = np.unique(np.asarray(kinds)[order], return_index=True)
    ends = [*begins[1:], len(table)]
    axes.set_xticks([(a + b - 1) / 2 for a, b in zip(begins, ends, strict=True)], names)
    axes.tick_params(axis="x", length=0, rotation=0 if sum(map(len, names)) < 40 else 40)
    for begin in begins[1:]:
        axes.axvline(begin - 0.5, color="#888", linewidth=0.8)
    axes.set_xlabel("client, by kind")
    return axes


def loads(
    load: npt.ArrayLike,
    load_min: npt.ArrayLike | None = None,
    load_max: npt.ArrayLike | None = None,
    axes: Any = None,
) -> Axes:
    """Plots the load on each expert and its bounds.

    Args:
      load: (E,), as `Solution.load`.
      load_min: () or (E,) lower bound; None for no bound.
      load_max: () or (E,) upper bound; None for no bound.
      axes: Matplotlib axes to draw on; None for the current ones.

    Raises:
      InputError: the array is not (E,), or Matplotlib is missing.
    """
    given = _table("load", load, 1)
    places = np.arange(len(given))
    axes = _axes(axes)
    axes.bar(places, given, color=_BLUE, width=0.7)
    for bound in (load_min, load_max):
        if bound is not None:
            level = np.broadcast_to(np.asarray(bound, float), given.shape)
            axes.hlines(level, places - 0.45, places + 0.45, color=_ORANGE, linewidth=2)
    axes.set(xlabel="expert", ylabel="load", xticks=places, ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _table(field: str, given: npt.ArrayLike, axes: int) -> np.ndarray:
    table = np.asarray(given, float)
    if table.ndim != axes or not table.size:
        shape = "(C, E)" if axes == 2 else "(E,)"
        raise InputError(field, f"shape {table.shape}", f"give an array {shape}")
    return table


def _axes(given: Any) -> Any:
    require_package("matplotlib", "plot", "draws the pictures")
    if given is not None:
        return given
    from matplotlib import pyplot

    return pyplot.gca()
