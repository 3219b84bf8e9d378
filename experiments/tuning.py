"""What clients' models are worth after one more round's training, each for itself alone."""

from __future__ import annotations

import numpy as np

from experiments.newcomers import Judge
from flexmoe_jax.data import About, Feed
from flexmoe_jax.metrics import tuned_figures
from flexmoe_jax.simulation import Simulation, TestSet
from flexmoe_jax.types import State


def make_tuner(simulation: Simulation, feed: Feed, test: TestSet, about: About) -> Judge:
    """What says how well clients do once they have fitted their models to their own examples.

    Args:
      simulation: of the federation.
      feed: of training examples, with room for all clients.
      test: the test set.
      about: what is known of the clients.
    """
    everybody = np.arange(simulation.setting.federation.clients)

    def judge(state: State) -> dict[str, float | int]:
        models = simulation.tune(state, feed(everybody))
        return tuned_figures(simulation.evaluate(state, test, about, models))

    return judge
