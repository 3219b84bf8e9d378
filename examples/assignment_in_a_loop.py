"""The assignment alone, in a training loop of plain JAX and optax.

Each of twelve clients follows one of four laws y = w·x. There are four experts, and a client holds
one. In each round the optimisation assigns every client an expert that fits it, and three clients
to every expert.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexmoe_jax.assignment import Problem, solve

CLIENTS, EXPERTS, FEATURES = 12, 4, 5
keys = jax.random.split(jax.random.key(0), 3)
laws = jax.random.normal(keys[0], (EXPERTS, FEATURES))
x = jax.random.normal(keys[1], (CLIENTS, 40, FEATURES))
y = jnp.einsum("cnf,cf->cn", x, laws[jnp.arange(CLIENTS) % EXPERTS])

experts = 0.1 * jax.random.normal(keys[2], (EXPERTS, FEATURES))
optimizer = optax.adam(0.1)
opt_state = optimizer.init(experts)


def losses(experts):
    """Returns (C, E), the mean squared error of each client under each expert."""
    return ((jnp.einsum("cnf,ef->cen", x, experts) - y[:, None]) ** 2).mean(axis=-1)


@jax.jit
def train(experts, opt_state, assignment):
    """Trains every expert for one step on the clients that hold it."""

    def loss(experts):
        return jnp.sum(losses(experts), where=assignment) / CLIENTS

    value, gradient = jax.value_and_grad(loss)(experts)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(experts, updates), opt_state, value


for step in range(100):
    fitness = -np.asarray(losses(experts), float)
    held = solve(Problem(fitness, capacity=np.ones(CLIENTS, int), load_min=3, load_max=3))
    experts, opt_state, value = train(experts, opt_state, held.assignment)
    if step % 25 == 0 or step == 99:
        print(f"step {step:2}: loss {value:.3f}, {held.status}")

for expert in range(EXPERTS):
    print(f"expert {expert}: clients {np.flatnonzero(held.assignment[:, expert]).tolist()}")
