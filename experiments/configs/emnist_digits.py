"""EMNIST digits with the paper's 4-class partition; 20 clients hold 2 of 8 experts each.

python -m experiments.train --config=experiments/configs/emnist_digits.py \
        --config.data.dir=TFDS_DIR --workdir=runs/emnist_digits

TFDS_DIR is a folder with the data set as TFDS prepares it (array_record).
"""

from __future__ import annotations

from ml_collections.config_dict import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """Returns the config: 16 local steps per round of Adam; SGD learns far more slowly here."""
    config = base.get_config()
    config.fitness.affinity = 1.0  # counts once updates show that clients are of several kinds
    config.rounds = 20
    config.data.name = "emnist/digits"
    config.partition.name = "k_class"
    config.clients.capacity = 2
    config.local.max_steps = 16
    config.local.optimizer = "adam"
    config.local.learning_rate = 0.002
    return config
