"""What is learnt from, and how it is dealt out to clients."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options import option


@dataclass(frozen=True)
class DataOptions:
    """The data set."""

    name: str = option(
        "digits",
        "digits (embedded), python_topics (text of the Python installation), text (of data.dir), "
        "any TFDS data set, or a file.npz of your own; a relative one begins in dir",
    )
    dir: str = option("", "of prepared TFDS data, of text, or of your file.npz; empty for none")
    download: bool = option(False, "whether TFDS may fetch and prepare what is not there")
    train_limit: int = option(0, "examples, drawn evenly over classes; 0 for all", least=0)
    test_limit: int = option(0, "the same of the test examples", least=0)
    image_size: int = option(
        0,
        "side in pixels of uint8 images; 0 for the data set's own, or 32 if it varies",
        least=0,
        most=4096,
    )
    length: int = option(64, "tokens of an example of text", least=1, most=65536)


@dataclass(frozen=True)
class PartitionOptions:
    """Who has which examples."""

    name: str = option("dirichlet", "iid | k_class | dirichlet | shards | natural | domains")
    classes_per_client: int = option(4, "of k_class")
    alpha: float = option(0.3, "of dirichlet: small is skewed", kind=object)
    shards_per_client: int = option(2, "of shards")
    quantity_skew: float = option(
        0.0, "spread of client sizes on top of any partition", kind=object
    )
    min_per_client: int = option(10, "examples")
    domains_per_client: int = option(2, "of domains: texts that each client has a run of")
    bytes_per_client: int = option(
        0, "of domains: of all its texts together; 0 divides every text among its clients", least=0
    )
