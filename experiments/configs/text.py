"""Python's own help texts, with topics assigned to clients: text that needs no file.

python -m experiments.train --config=experiments/configs/text.py --workdir=runs/text
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    """Returns the config: 20 clients with four topics each, which hold 2 of 8 experts."""
    config = base.get_config()
    config.rounds = 30
    config.data.name = "python_topics"
    config.task.name = "next_token"
    config.partition.name = "domains"
    config.partition.domains_per_client = 4
    config.clients.capacity = 2
    config.model.backbone = "transformer"
    config.local.batch_size = 8
    config.local.max_steps = 10
    config.local.optimizer = "adam"
    config.local.learning_rate = 0.003
    config.model.router = True
    config.local.balance = 0.05
    config.fitness.score = "loss"
    # Clients' updates show who should share an expert, so no random exploration is needed.
    config.fitness.affinity = 3.0
    config.fitness.evidence = 0.0  # topics overlap too much to be evidence
    config.assignment.exploration = 0.0
    config.eval.every = 5
    config.eval.batch_size = 64
    config.data.test_limit = 400
    return config
