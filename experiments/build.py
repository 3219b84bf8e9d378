"""Builds a federation from a config, and rejects invalid configs before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.cli import nearest
from experiments.edge import capacity_in_memory, make_devices, make_network
from experiments.examples import Examples, load_examples, split_clients
from experiments.fields import check_fields, client_capacities, load_model_name, read
from experiments.model import check_model, finished, make_ownership, model_maker
from experiments.newcomers import Judge, make_judge, notes_on_newcomers
from experiments.tuning import make_tuner
from flexmoe_jax import assignment, client, data, edge, models, server, simulation
from flexmoe_jax.edge import AVAILABILITIES, read_record, read_tiers
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.options import (
    Admission,
    Aggregation,
    AssignmentOptions,
    EdgeOptions,
    FitnessOptions,
    LocalLoss,
    LocalSteps,
    LocalWork,
    ModelOptions,
    UploadOptions,
)
from flexmoe_jax.simulation import Network, Payload, Simulation, TestSet
from flexmoe_jax.tasks import TASKS, Task
from flexmoe_jax.types import Array


@dataclass(frozen=True)
class Experiment:
    """A federation and its data.

    Attributes:
      simulation: the functions init, assign, plan, round, evaluate.
      feed: provides the training examples of a cohort's clients, or of all clients.
      about: facts about the clients that the evaluation of their models needs.
      test: the test set.
      prepare: maps raw inputs to the inputs that the model takes.
      classes: names of the Y classes.
      label_counts: (C, Y) training examples of each client by class; None if only the clients know.
      ids: (C,) who the clients are, in the data set or the federation; None if nobody says.
      capacity: (C,) k_c.
      network: decides which clients take part in a round and which updates arrive.
      payload: bytes transferred, by group of MoE layers.
      inputs: hashes of the files that the run reads; see `inputs_of`.
      personal: description of the data that personal accuracy is measured on.
      notes: sentences that a user should read before trusting the figures.
      judges: compute figures of a state in addition to the evaluation: the results of newcomers,
        and of clients' models after fine-tuning.
    """

    simulation: Simulation
    feed: data.Feed
    about: data.About
    test: TestSet
    prepare: Callable[[Array], Array]
    classes: tuple[str, ...]
    label_counts: np.ndarray | None
    ids: np.ndarray | None
    capacity: np.ndarray
    network: Network
    payload: tuple[Payload, ...]
    inputs: Mapping[str, str]
    personal: str
    notes: tuple[str, ...]
    judges: tuple[Judge, ...]


class Known(NamedTuple):
    """Information that real clients have reported about themselves.

    Attributes:
      examples: the examples; the clients' own ones are not known here.
      devices: the clients' devices, with their memory; None if clients were not asked for it.
    """

    examples: Examples
    devices: edge.Devices | None


class Parts(NamedTuple):
    """What a config alone determines, without data.

    Attributes:
      task: the learning task.
      load: name of the load model.
      chosen: options of the federation; see `choices`.
      make_model: number of classes -> model.
      devices: the clients' devices, if the config has any.
      capacity: (C,) k_c, newcomers included; None if the memory of devices determines it.
    """

    task: Task
    load: str
    chosen: dict[str, Any]
    make_model: Callable[[int], models.Model]
    devices: edge.Devices | None
    capacity: np.ndarray | None


def make_parts(config: ConfigDict, known: Known | None = None) -> Parts:
    """Makes the parts of an experiment that need no data.

    Raises:
      InputError: naming the field, the value and the remedy.
    """
    check_fields(config)
    task = make_task(config.task.name)
    load = load_model_name(config.assignment.load, config.clients.capacity)
    chosen = choices(config, load)
    make_model = model_maker(config)
    devices = make_devices(read(EdgeOptions, config), config.clients.count, config.seed)
    capacity = given_capacity(config, devices if known is None else known.devices)
    return Parts(task, load, chosen, make_model, devices, capacity)


def build(config: ConfigDict, known: Known | None = None) -> Experiment:
    """Builds the experiment that a config describes.

    Args:
      config: the config of the run.
      known: information about real clients; None to simulate clients.

    Raises:
      InputError: naming the field, the value and the remedy.
    """
    parts = make_parts(config, known)
    task, load, chosen, devices = parts.task, parts.load, parts.chosen, parts.devices
    local: client.LocalTraining = chosen["local"]
    mesh = simulation.client_mesh(config.execution.devices, config.execution.expert_devices)

    examples = load_examples(config) if known is None else known.examples
    clients, sample = examples.clients, examples.sample
    check_augmentation(local, config.local.augment, sample)
    model = finished(parts.make_model, config, len(examples.classes), examples.prepare)
    check_model(model, task, sample, config.model.backbone)
    capacity = parts.capacity
    if capacity is None:
        owned = devices if known is None else known.devices
        capacity = capacity_in_memory(model, sample, owned, config, chosen["ownership"])
    trained, coming = split_clients(config)
    sizes = np.asarray(clients.size)
    seen = local.examples(sizes)
    federation = Federation(
        model=model,
        sample=sample,
        capacity=capacity[trained],
        task=task,
        load=server.make_load_model(load, seen, capacity[trained], config.model.top_k),
        **chosen,
    )
    federation.check(clients.arrays)
    federation.check(examples.test)
    network = make_network(config, devices, trained, local.steps(sizes), seen, sizes)
    return _with_programs(config, federation, examples, network, capacity[coming], mesh)


def _with_programs(
    config: ConfigDict,
    federation: Federation,
    examples: Examples,
    network: Network,
    newcomers: np.ndarray,
    mesh: Mesh,
) -> Experiment:
    """Adds the programs, the placed data and the judges to a federation.

    Args:
      config: the config of the run.
      federation: the federation with all its options.
      examples: the examples of its clients.
      network: decides which clients take part.
      newcomers: (n,) k_c of the newcomers.
      mesh: the devices.
    """
    clients = examples.clients
    test = simulation.chunk_test_set(examples.test, config.eval.batch_size, mesh, examples.group)
    size = config.execution.client_block_size
    simulated = simulation.simulate(
        federation, clients, rows=network.asked, block_size=size, mesh=mesh
    )
    fed = federation.clients if config.eval.fine_tune else network.asked
    feed = make_feed(config.execution.data, clients, fed, mesh)
    about = simulation.replicate(clients.about, mesh)
    judge = make_judge(config, federation, examples, newcomers, test, mesh)
    tuner = make_tuner(simulated, feed, test, about) if config.eval.fine_tune else None
    return Experiment(
        simulation=simulated,
        feed=feed,
        about=about,
        test=test,
        prepare=examples.prepare,
        classes=examples.classes,
        label_counts=examples.counts,
        ids=examples.ids,
        capacity=federation.capacity,
        network=network,
        payload=simulation.payloads(federation),
        inputs=inputs_of(config, examples),
        personal=examples.personal,
        notes=notes_of(config, examples, federation),
        judges=tuple(asks for asks in (judge, tuner) if asks is not None),
    )


def choices(config: ConfigDict, load: str) -> dict[str, Any]:
    """Returns the options of a federation that do not depend on data, as `Federation` fields."""
    return {
        "policy": make_policy(read(AssignmentOptions, config), load),
        "local": local_training(config),
        "ownership": make_ownership(read(ModelOptions, config)),
        "codec": make_codec(read(UploadOptions, config)),
        "admission": read(Admission, config),
        "aggregator": make_aggregator(read(Aggregation, config)),
        "optimizer": _optimizer(read(Aggregation, config)),
        "fitness": read(FitnessOptions, config),
        "deficit_decay": config.assignment.deficit_decay,
        "seed": config.seed,
        "prior": config.eval.prior,
        "layers": config.assignment.layers,
    }


def make_task(name: str) -> Task:
    """Returns the learning task with this name."""
    if name not in TASKS:
        near, all_of_them = nearest(name, TASKS), ", ".join(TASKS)
        remedy = f"did you mean {near}? choose one of {all_of_them}"
        raise InputError("task.name", name, remedy)
    return TASKS[name]()


def make_policy(options: AssignmentOptions, load: str) -> assignment.Policy:
    """Makes the policy that decides which client holds which expert."""
    given = asdict(options)
    for of_federation in ("layers", "load", "deficit_decay"):
        given.pop(of_federation)
    return assignment.make_policy(given.pop("policy"), weighted=load != "clients", **given)


def given_capacity(config: ConfigDict, devices: edge.Devices | None) -> np.ndarray | None:
    """Returns k_c (C,) as given in the config; None if the devices' memory determines it."""
    options, experts = config.clients, config.model.experts
    if options.capacity == "memory":
        if devices is None:
            raise InputError("clients.capacity", "memory", "say what devices there are: edge.mix")
        if config.assignment.policy != "full":
            return None
        return np.full(options.count, experts, np.int64)
    given = client_capacities(options.capacity, options.count, experts, config.seed)
    return np.full_like(given, experts) if config.assignment.policy == "full" else given


def local_training(config: ConfigDict) -> client.LocalTraining:
    """Makes the clients' local training from the config."""
    options = read(LocalSteps, config)
    return client.LocalTraining(
        local_optimizer(options),
        **asdict(read(LocalWork, config)),
        **asdict(read(LocalLoss, config)),
        tile=config.execution.tile,
        decay=make_decay(options.decay, config.rounds),
        augment=augmentation(options.augment),
    )


def make_feed(where: str, clients: data.ClientData, most: int, mesh: Mesh) -> data.Feed:
    """Makes a feed whose examples stay on the devices, or are sent there cohort by cohort.

    Args:
      where: see `ExecutionOptions.data`.
      clients: the clients' examples, on the host.
      most: number of clients in the largest cohort.
      mesh: the devices.
    """
    # None if a device does not report its memory, as a CPU.
    memory = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    too_large = memory and simulation.tree_bytes(clients.arrays) > memory / 2
    if where == "host" or (where == "auto" and too_large):
        return data.feed_cohorts(clients, most, partial(simulation.replicate, mesh=mesh))
    placed = simulation.replicate(clients, mesh)
    return lambda cohort: placed


def inputs_of(config: ConfigDict, examples: Examples) -> dict[str, str]:
    """Returns hashes of the inputs of a run, by name: `data.train_images`, ..., `edge.tiers`.

    Args:
      config: the config of the run.
      examples: the examples that the run uses, after its limits are applied.

    Raises:
      InputError: one of the user's files cannot be read.
    """
    found = {f"data.{name}": value for name, value in examples.hashes.items()}
    if config.edge.tiers:
        tiers = [
            (tier.name, *map(float, tier[1:])) for tier in read_tiers(config.edge.tiers).values()
        ]
        found["edge.tiers"] = data.digest(np.array(repr(tiers)))
    if config.edge.availability not in AVAILABILITIES:
        record = read_record(config.edge.availability)
        found["edge.availability"] = data.digest(record.astype(bool))
    return found


def notes_of(config: ConfigDict, examples: Examples, federation: Federation) -> tuple[str, ...]:
    """Returns the notes that a user should read before trusting the figures."""
    return (
        *examples.notes,
        *notes_on_privacy(read(Admission, config)),
        *notes_on_newcomers(config, federation),
        *notes_on_devices(config, federation),
    )


def notes_on_privacy(options: Admission) -> tuple[str, ...]:
    """Returns the notes about the noise that a user should read before trusting its ε."""
    if not (options.private and options.simulated_noise):
        return ()
    return (
        "server.noise=simulated: whoever knows this config can draw the noise again, so it keeps "
        "nothing private; privacy/epsilon_simulated is what secret noise would give",
    )


def notes_on_devices(config: ConfigDict, federation: Federation) -> tuple[str, ...]:
    """Returns the note that a figure is left out because no device has all experts."""
    devices = config.execution.expert_devices
    if devices == 1 or not federation.assembles:
        return ()
    return (
        f"execution.expert_devices={devices}: no device has all experts, so the model of all "
        "experts is not evaluated",
    )


def make_codec(options: UploadOptions) -> client.Codec:
    """Makes the codec, which decides how updates are compressed for transfer."""
    compressor = client.make_compressor(options.compression, options.kept)
    return client.Codec(compressor, options.error_feedback)


def make_aggregator(options: Aggregation) -> server.Aggregator | None:
    """Returns the function that combines many updates into one; None for the weighted mean."""
    aggregators: dict[str, server.Aggregator | None] = {
        "mean": None,
        "median": server.trimmed_mean(0.5),
        "trimmed_mean": server.trimmed_mean(options.trim),
        "geometric_median": server.geometric_median(),
    }
    return aggregators[options.aggregator]


def make_decay(name: str, rounds: int) -> optax.Schedule | None:
    """Returns the schedule of the clients' learning rate: a factor by round, from 1 towards 0.

    The factor is 1 in the first round and would reach 0 after the last.
    """
    decays = {
        "none": None,
        "linear": optax.linear_schedule(1.0, 0.0, rounds),
        "cosine": optax.cosine_decay_schedule(1.0, rounds),
    }
    return decays[name]


def augmentation(name: str) -> client.Augment | None:
    """Returns the random augmentation of training images; None for no augmentation."""
    if name not in ("none", *data.AUGMENTATIONS):
        raise InputError(
            "local.augment", name, f"choose one of none, {', '.join(data.AUGMENTATIONS)}"
        )
    if name == "none":
        return None
    change = data.AUGMENTATIONS[name]
    return lambda batch, bits: {**batch, "images": change(batch["images"], bits)}


def check_augmentation(local: client.LocalTraining, name: str, sample: Mapping[str, Any]) -> None:
    """Rejects augmentation if the examples are not images."""
    if local.augment is not None and np.ndim(sample.get("images", 0)) != 4:
        remedy = "the examples are not images of (height, width, channels); say none"
        raise InputError("local.augment", name, remedy)


def local_optimizer(options: LocalSteps) -> optax.GradientTransformation:
    """Makes the clients' optimiser."""
    steps = [optax.clip_by_global_norm(options.clip_norm)] if options.clip_norm else []
    if options.proximal:
        steps.append(client.proximal(options.proximal))
    steps.append(_optimizer(options))
    if options.expert_rate != 1:
        steps.append(client.scale_experts(options.expert_rate))
    return optax.chain(*steps)


def _optimizer(options: LocalSteps | Aggregation) -> optax.GradientTransformation:
    if options.optimizer == "adam":
        return optax.adam(options.learning_rate)
    return optax.sgd(options.learning_rate, options.momentum or None)
