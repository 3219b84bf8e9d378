"""A custom task: predict the median of a quantity instead of its mean, with another loss.

A task is a record of functions; this one is `regression` with another loss. Clients are factories
with machines of four makes, which wear at different rates; sensors fail now and then.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from examples.shared import federate, train
from flexmoe_jax import client, data, models, server, simulation, tasks


class Net(nn.Module):
    """A linear layer, a residual MoE layer, and a linear layer with two outputs."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(16)(x))
        h = h + models.MoELayer(experts=4, hidden=16, name="moe")(h)
        return nn.Dense(2)(h)


def absolute(outputs, batch):
    """Returns |y - f(x)|; the median minimises its mean."""
    return jnp.abs(outputs - batch["wear"]).mean(axis=-1)


robust = tasks.regression("hours", "wear")._replace(name="median", loss=absolute)

rng = np.random.default_rng(0)
factories, machines = 8, 60
makes = [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (3.0, 3.0)]  # How fast its two parts wear.
pace = np.repeat(makes, 2 * machines, axis=0)
hours = rng.uniform(0, 1, (factories * machines, 1)).astype(np.float32)
wear = pace * hours + 0.05 * rng.normal(size=pace.shape)
wear[rng.random(len(wear)) < 0.05] = 50.0  # A sensor that fails.

parts = np.split(np.arange(factories * machines), factories)
clients = data.join({"hours": hours, "wear": wear.astype(np.float32)}, parts)
federation = federate(
    models.from_linen(Net()),
    clients,
    task=robust,
    capacity=np.ones(factories, int),
    local=client.LocalTraining(optax.adam(0.02), batch_size=16, epochs=5),
    # The score is the loss: there is no accuracy. Clients with similar updates share experts.
    fitness=server.FitnessOptions(score="loss", affinity=3.0),
)
simulated, state = train(federation, clients, rounds=20)
for factory in range(factories):
    model = simulation.client_model(federation, state, factory)
    learnt = np.round(model.apply(model.params, jnp.ones((1, 1)))[0], 1)
    true, held = pace[factory * machines], model.experts["moe"]
    print(f"factory {factory}, expert {held}: wears {true} an hour, learnt {learnt}")
