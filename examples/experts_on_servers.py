"""Placement of experts on servers: the assignment engine without any federation.

The demand for an expert differs between servers. A server has memory for two or three experts, and
every expert needs three or four copies.
"""

import numpy as np

from flexmoe_jax.assignment import Problem, solve

rng = np.random.default_rng(0)
servers, experts = 12, 8
traffic = rng.dirichlet(np.full(servers, 0.3), size=experts).T  # share of each expert's traffic
memory = np.where(np.arange(servers) < 6, 2, 3)  # experts that fit on a server: 30 in all

placement = solve(Problem(fitness=traffic, capacity=memory, load_min=3, load_max=4))
print(placement)
for server, row in enumerate(placement.assignment):
    print(f"server {server:2}: experts {np.flatnonzero(row).tolist()}")

greedy = solve(Problem(traffic, memory, load_min=0, load_max=servers), "greedy")
for name, found in {"optimised": placement, "greedy": greedy}.items():
    local = np.sum(traffic, where=found.assignment) / experts
    copies = found.assignment.sum(axis=0)
    print(
        f"{name}: {local:.0%} of traffic served where it starts, {copies.min()} to "
        f"{copies.max()} copies of an expert"
    )
