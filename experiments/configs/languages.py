"""Eight languages, two per client: a byte-level decoder whose experts are assigned by fitness.

    python -m experiments.train --config=experiments/configs/languages.py \
        --config.data.dir=FOLDER --workdir=runs/languages

FOLDER holds a UTF-8 text file for each language, as `basque.txt`. Each client has 15 KB of each of
its two languages. The last tenth of every text is for testing.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import text


def get_config() -> ConfigDict:
    """Returns the config: 24 clients that hold 2 of 8 experts, 80 rounds of 10 steps."""
    config = text.get_config()
    config.rounds = 80
    config.data.name = "text"
    config.partition.domains_per_client = 2
    config.partition.bytes_per_client = 30_000
    config.clients.count = 24
    config.eval.every = 20
    config.data.test_limit = 800
    return config
