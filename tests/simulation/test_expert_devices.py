"""Experts split over devices: results, memory, checkpoints on other meshes, and what is refused."""

from __future__ import annotations

import chex
import jax
import numpy as np
import optax
import pytest

from flexmoe_jax import models
from flexmoe_jax.checkpoint import Checkpoints
from flexmoe_jax.client import LocalTraining
from flexmoe_jax.errors import InputError
from flexmoe_jax.server import Admission, FitnessOptions, trimmed_mean
from flexmoe_jax.simulation import Arrival, await_newcomers, chunk_test_set, client_mesh, replicate
from flexmoe_jax.types import Plan
from tests.conftest import CAPACITY
from tests.simulation.conftest import EXPERTS, TwoLayers, plain, prepare

EVERYBODY = np.arange(len(CAPACITY), dtype=np.int32)
# Whatever a mesh could do otherwise: layers of unlike sizes, gates that travel, a state for each
# expert, limits learnt from other updates, and use that the server splits.
CHOICES = {
    "model": models.from_linen(TwoLayers()).after(prepare),
    "layers": "each",
    "ownership": models.Ownership(shared_gate=True),
    "optimizer": optax.adam(0.01, eps=1e-3),
}


def play(simulated, clients, mesh, rounds=2):
    """Rounds of all clients; in the last, the update of client 2 is much too long."""
    state, there = simulated.init(jax.random.key(0)), replicate(clients, mesh)
    for left in reversed(range(rounds)):
        tamper = np.where((EVERYBODY == 2) & (left == 0), 1000.0, 1.0)
        arrival = Arrival(np.ones(7), np.ones(7, bool), tamper)
        plan = simulated.plan(EVERYBODY, simulated.assign(state, EVERYBODY), arrival)
        state, report = simulated.round(state, there, plan)
    return state, np.asarray(report.quarantined).sum()


def judge(simulated, clients, digits, state, mesh):
    arrays = {"images": digits.test_images, "labels": digits.test_labels.astype(np.int32)}
    test = chunk_test_set(arrays, 60, mesh)
    return jax.device_get(simulated.evaluate(state, test, replicate(clients.about, mesh)))


@pytest.fixture(scope="module")
def alone(make_simulation, clients, digits):
    mesh, simulated = client_mesh(1), make_simulation(**CHOICES)
    state, refused = play(simulated, clients, mesh)
    assert refused == 1
    return plain(state), judge(simulated, clients, digits, state, mesh)


@pytest.mark.parametrize(("devices", "experts", "block_size"), [(2, 2, 4), (8, 2, 1)])
def test_a_mesh_changes_nothing_beyond_rounding(
    make_simulation, clients, digits, alone, devices, experts, block_size
):
    mesh = client_mesh(devices, experts)
    simulated = make_simulation(mesh=mesh, block_size=block_size, **CHOICES)
    state, refused = play(simulated, clients, mesh)
    assert refused == 1
    # Each device has an equal part of every expert's state, of experts that differ.
    split = state.server.experts, state.server.optimizer[1]
    for leaf in jax.tree.leaves(split):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == EXPERTS // experts
    chex.assert_trees_all_close(alone[0], plain(state), atol=1e-5, rtol=1e-5)
    found = judge(simulated, clients, digits, state, mesh)
    # No device could hold the model of all experts.
    assert alone[1].assembled is not None
    chex.assert_trees_all_close(alone[1]._replace(assembled=None), found, atol=1e-4, rtol=1e-4)


def test_private_noise_is_the_same_on_any_mesh(make_simulation, clients):
    # It is drawn for all experts, wherever they are.
    private = Admission(clip=1.0, noise_multiplier=1.0, noise="simulated")
    states = []
    for mesh in (client_mesh(1), client_mesh(4, 2)):
        simulated = make_simulation(mesh=mesh, admission=private)
        states.append(plain(play(simulated, clients, mesh, rounds=1)[0]))
    chex.assert_trees_all_close(*states, atol=1e-5, rtol=1e-5)


def test_probes_and_tuned_models_are_the_same_on_any_mesh(make_simulation, clients):
    found = []
    for mesh in (client_mesh(1), client_mesh(4, 2)):
        simulated = make_simulation(
            mesh=mesh,
            ownership=models.Ownership(shared_gate=True),
            fitness=FitnessOptions(score="loss"),
        )
        state, there = replicate((simulated.init(jax.random.key(0)), clients), mesh)
        # Each client holds other experts.
        slots = np.sort((EVERYBODY[:, None, None] + np.arange(3)) % EXPERTS).astype(np.int32)
        own = state.clients._replace(slots=replicate(slots, mesh))
        tuned = simulated.tune(state._replace(clients=own), there)
        few = clients.of(EVERYBODY[1:4])
        coming = await_newcomers(simulated.setting.federation, few, CAPACITY[1:4], mesh=mesh)
        owns = coming.init(jax.random.key(1))
        fitness = coming.probe(state.server, owns, replicate(few, mesh))
        found.append(jax.device_get((tuned, fitness)))
    chex.assert_trees_all_close(*found, atol=1e-5, rtol=1e-5)


def test_memory_of_a_device_falls_with_the_devices_that_share_the_experts(make_simulation, clients):
    # 64 MiB of experts, with an optimiser state of twice as much; a client holds 1 MiB.
    module = models.MoEClassifier(models.MLP((64,)), classes=10, experts=64, hidden=2048)
    needs = []
    for devices in (1, 4):
        mesh = client_mesh(devices, devices)
        simulated = make_simulation(
            mesh=mesh,
            model=models.classifier(module).after(prepare),
            capacity=np.ones(7, int),
            optimizer=optax.adam(0.1),
            local=LocalTraining(optax.sgd(0.1), batch_size=8),
        )
        init, room = simulated.init.lower(jax.random.key(0)), -(-7 // devices) * devices
        numbers = np.zeros(room, np.int32)
        plan = Plan(
            numbers,
            numbers[:, None, None],
            np.zeros((1, 64), np.float32),
            numbers,
            np.ones(room, np.float32),
        )
        there = replicate(clients, mesh)
        begun = simulated.round.lower(init.out_info, there, plan)
        needs.append([bytes_needed(program) for program in (init, begun)])
    drawn, trained = np.array(needs).T / 2**20
    assert drawn[0] > 3 * 64
    assert trained[0] > 4 * 64
    # What clients need for training does not become less.
    assert drawn[1] < 1.1 / 4 * drawn[0]
    assert trained[1] < 1.3 / 4 * trained[0]


def bytes_needed(program):
    """The memory of a device while a program runs, with its arguments and results."""
    sizes = program.compile().memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def test_a_checkpoint_fits_any_other_mesh(make_simulation, tmp_path):
    began = make_simulation(mesh=client_mesh(8, 2), **CHOICES).init(jax.random.key(0))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(began)
    for mesh in (client_mesh(1), client_mesh(2, 2)):
        like = make_simulation(mesh=mesh, **CHOICES).init(jax.random.key(1))
        found = checkpoints.restore(like).state
        chex.assert_trees_all_equal(plain(found), plain(began))
        chex.assert_trees_all_equal(
            *(jax.tree.map(lambda x: str(x.sharding), s.server.experts) for s in (found, like))
        )
    checkpoints.close()


def test_what_cannot_be_split_is_refused(make_simulation):
    with pytest.raises(InputError, match=r"expert_devices=3: give a divisor of .* devices, 8"):
        client_mesh(8, 3)
    with pytest.raises(InputError, match=r"expert_devices=8: give a divisor of .* experts, 4"):
        make_simulation(mesh=client_mesh(8, 8))
    with pytest.raises(InputError, match=r"expert_devices=2: the aggregator needs all updates"):
        make_simulation(mesh=client_mesh(2, 2), aggregator=trimmed_mean(0.2))
