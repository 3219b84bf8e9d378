"""The main example: scikit-learn's digits, 20 clients with mixed capacities of 1 to 4 of 8 experts.

    python -m experiments.train --config=experiments/configs/digits.py --workdir=runs/digits

Seeds 0 to 2 reached on average 99.0 % personal, 98.0 % client-global and 98.4 % server accuracy, in
about half a minute on two CPU cores, compilation included.
"""

from __future__ import annotations

from ml_collections.config_dict import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """Returns the config: a Dirichlet(0.3) partition of 1,797 images, without any download."""
    config = base.get_config()
    config.fitness.affinity = 1.0  # counts once updates show that clients are of several kinds
    config.rounds = 40
    config.local.epochs = 2
    config.local.batch_size = 10
    config.local.clip_norm = 5.0  # ends the rare spikes of the loss
    return config
