"""A federation: the record of all its settings, and the checks that they fit together."""

from flexmoe_jax.federation.federation import Federation

__all__ = ["Federation"]
