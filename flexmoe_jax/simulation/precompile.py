"""Makes the programs of a simulation ready concurrently, before their first call.

A program is compiled, or loaded if an earlier launch kept the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding
from jax.stages import Compiled, Lowered

from flexmoe_jax.compiling import ONCE, USUAL, compiler_options
from flexmoe_jax.data import About, ClientData
from flexmoe_jax.federation import Federation
from flexmoe_jax.simulation.blocks import WHOLE, resolve_block_size
from flexmoe_jax.simulation.evaluate import TestSet
from flexmoe_jax.simulation.rounds import Setting, Simulation
from flexmoe_jax.types import Evaluation, Params, Plan, PyTree, State


class ProgramCache(Protocol):
    """Keeps compiled programs for later launches.

    A program is identified by its name and by what it is made from: settings, functions, and shapes
    of its arguments.
    """

    def find(self, name: str, made_from: PyTree) -> Callable[[], Compiled] | None:
        """Returns a function that loads the program; None if there is none."""

    def compile(
        self, name: str, made_from: PyTree, lowered: Lowered, options: dict[str, Any]
    ) -> Compiled:
        """Compiles a program with these options, and keeps it if it can."""


class _Program(NamedTuple):
    """A program to make ready.

    Attributes:
      name: its name.
      lower: traces and lowers it; runs in the one thread that traces.
      level: the optimisation level to compile it with.
      arguments: the arguments that determine its shapes beside the settings.
    """

    name: str
    lower: Callable[[], Lowered]
    level: int
    arguments: PyTree = ()


def compile_ahead(
    simulation: Simulation,
    data: ClientData,
    test: TestSet,
    per_round: int,
    noise: bool = False,
    cache: ProgramCache | None = None,
) -> Simulation:
    """Starts to make `init`, `round` and `evaluate` ready in the background.

    XLA compiles a program mostly on one core, so compiling several programs at the same time takes
    little longer than compiling one.

    Args:
      simulation: from `simulate`.
      data: the client data that `round` will receive.
      test: the test set that `evaluate` will receive.
      per_round: P clients in a cohort.
      noise: whether faulty clients add noise to their updates (`Plan.noise`).
      cache: where programs of earlier launches are found; None to compile all of them.

    Returns:
      The simulation with the three functions bound to these shapes. A call waits until its program
      is ready. In a run with several processes, or if JAX is told not to compile
      (`JAX_DISABLE_JIT`), the simulation is returned unchanged.
    """
    if jax.process_count() > 1 or jax.config.values["jax_disable_jit"]:
        return simulation
    plan = _plan(simulation.setting, per_round, noise)
    programs = _programs(simulation, data, test, plan)
    rounds, initialised, judged = _make_ready(programs, simulation.setting, cache)

    def evaluate(
        state: State, test: TestSet, about: About, models: Params | None = None
    ) -> Evaluation:
        found: Evaluation = (
            judged.result()(state, test, about)
            if models is None
            else simulation.evaluate(state, test, about, models)
        )
        return found

    return simulation._replace(
        init=lambda key: initialised.result()(key),
        round=lambda state, data, plan: rounds.result()(state, data, plan),
        evaluate=evaluate,
    )


def _programs(
    simulation: Simulation, data: ClientData, test: TestSet, plan: Plan
) -> tuple[_Program, ...]:
    """Returns `round`, `init` and `evaluate`: first the one that takes the longest."""
    everywhere = NamedSharding(simulation.setting.mesh, WHOLE)
    plan = jax.tree.map(partial(_shape, sharding=everywhere), plan)
    init, run = _jitted(simulation.init), _jitted(simulation.round)
    judge = _jitted(simulation.evaluate)
    traced = cache(lambda: init.trace(jax.random.key(0)))

    def lower_round() -> Lowered:
        return run.lower(traced().out_info, data, plan)

    def lower_evaluate() -> Lowered:
        return judge.lower(traced().out_info, test, data.about)

    return (
        _Program("round", lower_round, USUAL, (data, plan)),
        _Program("init", lambda: traced().lower(), ONCE),
        _Program("evaluate", lower_evaluate, USUAL, (test, data.about)),
    )


def _make_ready(
    programs: tuple[_Program, ...], setting: Setting, cache: ProgramCache | None
) -> list[Future[Compiled]]:
    """Starts to load or to compile programs."""
    # Python traces one program at a time. XLA compiles the programs in other threads meanwhile.
    tracer, compiler = ThreadPoolExecutor(1), ThreadPoolExecutor()

    def start(program: _Program) -> Future[Compiled]:
        options = compiler_options(program.level)
        made_from = _settings(setting), jax.tree.map(_shape, program.arguments), options
        load = cache and cache.find(program.name, made_from)
        lowered = None if load else tracer.submit(program.lower)

        def make() -> Compiled:
            if load:
                try:
                    return load()
                except Exception as error:  # The backend can raise any exception.
                    logging.warning("A kept program is compiled anew: %s", error)
            found = lowered.result() if lowered else program.lower()
            if cache is None:
                return found.compile(options)
            return cache.compile(program.name, made_from, found, options)

        return compiler.submit(make)

    ready = [start(program) for program in programs]
    tracer.shutdown(wait=False)
    compiler.shutdown(wait=False)
    return ready


def _settings(setting: Setting) -> dict[str, Any]:
    """Returns what the programs are made from beside the shapes of their arguments.

    The host alone uses the policy and its seed, and of the clients' capacities and the sample the
    programs only have the shape. So federations that differ in these share their programs.
    """
    federation = setting.federation
    given = {field.name: getattr(federation, field.name) for field in fields(Federation)}
    for of_host in ("policy", "seed", "capacity"):
        del given[of_host]
    given["sample"] = jax.tree.map(_shape, federation.sample)
    given["load"] = federation.desk.load.measure
    devices = [device.id for device in setting.mesh.devices.flat]
    return given | {"floor": setting.floor, "mesh": (dict(setting.mesh.shape), devices)}


def _plan(setting: Setting, per_round: int, noise: bool) -> Plan:
    """Returns the shapes of a plan, which are the same in every round."""
    floor, federation = setting.floor, setting.federation
    size = resolve_block_size(floor.block_size, per_round, floor.devices)
    rows = floor._replace(rows=per_round, block_size=size).padded
    groups, experts = federation.groups, federation.layout.experts

    def numbers(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    secret = federation.admission.private and not federation.admission.simulated_noise
    use = numbers(rows, groups, floor.slots, dtype=jnp.float32)
    return Plan(
        clients=numbers(rows),
        slots=numbers(rows, groups, floor.slots),
        load=numbers(groups, experts, dtype=jnp.float32),
        steps=numbers(rows),
        tamper=numbers(rows, dtype=jnp.float32),
        noise=numbers(rows, dtype=jnp.float32) if noise else None,
        secret=numbers(2, dtype=jnp.uint32) if secret else None,
        use=use if federation.splits_use else None,
        alike=numbers(dtype=jnp.bool_) if federation.fitness.sketched else None,
    )


def _shape(leaf: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """Returns the shape, type and placement of an array."""
    placed = sharding or getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)


def _jitted(function: Callable[..., Any]) -> jax.stages.Wrapped:
    assert isinstance(function, jax.stages.Wrapped)
    return function
