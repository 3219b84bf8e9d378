"""Federated mixture-of-experts in JAX.

Each client of a federation holds a few of many experts. The server learns from training feedback
how well each expert fits each client, and an optimisation with load-balance constraints decides who
holds what in the next round (FLEX-MoE, arXiv 2512.23070).

The rooms can be imported by themselves: `flexmoe_jax.assignment` (NumPy in, NumPy out),
`flexmoe_jax.models` (Linen modules and pure functions), `flexmoe_jax.data`, `flexmoe_jax.edge`.
`flexmoe_jax.client` is what runs on a client, `flexmoe_jax.server` what runs on the server, and
`flexmoe_jax.simulation` maps both over many clients, for a `flexmoe_jax.federation.Federation`.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
