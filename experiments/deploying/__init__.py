"""Real clients: Flower's processes, and what the launchers `serve` and `join` have in common."""

from __future__ import annotations

from importlib.util import find_spec

from flexmoe_jax.errors import InputError


def require_flower() -> None:
    """Refuses to go on without Flower.

    Raises:
      InputError: naming the extra that brings it.
    """
    if find_spec("flwr") is None:
        remedy = "real clients need Flower; install the extra: pip install 'flexmoe_jax[deploy]'"
        raise InputError("flwr", "not installed", remedy)
