"""CIFAR-10, set up as EMNIST digits are: the paper's 4-class partition, 2 of 8 experts a client.

    python -m experiments.train --config=experiments/configs/cifar10.py \
        --config.data.dir=TFDS_DIR --workdir=runs/cifar10

TFDS_DIR is a folder with the data set as TFDS prepares it (array_record).
"""

from __future__ import annotations

from ml_collections.config_dict import ConfigDict

from experiments.configs import emnist_digits

# Gradients are cut: the first steps are the largest, and without, they can leave units that never
# fire again. Adam, which starts anew every round, learned far more slowly.
TRAINING = {
    "rounds": 48,
    "model.backbone": "cnn",
    "local.optimizer": "sgd",
    "local.learning_rate": 0.1,
    "local.expert_rate": 4.0,  # each of a client's two experts sees half of the images, at p = 1/2
    "local.momentum": 0.9,
    "local.clip_norm": 1.0,
    "local.decay": "cosine",
}


def get_config() -> ConfigDict:
    """16 local steps a round, by SGD with momentum."""
    config = emnist_digits.get_config()
    config.data.name = "cifar10"
    config.update_from_flattened_dict(TRAINING)
    return config
