"""The paper's comparison (arXiv 2512.23070): ResNet, three data sets, three partitions, five seeds.

    python -m experiments.sweep --study=experiments/studies/paper_full.py \
        --data_dir=TFDS_DIR --workdir=runs/paper_full --runner=slurm --count=64 --gpus=1

TFDS_DIR holds `cifar10`, `emnist/byclass` and `visual_domain_decathlon/gtsrb` as TFDS prepares them
(array_record). For GPUs or TPUs. The paper states data sets, partitions, experts and the kind of
network; clients, rounds, capacity, depth and optimiser are choices of ours.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base
from experiments.studies.methods import METHODS
from experiments.studies.tasks import DATASETS, PARTITIONS
from experiments.studying.study import Study


def get_config() -> ConfigDict:
    """100 clients, 20 a round, that hold 2 of 8 experts; 200 rounds of one local epoch."""
    config = base.get_config()
    config.rounds = 200
    config.clients.count = 100
    config.clients.per_round = 20
    config.clients.capacity = 2
    config.model.backbone = "resnet"
    config.model.depth = 20
    config.local.momentum = 0.9
    config.local.learning_rate = 0.05
    config.local.expert_rate = 4.0  # as in configs/cifar10.py
    config.local.clip_norm = 1.0  # the first steps are the largest
    config.local.decay = "cosine"
    config.eval.every = 10
    return config


def get_study() -> Study:
    """All methods."""
    # Digits and traffic signs are not mirrored, since that can change their class.
    return Study(
        name="paper_full",
        config=get_config,
        methods=METHODS,
        datasets={
            "cifar10": {**DATASETS["cifar10"], "local.augment": "crop_flip"},
            "emnist": DATASETS["emnist"],
            "gtsrb": {**DATASETS["gtsrb"], "local.augment": "crop"},
        },
        partitions=PARTITIONS,
        seeds=(0, 1, 2, 3, 4),
    )
