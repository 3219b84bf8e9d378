"""Makes the clients' training and test examples from the config's fields about data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.fields import read
from flexmoe_jax import data
from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Array

# Descriptions of the data that personal figures are measured on.
OWN_EXAMPLES = "clients' own test examples"
OWN_DOMAINS = "test text of each client's own domains"
OWN_RULES = "test examples of each client's own rules and classes"
COMMON_EXAMPLES = "common test set, weighted to each client's label shares"


@dataclass(frozen=True)
class Newcomers:
    """Clients that are kept out of training. The arrays are on the host.

    Attributes:
      clients: the newcomers' training examples; only a few of them are used to probe experts.
      group: as in `Examples`, with newcomers numbered from 0.
    """

    clients: data.ClientData
    group: np.ndarray | None


@dataclass(frozen=True)
class Examples:
    """The training and test examples. The arrays are on the host.

    Attributes:
      clients: training examples and their owners; newcomers are left out, here and below.
      test: named test examples, leaves (M, ...).
      group: (M,) int, the group of each test example (see `data.About`); None for no groups.
      classes: names of the Y classes, or of the F domains of text.
      counts: (C, Y) training examples of each client by class or domain; None if only the clients
        know.
      prepare: maps raw inputs to the inputs that the model takes.
      hashes: hashes of the data that were read, by name.
      personal: description of the data that personal figures are measured on.
      notes: sentences that a user should read before trusting the figures.
      newcomers: clients that are kept out of training; None for none.
      ids: (C,) who the clients are, in the data set or the federation; None if nobody says.
    """

    clients: data.ClientData
    test: dict[str, np.ndarray]
    group: np.ndarray | None
    classes: tuple[str, ...]
    counts: np.ndarray | None
    prepare: Callable[[Array], Array]
    hashes: Mapping[str, str]
    personal: str
    notes: tuple[str, ...] = ()
    newcomers: Newcomers | None = None
    ids: np.ndarray | None = None

    @property
    def sample(self) -> dict[str, Any]:
        """The first two of the clients' examples."""
        return {name: np.asarray(values[:2]) for name, values in self.clients.arrays.items()}


def load_examples(config: ConfigDict) -> Examples:
    """Loads the data set of the config, and assigns every training example to a client.

    Raises:
      InputError: naming the field, the value and the remedy.
    """
    return _apart(_of_everybody(config), config)


def _of_everybody(config: ConfigDict) -> Examples:
    name, told = config.data.name, config.task.name == "next_token"
    if told and data.is_pictures(name):
        raise InputError("task.name", "next_token", f"is learnt from text: data.name={data.TEXT}")
    if name in (data.TEXT, data.TOPICS) and not told:
        raise InputError("task.name", config.task.name, "text takes next_token")
    if told and config.partition.rule != "none":
        remedy = "rules are of labelled pictures: choose none"
        raise InputError("partition.rule", config.partition.rule, remedy)
    if told and config.assignment.diversity:
        remedy = "text has no labels by which clients differ: give 0"
        raise InputError("assignment.diversity", config.assignment.diversity, remedy)
    if told:
        return _text(config)
    if config.partition.name == "domains":
        remedy = f"deals out text (data.name={data.TEXT}); choose another"
        raise InputError("partition.name", "domains", remedy)
    return _images(config)


def _images(config: ConfigDict) -> Examples:
    read_as, parts = load_partitioned(config)
    dataset, owns, notes = read_as, None, notes_on(read_as, config.partition.name)
    owner, personal = test_owner(dataset, config.partition.name), COMMON_EXAMPLES
    if owner is not None:
        personal = OWN_EXAMPLES
    if config.partition.rule != "none":
        options = read(data.PartitionOptions, config)
        dataset, owner, owns, ceiling = data.follow_rules(options, read_as, parts, config.seed)
        personal, notes = OWN_RULES, (*notes, *notes_on_rules(config.partition.rule, ceiling))
    owners = dataset.train_clients if config.partition.name == "natural" else None
    trained = dataset.train_images
    if config.clients.newcomers:
        # Newcomers' data are unknown during training: leave them out of the mean and deviation.
        numbers, _ = split_clients(config)
        trained = trained[np.sort(np.concatenate([parts[c] for c in numbers]))]
    clients = data.build_clients(dataset, parts, place=np.asarray)
    return Examples(
        clients=clients.replace(owns=owns),  # type: ignore[attr-defined]
        test={"images": dataset.test_images, "labels": dataset.test_labels.astype(np.int32)},
        group=owner,
        classes=dataset.classes,
        counts=data.label_counts(dataset.train_labels, parts, dataset.num_classes),
        prepare=data.standardise(trained),
        hashes=data.fingerprint(read_as),
        personal=personal,
        notes=notes,
        ids=None if owners is None else np.unique(owners),
    )


def _text(config: ConfigDict) -> Examples:
    corpus, options = data.load_corpus(read(data.DataOptions, config)), config.partition
    if options.name != "domains":
        remedy = "text is dealt out by domains: set partition.name=domains"
        raise InputError("partition.name", options.name, remedy)
    dealt = data.deal_domains(
        corpus,
        config.clients.count,
        config.data.length,
        domains_per_client=options.domains_per_client,
        bytes_per_client=options.bytes_per_client,
        seed=config.seed,
    ).limited(config.data.train_limit, config.data.test_limit)
    texts = (*corpus.texts, *corpus.tests)
    known = {
        "domains": np.asarray(corpus.names),
        "bytes": np.asarray([len(text) for text in texts], np.int64),
        "texts": np.concatenate(texts),
    }
    return Examples(
        clients=data.join({"tokens": dealt.train}, dealt.parts, None, dealt.owns, np.asarray),
        test={"tokens": dealt.test},
        group=dealt.domain,
        classes=corpus.names,
        counts=dealt.counts(),
        prepare=lambda tokens: tokens,
        hashes={name: data.digest(array) for name, array in known.items()},
        personal=OWN_DOMAINS,
    )


def notes_on_rules(name: str, ceiling: float) -> tuple[str, ...]:
    """Returns a note on the accuracy limit of any model that is the same for all clients."""
    if ceiling == 1:
        return ()
    return (
        f"partition.rule={name}: the same picture has another label under every rule, so that a "
        "model that knows the picture alone is right on at most "
        f"{100 * ceiling:.1f} % of the common test set",
    )


def split_clients(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the training clients and of the newcomers, each in rising order."""
    return data.draw_newcomers(config.clients.count, config.clients.newcomers, config.seed)


def _apart(examples: Examples, config: ConfigDict) -> Examples:
    """Separates newcomers from the clients that train; each set is renumbered from 0."""
    trained, coming = split_clients(config)
    if not coming.size:
        if shortlist := config.clients.shortlist:
            remedy = "there are no newcomers: give clients.newcomers, or 0"
            raise InputError("clients.shortlist", shortlist, remedy)
        return examples

    def group_of(numbers: np.ndarray) -> np.ndarray | None:
        if examples.group is None or examples.clients.owns is not None:
            return examples.group
        # The last entry stands for test rows without an owner, which have group -1.
        place = np.full(config.clients.count + 1, -1, np.int32)
        place[numbers] = np.arange(len(numbers))
        return place[examples.group]

    return replace(
        examples,
        clients=examples.clients.of(trained),
        group=group_of(trained),
        counts=None if examples.counts is None else examples.counts[trained],
        newcomers=Newcomers(examples.clients.of(coming), group_of(coming)),
        ids=None if examples.ids is None else examples.ids[trained],
    )


def load_partitioned(config: ConfigDict) -> tuple[data.Dataset, tuple[np.ndarray, ...]]:
    """Loads an image data set and assigns every training example to a client."""
    options, clients = read(data.PartitionOptions, config), config.clients.count

    def accept(classes: int, examples: int, owners: int) -> None:
        data.check(
            options,
            num_clients=clients,
            num_classes=classes,
            num_examples=examples,
            num_owners=owners,
        )

    dataset = data.load(read(data.DataOptions, config), accept=accept)
    parts = data.partition(
        options, dataset.train_labels, clients, seed=config.seed, owner=dataset.train_clients
    )
    return dataset, parts


def test_owner(dataset: data.Dataset, partition: str) -> np.ndarray | None:
    """Returns the owner (M,) of each test example; None if clients have no test examples.

    Only in a natural partition are the clients the owners of the data set's examples.
    """
    if partition != "natural" or dataset.train_clients is None or dataset.test_clients is None:
        return None
    return data.client_numbers(dataset.train_clients, dataset.test_clients)


def notes_on(dataset: data.Dataset, partition: str) -> tuple[str, ...]:
    """Returns notes on the data that a user should read before trusting the figures."""
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
