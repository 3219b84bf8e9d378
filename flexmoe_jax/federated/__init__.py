"""Federated training: the algorithm and the pure functions it is made of."""

from flexmoe_jax.federated.aggregate import (
    Aggregator,
    Sums,
    Updates,
    add_updates,
    apply_sums,
    geometric_median,
    init_server,
    init_sums,
    trimmed_mean,
)
from flexmoe_jax.federated.ahead import compile_ahead
from flexmoe_jax.federated.algorithm import (
    Algorithm,
    Arrival,
    FitnessOptions,
    Setting,
    flexmoe,
)
from flexmoe_jax.federated.client import (
    Batches,
    Client,
    ClientUpdate,
    LocalTraining,
    draw_batches,
    make_client,
    proximal,
    scale_experts,
)
from flexmoe_jax.federated.compress import COMPRESSIONS, Compressor, make_compressor
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
from flexmoe_jax.federated.network import FAULTS, Faults, Network, make_faults
from flexmoe_jax.federated.on_device import DeviceReport, round_on_device, run_on_device
from flexmoe_jax.federated.participation import (
    assignment_slots,
    make_plan,
    sample_cohort,
    slots_assignment,
)
from flexmoe_jax.federated.privacy import epsilon, privatise
from flexmoe_jax.federated.traffic import Payload, Traffic, payload, traffic, tree_bytes
from flexmoe_jax.federated.uplink import Delivery, Tampering, Uplink, deliver

__all__ = [
    "COMPRESSIONS",
    "FAULTS",
    "LOAD_MODELS",
    "Aggregator",
    "Algorithm",
    "Arrival",
    "Batches",
    "Client",
    "ClientUpdate",
    "CohortResult",
    "Compressor",
    "Delivery",
    "DeviceReport",
    "Faults",
    "FitnessOptions",
    "LoadModel",
    "LocalTraining",
    "Network",
    "Payload",
    "Setting",
    "Sums",
    "Tampering",
    "TestSet",
    "Traffic",
    "Updates",
    "Uplink",
    "accuracy_score",
    "add_updates",
    "apply_sums",
    "assignment_slots",
    "chunk_test_set",
    "client_mesh",
    "compile_ahead",
    "deliver",
    "draw_batches",
    "epsilon",
    "evaluate",
    "flexmoe",
    "geometric_median",
    "init_server",
    "init_sums",
    "loss_score",
    "make_client",
    "make_compressor",
    "make_faults",
    "make_load_model",
    "make_plan",
    "make_score",
    "payload",
    "privatise",
    "proximal",
    "replicate",
    "resolve_block_size",
    "round_on_device",
    "run_on_device",
    "sample_cohort",
    "scale_experts",
    "slots_assignment",
    "traffic",
    "train_cohort",
    "tree_bytes",
    "trimmed_mean",
    "update_fitness",
]
