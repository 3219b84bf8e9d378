"""Federated mixture-of-experts in JAX.

Each client of a federation holds a few of many experts. The server learns from training feedback
how well each expert fits each client. An optimisation with load-balance constraints then decides
which client holds which experts in the next round (FLEX-MoE, arXiv 2512.23070).

Each subpackage can be imported by itself: `flexmoe_jax.assignment` (NumPy in, NumPy out),
`flexmoe_jax.models` (Linen modules and pure functions), `flexmoe_jax.data`, `flexmoe_jax.edge`.
`flexmoe_jax.client` runs on a client, `flexmoe_jax.server` runs on the server, and
`flexmoe_jax.simulation` maps both over many clients, for a `flexmoe_jax.federation.Federation`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexmoe_jax import (
        assignment,
        client,
        data,
        deploy,
        edge,
        metrics,
        models,
        options,
        plot,
        server,
        simulation,
        tasks,
        types,
    )
    from flexmoe_jax.checkpoint import Checkpoints
    from flexmoe_jax.errors import InputError
    from flexmoe_jax.federation import Federation

__version__ = "0.1.0"

_NAMES = {"Checkpoints": "checkpoint", "Federation": "federation", "InputError": "errors"}
__all__ = [
    "Checkpoints",
    "Federation",
    "InputError",
    "__version__",
    "assignment",
    "client",
    "data",
    "deploy",
    "edge",
    "metrics",
    "models",
    "options",
    "plot",
    "server",
    "simulation",
    "tasks",
    "types",
]


def __getattr__(name: str) -> Any:
    """Imports a subpackage, or a name from one, on first access: some do not need JAX."""
    if name in _NAMES:
        return getattr(import_module(f"flexmoe_jax.{_NAMES[name]}"), name)
    if name in __all__:
        return import_module(f"flexmoe_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the public names."""
    return __all__
