"""What clients' models are worth after one more round's training, each for itself alone."""

from __future__ import annotations

from collections.abc import Callable

from experiments.newcomers import Judge
from flexmoe_jax.data import About, ClientData
from flexmoe_jax.metrics import tuned_figures
from flexmoe_jax.simulation import Simulation, TestSet
from flexmoe_jax.types import State


def make_tuner(
    simulation: Simulation, everybody: Callable[[], ClientData], test: TestSet, about: About
) -> Judge:
    """What says how well clients do once they have fitted their models to their own examples.

    Args:
      simulation: of the federation.
      everybody: the training examples of all clients.
      test: the test set.
      about: what is known of the clients.
    """

    def judge(state: State) -> dict[str, float | int]:
        models = simulation.tune(state, everybody())
        return tuned_figures(simulation.evaluate(state, test, about, models))

    return judge
