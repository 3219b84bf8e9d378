"""What checks the shapes in annotations while tests run: these, and no other types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def only_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the annotations of a function that say a shape.

    Others are mypy's: at run time a number may be NumPy's, or traced.
    """
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _is_shape(hint)}
    return beartype(function)


def _is_shape(hint: Any) -> bool:
    if isinstance(hint, str):
        return any(f"{kind}[" in hint for kind in ("Bool", "Float", "Int", "Num"))
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(
        _is_shape(part) for part in get_args(hint)
    )
