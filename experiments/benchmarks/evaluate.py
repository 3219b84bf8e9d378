"""Suite `evaluate`: the accuracy of every client's model on one test set.

A line per number of clients: seconds of `algorithm.evaluate`, which computes shared features once
an image; seconds of a loop over the clients that runs each one's whole model on all images, on the
same devices; and the ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flexmoe_jax.federated.execute import take_slots
from jax import lax

from experiments.benchmarks.process import Figures, refuse_words
from experiments.benchmarks.timing import compiled, interleave, set_up
from experiments.benchmarks.workloads import CLASSES, Prepare, draw_dataset, make_federation
from flexmoe_jax import data, federated, models
from flexmoe_jax.types import Array, Params, State

_CLIENTS = (20, 100)
_TESTS = 2_000
_CAPACITY, _EXPERTS = 2, 8


def run(words: list[str]) -> Iterator[Figures]:
    """Figures by number of clients.

    Raises:
      InputError: any words.
    """
    refuse_words("evaluate", words)
    set_up()
    for clients in _CLIENTS:
        yield measure(clients, _TESTS)


def measure(clients: int, tests: int, image: tuple[int, int, int] = (32, 32, 3)) -> Figures:
    """Times the evaluation of a federation of ConvNets, and that of its clients one by one."""
    mesh = federated.client_mesh()
    dataset = draw_dataset(clients, image, tests)
    owned = data.build_clients(dataset, np.split(np.arange(clients), clients))
    owned = federated.replicate(owned, mesh)
    prepare = data.standardise(dataset.train_images)
    algorithm = make_federation(
        models.ConvNet(),
        owned,
        np.full(clients, _CAPACITY),
        prepare=prepare,
        local=federated.LocalTraining(optax.sgd(0.1)),
        experts=_EXPERTS,
        mesh=mesh,
    )
    state = algorithm.init(jax.random.key(0))
    solution = algorithm.assign(state, np.arange(clients, dtype=np.int32))
    slots = federated.assignment_slots(solution.assignment, _CAPACITY)
    state = state._replace(slots=federated.replicate(slots, mesh))
    test = federated.chunk_test_set(dataset.test_images, dataset.test_labels, mesh=mesh)
    ours, whole = interleave(
        [
            compiled(algorithm.evaluate, state, test, owned.label_share),
            _evaluate_whole(prepare, state, test),
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
    prepare: Prepare, state: State, test: federated.TestSet
) -> Callable[[], list[Array]]:
    """Each client's (Y,) correct answers by class, from one run of a compiled program a client."""
    model = models.MoEClassifier(models.ConvNet(), CLASSES, _CAPACITY)

    def evaluate(state: State, client: Array, test: federated.TestSet) -> Array:
        slots = state.slots[client]
        gate = jax.tree.map(lambda leaf: leaf[client], state.gates)
        experts, own = (take_slots(stack, slots) for stack in (state.experts, gate))
        params = Params(state.shared, experts, own, private={})
        variables = {"params": models.merge_params(params)}

        def add(hits: Array, chunk: federated.TestSet) -> tuple[Array, None]:
            outputs: Any = model.apply(variables, prepare(chunk.images), slots < _EXPERTS)
            right = outputs[0].argmax(axis=-1) == chunk.labels
            return hits + right @ jax.nn.one_hot(chunk.labels, CLASSES), None

        return lax.scan(add, jnp.zeros(CLASSES), test)[0]

    clients = [jnp.int32(client) for client in range(state.slots.shape[0])]
    program = jax.jit(evaluate).lower(state, clients[0], test).compile()
    return lambda: [program(state, client, test) for client in clients]
