"""Federated training: the algorithm and the pure functions it is made of."""

from flexmoe_jax.federated.aggregate import Sums, add_updates, apply_sums, init_server, init_sums
from flexmoe_jax.federated.ahead import compile_ahead
from flexmoe_jax.federated.algorithm import Algorithm, FitnessOptions, Setting, flexmoe
from flexmoe_jax.federated.client import Client, ClientUpdate, LocalTraining, make_client
from flexmoe_jax.federated.evaluate import TestSet, chunk_test_set, evaluate
from flexmoe_jax.federated.execute import (
    CohortResult,
    client_mesh,
    replicate,
    resolve_block_size,
    train_cohort,
)
from flexmoe_jax.federated.fitness import accuracy_score, loss_score, make_score, update_fitness
from flexmoe_jax.federated.load import LOAD_MODELS, LoadModel, make_load_model
from flexmoe_jax.federated.on_device import DeviceReport, round_on_device, run_on_device
from flexmoe_jax.federated.participation import (
    assignment_slots,
    make_plan,
    sample_cohort,
    slots_assignment,
)

__all__ = [
    "LOAD_MODELS",
    "Algorithm",
    "Client",
    "ClientUpdate",
    "CohortResult",
    "DeviceReport",
    "FitnessOptions",
    "LoadModel",
    "LocalTraining",
    "Setting",
    "Sums",
    "TestSet",
    "accuracy_score",
    "add_updates",
    "apply_sums",
    "assignment_slots",
    "chunk_test_set",
    "client_mesh",
    "compile_ahead",
    "evaluate",
    "flexmoe",
    "init_server",
    "init_sums",
    "loss_score",
    "make_client",
    "make_load_model",
    "make_plan",
    "make_score",
    "replicate",
    "resolve_block_size",
    "round_on_device",
    "run_on_device",
    "sample_cohort",
    "slots_assignment",
    "train_cohort",
    "update_fitness",
]
