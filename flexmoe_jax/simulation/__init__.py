"""Simulates many clients in one program: client and server functions mapped over client blocks."""

from flexmoe_jax.simulation.blocks import (
    client_mesh,
    over_blocks,
    over_devices,
    replicate,
    resolve_block_size,
)
from flexmoe_jax.simulation.evaluate import TestSet, chunk_test_set, evaluate
from flexmoe_jax.simulation.network import FAULTS, Faults, Network, make_faults
from flexmoe_jax.simulation.newcomers import Newcomers, await_newcomers
from flexmoe_jax.simulation.on_device import DeviceReport, round_on_device, run_on_device
from flexmoe_jax.simulation.plan import (
    Arrival,
    Floor,
    Tampering,
    assignment_slots,
    make_plan,
    sample_cohort,
    slots_assignment,
)
from flexmoe_jax.simulation.precompile import compile_ahead
from flexmoe_jax.simulation.probe import probe
from flexmoe_jax.simulation.rounds import Simulation, run_round, simulate
from flexmoe_jax.simulation.standalone import Standalone, assembled_model, client_model
from flexmoe_jax.simulation.traffic import (
    Payload,
    Traffic,
    payload,
    payloads,
    probe_traffic,
    traffic,
    tree_bytes,
)
from flexmoe_jax.types import Evaluation, Plan, RoundReport, State, Tally

__all__ = [
    "FAULTS",
    "Arrival",
    "DeviceReport",
    "Evaluation",
    "Faults",
    "Floor",
    "Network",
    "Newcomers",
    "Payload",
    "Plan",
    "RoundReport",
    "Simulation",
    "Standalone",
    "State",
    "Tally",
    "Tampering",
    "TestSet",
    "Traffic",
    "assembled_model",
    "assignment_slots",
    "await_newcomers",
    "chunk_test_set",
    "client_mesh",
    "client_model",
    "compile_ahead",
    "evaluate",
    "make_faults",
    "make_plan",
    "over_blocks",
    "over_devices",
    "payload",
    "payloads",
    "probe",
    "probe_traffic",
    "replicate",
    "resolve_block_size",
    "round_on_device",
    "run_on_device",
    "run_round",
    "sample_cohort",
    "simulate",
    "slots_assignment",
    "traffic",
    "tree_bytes",
]
