"""Suite `evaluate`: the accuracy of every client's model on one test set.

One line per number of clients: seconds of `simulation.evaluate`, which computes shared features
once per image; seconds of a loop over clients that runs each client's whole model on all images, on
the same devices; and the ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.benchmarks.process import Figures, refuse_words
from experiments.benchmarks.timing import compiled, interleave, set_up
from experiments.benchmarks.workloads import CLASSES, draw_dataset, make_federation
from flexmoe_jax import client, data, models, server, simulation
from flexmoe_jax.federation import Federation
from flexmoe_jax.types import Array, Own, State

_CLIENTS = (20, 100)
_TESTS = 2_000
_CAPACITY, _EXPERTS = 2, 8


def run(words: list[str]) -> Iterator[Figures]:
    """Yields figures by number of clients.

    Raises:
      InputError: words are given.
    """
    refuse_words("evaluate", words)
    set_up()
    for clients in _CLIENTS:
        yield measure(clients, _TESTS)


def measure(clients: int, tests: int, image: tuple[int, int, int] = (32, 32, 3)) -> Figures:
    """Times the evaluation of a federation of ConvNets, and of each of its clients separately."""
    mesh = simulation.client_mesh()
    dataset = draw_dataset(clients, image, tests)
    owned = data.build_clients(dataset, np.split(np.arange(clients), clients))
    owned = simulation.replicate(owned, mesh)
    federation = make_federation(
        models.MoEClassifier(models.ConvNet(), CLASSES, _EXPERTS),
        owned,
        np.full(clients, _CAPACITY),
        prepare=data.standardise(dataset.train_images),
        local=client.LocalTraining(optax.sgd(0.1)),
    ).replace(prior=False)
    simulated = simulation.simulate(federation, owned, mesh=mesh)
    state = simulated.init(jax.random.key(0))
    (solution,) = simulated.assign(state, np.arange(clients, dtype=np.int32))
    slots = simulation.assignment_slots(solution.assignment[:, None], _CAPACITY)
    own = state.clients._replace(slots=simulation.replicate(slots, mesh))
    state = state._replace(clients=own)
    arrays = {"images": dataset.test_images, "labels": dataset.test_labels}
    test = simulation.chunk_test_set(arrays, mesh=mesh)
    ours, whole = interleave(
        [
            compiled(simulated.evaluate, state, test, owned.about),
            _evaluate_whole(federation, state, test),
        ],
        warm_up=1,
    )
    return {
        "suite": "evaluate",
        "clients": clients,
        "images": tests,
        "seconds": min(ours),
        "reference_seconds": min(whole),
        "ratio": min(whole) / min(ours),
        "devices": mesh.size,
    }


def _evaluate_whole(
    federation: Federation, state: State, test: simulation.TestSet
) -> Callable[[], list[Array]]:
    """Returns a call that counts each client's (Y,) correct answers by class, client by client.

    It runs the same compiled program once per client.
    """

    def evaluate(state: State, number: Array, test: simulation.TestSet) -> Array:
        own: Own = jax.tree.map(lambda leaf: leaf[number], state.clients)
        down = server.send(federation.desk, state.server, own.slots, jnp.int32(0))
        params, held = client.model_of(federation.site, own, down)

        def add(hits: Array, chunk: simulation.TestSet) -> tuple[Array, None]:
            outputs, _ = federation.apply(params, chunk.arrays["images"], held)
            right = (outputs.argmax(axis=-1) == chunk.arrays["labels"]) & chunk.valid
            return hits + right @ jax.nn.one_hot(chunk.arrays["labels"], CLASSES), None

        return lax.scan(add, jnp.zeros(CLASSES), test)[0]

    clients = [jnp.int32(number) for number in range(federation.clients)]
    program = jax.jit(evaluate).lower(state, clients[0], test).compile()
    # One after the other: if many programs wait, their threads can block each other on a CPU.
    return lambda: [jax.block_until_ready(program(state, number, test)) for number in clients]
