"""CIFAR-10, set up like EMNIST digits: the paper's 4-class partition, 2 of 8 experts per client.

    python -m experiments.train --config=experiments/configs/cifar10.py \
        --config.data.dir=TFDS_DIR --workdir=runs/cifar10

TFDS_DIR is a folder with the data set as TFDS prepares it (array_record).
"""

from __future__ import annotations

from ml_collections.config_dict import ConfigDict

from experiments.configs import emnist_digits

# Gradients are clipped: the first steps are the largest, and without clipping they can leave units
# that never activate again. Adam, whose state is reset every round, learned far more slowly.
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
    """Returns the config: 16 local steps per round of SGD with momentum."""
    config = emnist_digits.get_config()
    config.data.name = "cifar10"
    config.update_from_flattened_dict(TRAINING)
    return config
