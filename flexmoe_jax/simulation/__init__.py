"""Many clients as one program: the client's and the server's functions, mapped over blocks."""

from flexmoe_jax.simulation.blocks import (
    client_mesh,
    over_blocks,
    over_devices,
    replicate,
    resolve_block_size,
)
from flexmoe_jax.simulation.evaluate import TestSet, chunk_test_set, evaluate
from flexmoe_jax.simulation.plan import (
    Arrival,
    Floor,
    Tampering,
    assignment_slots,
    make_plan,
    sample_cohort,
    slots_assignment,
)
from flexmoe_jax.simulation.rounds import Simulation, run_round, simulate

__all__ = [
    "Arrival",
    "Floor",
    "Simulation",
    "Tampering",
    "TestSet",
    "assignment_slots",
    "chunk_test_set",
    "client_mesh",
    "evaluate",
    "make_plan",
    "over_blocks",
    "over_devices",
    "replicate",
    "resolve_block_size",
    "run_round",
    "sample_cohort",
    "simulate",
    "slots_assignment",
]
