"""Options of the data set, and of how its examples are divided among clients."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options.record import Options, option


@dataclass(frozen=True)
class DataOptions(Options, section="data"):
    """The data set."""

    name: str = option(
        "digits",
        "digits (embedded), python_topics (text of the Python installation), text (of data.dir: a "
        "folder of *.txt, one a domain, or a .jsonl file), any TFDS data set of images with labels "
        "or, for next_token, of text, or a file.npz of your own",
    )
    dir: str = option(
        "",
        "of prepared TFDS data, empty for TFDS's own default; of text; a relative file.npz begins "
        "there, too",
    )
    download: bool = option(False, "whether TFDS may fetch and prepare what is not there")
    train_limit: int = option(0, "examples, drawn evenly over classes; 0 for all", least=0)
    test_limit: int = option(0, "the same of the test examples", least=0)
    image_size: int = option(
        0,
        "side in pixels of uint8 images; 0 for the data set's own, or 32 if it varies",
        least=0,
        # Larger images do not fit into memory, or the run finds that out only after a long time.
        most=4096,
    )
    length: int = option(64, "tokens of an example of text", least=1)
    domain: str = option(
        "",
        "feature of a TFDS data set of text whose values are its domains (an author, say); empty "
        "for its class label, or without one a single domain",
    )


@dataclass(frozen=True)
class PartitionOptions(Options, section="partition"):
    """The partition of the examples among clients."""

    name: str = option("dirichlet", "iid | k_class | dirichlet | shards | natural | domains")
    classes_per_client: int = option(4, "of k_class", least=1, where=("name", "k_class"))
    alpha: float = option(
        0.3, "of dirichlet: small is skewed", above=0, where=("name", "dirichlet")
    )
    shards_per_client: int = option(2, "of shards", least=1, where=("name", "shards"))
    quantity_skew: float = option(
        0.0, "spread of client sizes on top of any partition; 0 for none", least=0
    )
    min_per_client: int = option(10, "examples", least=1)
    rule: str = option(
        "none",
        "what differs between clients in the same picture, on top of any partition: how it is "
        "turned (by 0 to 270 degrees), or what it is called (one of four permutations of labels)",
        choices=("none", "turned", "relabelled"),
    )
    rules_per_client: int = option(1, "of four, that a client's examples follow", least=1, most=4)
    domains_per_client: int = option(2, "of domains: texts that each client has a run of", least=1)
    bytes_per_client: int = option(
        0,
        "of domains: of all its texts together; 0 to divide every text among its clients",
        least=0,
    )
