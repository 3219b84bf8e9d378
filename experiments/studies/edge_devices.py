"""The cost of policies on a mix of devices: simulated time and bytes, on EMNIST digits.

    python -m experiments.sweep --study=experiments/studies/edge_devices.py \
        --data_dir=TFDS_DIR --workdir=runs/edge_devices
    python -m experiments.table runs/edge_devices --target=0.6

TFDS_DIR holds `emnist/digits` as TFDS prepares it (array_record). Of 20 clients 8 are sensors, 8
phones and 4 gateways (flexmoe_jax/edge/tiers.toml), which come and go. The memory of a sensor
suffices to train 4 of the 8 experts; `full` ignores this limit and is the upper reference.
"""

from __future__ import annotations

from experiments.configs import emnist_digits
from experiments.studies.methods import choose
from experiments.studies.tasks import DATASETS, PARTITIONS
from experiments.studying.study import Study


def get_study() -> Study:
    """The 4-class partition, up to 10 clients a round."""
    devices = {
        "edge.mix": "sensor:2,phone:2,gateway:1",
        "edge.availability": "markov",
        "clients.capacity": "memory",
        "clients.per_round": 10,
        "local.max_steps": 8,
        "rounds": 120,
        "eval.every": 3,
        "data.test_limit": 2000,
    }
    return Study(
        name="edge_devices",
        config=emnist_digits.get_config,
        methods=choose("flex", "greedy", "random", "full"),
        datasets={"emnist_digits": {**DATASETS["emnist_digits"], **devices}},
        partitions={"k_class_4": PARTITIONS["k_class_4"]},
        seeds=(0, 1, 2),
    )
