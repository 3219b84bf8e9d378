"""Data sets and partitions that studies choose from: name to the config fields that define it."""

from __future__ import annotations

from experiments.configs import cifar10
from experiments.studying.study import Axis

DATASETS: Axis = {
    "digits": {"data.name": "digits"},
    "emnist_digits": {"data.name": "emnist/digits"},
    "emnist": {"data.name": "emnist/byclass"},
    "cifar10": {"data.name": "cifar10"},
    "gtsrb": {"data.name": "visual_domain_decathlon/gtsrb"},
}

# The same, small enough for two CPU cores: networks that train in minutes, batches of 16 examples.
_REDUCED = {"local.batch_size": 16, "data.test_limit": 4000}
SMALL: Axis = {
    "emnist_digits": {
        **DATASETS["emnist_digits"],
        **_REDUCED,
        "model.backbone": "mlp",
        "rounds": 40,
        "eval.every": 4,
    },
    "cifar10": {
        **DATASETS["cifar10"],
        **_REDUCED,
        **cifar10.TRAINING,
        "eval.every": 6,
    },
}

# The partitions of arXiv 2512.23070.
PARTITIONS: Axis = {
    "iid": {"partition.name": "iid"},
    "k_class_4": {"partition.name": "k_class", "partition.classes_per_client": 4},
    "dirichlet_0.8": {"partition.name": "dirichlet", "partition.alpha": 0.8},
}
