"""Turns a config into a federation, refusing what cannot work before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.cli import nearest
from experiments.edge import capacity_in_memory, make_devices, make_network, model_shapes
from experiments.fields import check_kinds, check_numbers, client_capacities, load_model_name
from flexmoe_jax import assignment, data, federated, models
from flexmoe_jax.edge import AVAILABILITIES, read_record, read_tiers
from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Array

# What personal accuracy is measured on.
OWN_EXAMPLES = "clients' own test examples"
COMMON_EXAMPLES = "common test set, weighted to each client's label shares"


@dataclass(frozen=True)
class Experiment:
    """A federation and its data.

    Attributes:
      algorithm: init, assign, plan, round, evaluate.
      feed: the training examples of a cohort's clients, or of all clients.
      label_share: (C, Y) of the clients' training examples.
      test: the test set.
      classes: names of the Y classes.
      label_counts: (C, Y) training examples of each client by class.
      capacity: (C,) k_c.
      network: who takes part in a round, and what arrives.
      payload: bytes of what travels.
      inputs: hashes of what it reads; see `inputs_of`.
      personal: what personal accuracy is measured on, in words.
      notes: sentences on what a user should know before trusting the figures.
    """

    algorithm: federated.Algorithm
    feed: data.Feed
    label_share: Array
    test: federated.TestSet
    classes: tuple[str, ...]
    label_counts: np.ndarray
    capacity: np.ndarray
    network: federated.Network
    payload: federated.Payload
    inputs: Mapping[str, str]
    personal: str
    notes: tuple[str, ...]


def build(config: ConfigDict) -> Experiment:
    """Builds the experiment that a config describes.

    Raises:
      InputError: naming the field, the value and the remedy.
    """
    check_kinds(config)
    check_numbers(config)
    load = load_model_name(config.assignment.load, config.clients.capacity)
    if load not in federated.LOAD_MODELS:
        choices = ", ".join(("auto", *federated.LOAD_MODELS))
        raise InputError("assignment.load", load, f"choose one of {choices}")
    policy = assignment.make_policy(
        config.assignment.policy,
        slack=config.assignment.slack,
        solver=config.assignment.solver,
        rounding=config.assignment.rounding,
        backend=config.assignment.backend,
        weighted=load != "clients",
        holders_min=config.assignment.holders_min,
        balance=config.assignment.balance,
        diversity=config.assignment.diversity,
        movement=config.assignment.movement,
        exploration=config.assignment.exploration,
        time_limit=config.assignment.time_limit,
    )
    backbone = models.make_backbone(
        config.model.backbone,
        widths=config.model.widths or (),
        depth=config.model.depth,
        groups=config.model.groups,
        conv=models.convolution(config.model.conv),
    )
    if config.model.local_backbone:
        backbone = models.PersonalMixture(backbone, backbone.clone())
    ownership = make_ownership(config.model)
    score = federated.make_score(config.fitness.score, config.fitness.alpha)
    local = federated.LocalTraining(
        optimizer=local_optimizer(config.local),
        epochs=config.local.epochs,
        batch_size=config.local.batch_size,
        max_steps=config.local.max_steps,
        balance=config.local.balance,
        z=config.local.z,
        tile=config.execution.tile,
        decay=make_decay(config.local.decay, config.rounds),
        augment=augmentation(config.local.augment),
    )
    uplink = make_uplink(config)
    aggregator = make_aggregator(config.server)
    devices = make_devices(config.edge, config.clients.count, config.seed)
    capacity = np.ones(config.clients.count, np.int64)
    if config.clients.capacity != "memory":
        capacity = client_capacities(
            config.clients.capacity, config.clients.count, config.model.experts, config.seed
        )
    elif devices is None:
        raise InputError("clients.capacity", "memory", "say what devices there are: edge.mix")

    mesh = federated.client_mesh(config.execution.devices)
    dataset, parts = load_partitioned(config)
    if local.augment is not None and dataset.train_images.ndim != 4:
        remedy = "the examples are not images of (height, width, channels); say none"
        raise InputError("local.augment", config.local.augment, remedy)
    clients = data.build_clients(dataset, parts, place=np.asarray)
    model = models.MoEClassifier(
        backbone=backbone,
        classes=dataset.num_classes,
        experts=config.model.experts,
        hidden=config.model.hidden,
        top_k=config.model.top_k,
        shared_experts=config.model.shared_experts,
    )
    owner = test_owner(dataset, config.partition.name)
    prepare = data.standardise(dataset.train_images)
    if config.assignment.policy == "full":
        capacity = np.full_like(capacity, config.model.experts)
    elif config.clients.capacity == "memory":
        assert devices is not None
        capacity = capacity_in_memory(model, prepare, dataset.train_images[:1], devices, config)
    params = model_shapes(model, prepare, dataset.train_images)
    models.check_ownership(params, ownership, capacity.tolist())
    owned = models.split_params(params, ownership)
    sizes = np.asarray(clients.size)
    steps, examples = local.steps(sizes), local.examples(sizes)
    network = make_network(config, devices, steps, examples)
    algorithm = federated.flexmoe(
        model,
        clients,
        prepare=prepare,
        capacity=capacity,
        policy=policy,
        load_model=federated.make_load_model(load, examples, capacity, config.model.top_k),
        local=local,
        fitness=federated.FitnessOptions(
            score, config.fitness.beta, config.fitness.initial, config.fitness.optimism
        ),
        server=server_optimizer(config.server),
        ownership=ownership,
        uplink=uplink,
        aggregator=aggregator,
        rows=network.asked,
        deficit_decay=config.assignment.deficit_decay,
        seed=config.seed,
        block_size=config.execution.client_block_size,
        mesh=mesh,
    )
    return Experiment(
        algorithm=algorithm,
        feed=make_feed(config.execution.data, clients, network.asked, mesh),
        label_share=federated.replicate(clients.label_share, mesh),
        test=federated.chunk_test_set(
            dataset.test_images, dataset.test_labels, config.eval.batch_size, mesh, owner
        ),
        classes=dataset.classes,
        label_counts=data.label_counts(dataset.train_labels, parts, dataset.num_classes),
        capacity=capacity,
        network=network,
        payload=federated.payload(owned.shared, owned.experts, uplink.compressor),
        inputs=inputs_of(config, dataset),
        personal=OWN_EXAMPLES if owner is not None else COMMON_EXAMPLES,
        notes=notes_on(dataset, config.partition.name) + notes_on_privacy(config.server),
    )


def make_feed(where: str, clients: data.ClientData, most: int, mesh: Mesh) -> data.Feed:
    """Training examples that stay on the devices, or are sent there cohort by cohort.

    Args:
      where: "device", "host", or "auto": on the device unless they took more than half its memory.
      clients: their examples, on the host.
      most: clients of the largest cohort.
      mesh: the devices.

    Raises:
      InputError: for another word.
    """
    if where not in ("auto", "device", "host"):
        raise InputError("execution.data", where, "choose one of auto, device, host")
    # None where a device does not say: a CPU.
    memory = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if where == "host" or (where == "auto" and memory and clients.images.nbytes > memory / 2):
        return data.feed_cohorts(clients, most, partial(federated.replicate, mesh=mesh))
    placed = federated.replicate(clients, mesh)
    return lambda cohort: placed


def load_partitioned(config: ConfigDict) -> tuple[data.Dataset, tuple[np.ndarray, ...]]:
    """Loads the data set and gives every training example to a client."""
    options = {
        "classes_per_client": config.partition.classes_per_client,
        "alpha": config.partition.alpha,
        "shards_per_client": config.partition.shards_per_client,
        "quantity_skew": config.partition.quantity_skew,
        "min_per_client": config.partition.min_per_client,
    }

    def accept(classes: int, examples: int, owners: int) -> None:
        data.check(
            config.partition.name,
            num_clients=config.clients.count,
            num_classes=classes,
            num_examples=examples,
            num_owners=owners,
            **options,
        )

    dataset = data.load(
        config.data.name,
        data_dir=config.data.dir or None,
        train_limit=config.data.train_limit,
        test_limit=config.data.test_limit,
        image_size=config.data.image_size,
        download=config.data.download,
        accept=accept,
    )
    parts = data.partition(
        config.partition.name,
        dataset.train_labels,
        config.clients.count,
        seed=config.seed,
        owner=dataset.train_clients,
        **options,
    )
    return dataset, parts


def inputs_of(config: ConfigDict, dataset: data.Dataset) -> dict[str, str]:
    """Hashes of what a run reads, by name: `data.train_images`, ..., `edge.tiers`.

    Args:
      config: of the run.
      dataset: as the run has it, within its limits.

    Raises:
      InputError: one of the user's files cannot be read.
    """
    found = {f"data.{name}": value for name, value in data.fingerprint(dataset).items()}
    if config.edge.tiers:
        tiers = [
            (tier.name, *map(float, tier[1:])) for tier in read_tiers(config.edge.tiers).values()
        ]
        found["edge.tiers"] = data.digest(np.array(repr(tiers)))
    if config.edge.availability not in AVAILABILITIES:
        record = read_record(config.edge.availability)
        found["edge.availability"] = data.digest(record.astype(bool))
    return found


def test_owner(dataset: data.Dataset, partition: str) -> np.ndarray | None:
    """The client (M,) that each test example is one of; None where clients have none of their own.

    Only natural clients are those who own the examples of the data set.
    """
    if partition != "natural" or dataset.train_clients is None or dataset.test_clients is None:
        return None
    return data.client_numbers(dataset.train_clients, dataset.test_clients)


def notes_on(dataset: data.Dataset, partition: str) -> tuple[str, ...]:
    """Sentences on what a user should know of the data before trusting the figures."""
    notes = [*dataset.notes, *data.doubts(dataset.train_images, dataset.test_images)]
    owned = {"train_clients": dataset.train_clients, "test_clients": dataset.test_clients}
    given = [name for name, ids in owned.items() if ids is not None]
    if partition == "natural" and dataset.test_clients is None:
        notes.append(
            "natural clients without test examples of their own (test_clients): personal accuracy "
            f"is that on the {COMMON_EXAMPLES}, which tells nothing of clients whose examples "
            "follow rules of their own"
        )
    elif partition != "natural" and given:
        notes.append(
            f"{' and '.join(given)} are not used: partition.name={partition} deals the examples "
            "out anew; natural keeps them with their owners"
        )
    return tuple(notes)


def notes_on_privacy(server: ConfigDict) -> tuple[str, ...]:
    """What a user should know of the noise before trusting its ε."""
    if not server.noise_multiplier or server.noise != "simulated":
        return ()
    return (
        "server.noise=simulated: whoever knows this config can draw the noise again, so it keeps "
        "nothing private; privacy/epsilon_simulated is what secret noise would give",
    )


def make_ownership(options: ConfigDict) -> models.Ownership:
    """Which parts of the model are averaged, and which stay with their clients."""
    if options.gate not in ("private", "shared"):
        raise InputError("model.gate", options.gate, "choose one of private, shared")
    private = tuple(part.strip() for part in options.private.split(",") if part.strip())
    return models.Ownership(private, options.gate == "shared")


def make_uplink(config: ConfigDict) -> federated.Uplink:
    """How updates reach the server."""
    server = config.server
    if server.noise_multiplier and not server.clip:
        remedy = "cut the updates too: without server.clip no noise makes them private"
        raise InputError("server.noise_multiplier", server.noise_multiplier, remedy)
    if not (server.norm_factor == 0 or 1 <= server.norm_factor < float("inf")):
        remedy = "choose 0 for none, or 1 or more"
        raise InputError("server.norm_factor", server.norm_factor, remedy)
    if server.noise not in ("secret", "simulated"):
        raise InputError("server.noise", server.noise, "choose one of secret, simulated")
    return federated.Uplink(
        compressor=federated.make_compressor(config.upload.compression, config.upload.kept),
        error_feedback=config.upload.error_feedback,
        quarantine=server.quarantine,
        norm_factor=server.norm_factor,
        norm_limit=server.norm_limit,
        clip=server.clip,
        noise_multiplier=server.noise_multiplier,
        simulated_noise=server.noise == "simulated",
    )


def make_aggregator(server: ConfigDict) -> federated.Aggregator | None:
    """How the server makes one update of many; None for the weighted mean."""
    aggregators: dict[str, federated.Aggregator | None] = {
        "mean": None,
        "median": partial(federated.trimmed_mean, trim=0.5),
        "trimmed_mean": partial(federated.trimmed_mean, trim=server.trim),
        "geometric_median": federated.geometric_median,
    }
    if server.aggregator not in aggregators:
        near, all_of_them = nearest(server.aggregator, aggregators), ", ".join(aggregators)
        remedy = f"did you mean {near}? choose one of {all_of_them}"
        raise InputError("server.aggregator", server.aggregator, remedy)
    if not 0 <= server.trim <= 0.5:
        raise InputError("server.trim", server.trim, "choose a number in [0, 0.5]")
    if server.noise_multiplier and server.aggregator != "mean":
        remedy = "its noise is reckoned for the mean: choose mean, or no noise_multiplier"
        raise InputError("server.aggregator", server.aggregator, remedy)
    return aggregators[server.aggregator]


def make_decay(name: str, rounds: int) -> optax.Schedule | None:
    """The factor on clients' steps by round: from 1 in the first towards 0 after the last."""
    decays = {
        "none": None,
        "linear": optax.linear_schedule(1.0, 0.0, rounds),
        "cosine": optax.cosine_decay_schedule(1.0, rounds),
    }
    if name not in decays:
        raise InputError("local.decay", name, f"choose one of {', '.join(decays)}")
    return decays[name]


def augmentation(name: str) -> data.Augmentation | None:
    """How training images are changed at random."""
    if name not in ("none", *data.AUGMENTATIONS):
        raise InputError(
            "local.augment", name, f"choose one of none, {', '.join(data.AUGMENTATIONS)}"
        )
    return data.AUGMENTATIONS.get(name)


def local_optimizer(options: ConfigDict) -> optax.GradientTransformation:
    """The clients' optimiser."""
    optimizer = _optimizer("local.optimizer", options)
    steps = [optax.clip_by_global_norm(options.clip_norm)] if options.clip_norm else []
    if options.proximal:
        steps.append(federated.proximal(options.proximal))
    steps.append(optimizer)
    if options.expert_rate != 1:
        steps.append(federated.scale_experts(options.expert_rate))
    return optax.chain(*steps)


def server_optimizer(options: ConfigDict) -> optax.GradientTransformation:
    """The server's optimiser of the mean update."""
    return _optimizer("server.optimizer", options)


def _optimizer(field: str, options: ConfigDict) -> optax.GradientTransformation:
    optimizers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "sgd": lambda: optax.sgd(options.learning_rate, options.momentum or None),
        "adam": lambda: optax.adam(options.learning_rate),
    }
    if options.optimizer not in optimizers:
        raise InputError(
            field,
            options.optimizer,
            f"did you mean {nearest(options.optimizer, optimizers)}? "
            f"choose one of {', '.join(optimizers)}",
        )
    return optimizers[options.optimizer]()
