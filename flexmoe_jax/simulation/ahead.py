"""Compiles the programs of a simulation concurrently, before their first call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from flexmoe_jax.compiling import ONCE, USUAL, compiler_options
from flexmoe_jax.data import About, ClientData
from flexmoe_jax.simulation.blocks import resolve_block_size
from flexmoe_jax.simulation.evaluate import TestSet
from flexmoe_jax.simulation.rounds import Simulation
from flexmoe_jax.types import Evaluation, Params, Plan, State


def compile_ahead(
    simulation: Simulation, data: ClientData, test: TestSet, per_round: int, noise: bool = False
) -> Simulation:
    """Starts to compile `init`, `round` and `evaluate` in the background.

    XLA compiles a program mostly on one core, so compiling several programs at the same time takes
    little longer than compiling one.

    Args:
      simulation: from `simulate`.
      data: the client data that `round` will receive.
      test: the test set that `evaluate` will receive.
      per_round: P clients in a cohort.
      noise: whether faulty clients add noise to their updates (`Plan.noise`).

    Returns:
      The simulation with the three functions bound to these shapes. A call waits until its program
      is compiled. In a run with several processes, or if JAX is told not to compile
      (`JAX_DISABLE_JIT`), the simulation is returned unchanged.
    """
    if jax.process_count() > 1 or jax.config.values["jax_disable_jit"]:
        return simulation

    def place(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=state.server.round.sharding)

    init = _jitted(simulation.init).lower(jax.random.key(0))
    state = init.out_info
    plan = jax.tree.map(place, _plan_shapes(simulation, state, per_round, noise))
    # Python traces one program at a time, the longest one (`round`) first. XLA compiles the
    # programs in other threads meanwhile.
    tracer, compiler = ThreadPoolExecutor(1), ThreadPoolExecutor()

    def start(lower: Callable[[], jax.stages.Lowered], level: int) -> Callable[..., Any]:
        options, lowered = compiler_options(level), tracer.submit(lower)
        program = compiler.submit(lambda: lowered.result().compile(options))
        return lambda *arguments: program.result()(*arguments)

    run, judge = _jitted(simulation.round), _jitted(simulation.evaluate)
    initialised = start(lambda: init, ONCE)
    rounds = start(lambda: run.lower(state, data, plan), USUAL)
    judged = start(lambda: judge.lower(state, test, data.about), USUAL)

    def evaluate(
        state: State, test: TestSet, about: About, models: Params | None = None
    ) -> Evaluation:
        found: Evaluation = (
            judged(state, test, about)
            if models is None
            else simulation.evaluate(state, test, about, models)
        )
        return found

    ready = simulation._replace(init=initialised, round=rounds, evaluate=evaluate)
    tracer.shutdown(wait=False)
    compiler.shutdown(wait=False)
    return ready


def _plan_shapes(simulation: Simulation, state: State, per_round: int, noise: bool) -> Plan:
    """Returns the shapes of a plan, which are the same in every round."""
    floor, admission = simulation.setting.floor, simulation.setting.federation.admission
    size = resolve_block_size(floor.block_size, per_round, floor.devices)
    rows = floor._replace(rows=per_round, block_size=size).padded

    def numbers(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    secret = admission.private and not admission.simulated_noise
    return Plan(
        clients=numbers(rows),
        slots=numbers(rows, *state.clients.slots.shape[1:]),
        load=numbers(*state.server.ledger.load.shape, dtype=jnp.float32),
        steps=numbers(rows),
        tamper=numbers(rows, dtype=jnp.float32),
        noise=numbers(rows, dtype=jnp.float32) if noise else None,
        secret=numbers(2, dtype=jnp.uint32) if secret else None,
    )


def _jitted(function: Callable[..., Any]) -> jax.stages.Wrapped:
    assert isinstance(function, jax.stages.Wrapped)
    return function
