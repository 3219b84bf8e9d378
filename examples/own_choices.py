"""A custom policy, score, aggregator and participation: each is a plain function."""

import jax.numpy as jnp
import numpy as np

from examples.shared import classifier, digits, federate, train
from flexmoe_jax import assignment, server


def curious(request: assignment.Request) -> assignment.Solution:
    """Policy: the fittest experts, but random ones in every third round."""
    rng = np.random.default_rng([request.seed, request.round])
    worth = request.fitness if request.round % 3 else rng.random(request.fitness.shape)
    return assignment.solve(assignment.Problem(worth, request.capacity, 0, np.inf), "greedy")


def surprise(feedback):
    """Score: how much better than chance an expert is on a client's examples, in nats a sample."""
    used = jnp.maximum(feedback.usage, 1.0)
    return jnp.where(feedback.usage > 0, jnp.log(10.0) - feedback.loss / used, 0.0)


def cautious() -> server.Aggregator:
    """Aggregator: half of the mean update."""
    usual = server.mean()

    def half(total, due):
        sums = usual.mean(total, due)
        return sums._replace(
            shared_weight=2 * sums.shared_weight,
            expert_weight={layer: 2 * w for layer, w in sums.expert_weight.items()},
        )

    return usual._replace(mean=half)


def night_shift(round_index: int) -> np.ndarray:
    """Participation: clients with even numbers by day, odd numbers by night."""
    return np.arange(round_index % 2, 10, 2)


clients, test = digits()
federation = federate(
    classifier(),
    clients,
    policy=curious,
    fitness=server.FitnessOptions(score=surprise),
    aggregator=cautious(),
)
simulated, state = train(federation, clients, rounds=6, cohorts=night_shift)
result = simulated.evaluate(state, test, clients.about)
print(f"together, the clients are right on {float(result.server_accuracy):.0%} of all digits")
