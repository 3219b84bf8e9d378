"""A client that joins after training: which experts suit it, and how accurate it is with them."""

import jax
import numpy as np

from examples.shared import classifier, digits, federate, train
from flexmoe_jax import models, simulation

clients, test = digits(clients=12)
known, coming = np.arange(10), np.array([10, 11])
trained = clients.of(known)
federation = federate(classifier(), trained, ownership=models.Ownership(shared_gate=True))
simulated, state = train(federation, trained, rounds=8)

# The newcomers try every expert on a few of their examples, and get the two that fit them best.
newcomers = clients.of(coming)
few = newcomers.few(32, seed=0)
arrival = simulation.await_newcomers(federation, few, capacity=np.array([2, 2]))
owns = arrival.init(jax.random.key(0))
fitness = arrival.probe(state.server, owns, few)
given = arrival.enrol(fitness)
for c, row in zip(coming, given[0].assignment, strict=True):
    print(f"client {c} is given experts {np.flatnonzero(row).tolist()}")

theirs = arrival.evaluate(state.server, owns, given, test, newcomers.about)
others = simulated.evaluate(state, test, trained.about)
print(f"newcomers, untrained: {float(theirs.personal_accuracy.mean()):.0%} of their own digits")
print(f"trained clients:      {float(others.personal_accuracy.mean()):.0%} of theirs")
