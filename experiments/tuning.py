"""Evaluates clients' models after each client has trained its own model for one more round."""

from __future__ import annotations

import numpy as np

from experiments.newcomers import Judge
from flexmoe_jax.data import About, Feed
from flexmoe_jax.metrics import tuned_figures
from flexmoe_jax.simulation import Simulation, TestSet
from flexmoe_jax.types import State


def make_tuner(simulation: Simulation, feed: Feed, test: TestSet, about: About) -> Judge:
    """Makes the function that evaluates clients after they fine-tune on their own examples.

    Args:
      simulation: the simulation of the federation.
      feed: the feed of training examples, with room for all clients.
      test: the test set.
      about: facts about the clients that evaluation needs.
    """
    everybody = np.arange(simulation.setting.federation.clients)

    def judge(state: State) -> dict[str, float | int]:
        models = simulation.tune(state, feed(everybody))
        return tuned_figures(simulation.evaluate(state, test, about, models))

    return judge
