"""Compiles a federation's programs side by side, before they are first called."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from flexmoe_jax.data import ClientData
from flexmoe_jax.federated.algorithm import Algorithm, Setting
from flexmoe_jax.federated.evaluate import TestSet
from flexmoe_jax.federated.execute import resolve_block_size
from flexmoe_jax.types import Plan, State


def compile_ahead(
    algorithm: Algorithm, data: ClientData, test: TestSet, per_round: int, noise: bool = False
) -> Algorithm:
    """Starts to compile `init`, `round` and `evaluate`, while the caller goes on.

    XLA compiles a program mostly on one core, so several at a time take little longer than one.

    Args:
      algorithm: from `flexmoe`.
      data: that `round` will be given.
      test: that `evaluate` will be given.
      per_round: P clients in a cohort.
      noise: whether some clients drown their updates in noise (`Plan.noise`).

    Returns:
      The algorithm with the three functions bound to these shapes; a call waits for its program.
      In a run over several processes, and where JAX is told not to compile
      (`JAX_DISABLE_JIT`), the algorithm as it is.
    """
    if jax.process_count() > 1 or jax.config.values["jax_disable_jit"]:
        return algorithm
    setting = algorithm.setting

    def like(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=data.index.sharding)

    init = _jitted(algorithm.init).lower(jax.random.key(0))
    state = jax.tree.map(like, init.out_info)
    plan = jax.tree.map(like, _plan_shapes(setting, state, per_round, noise))
    # Tracing is Python, one at a time: the longest program first, while XLA compiles the others.
    tracer, compiler = ThreadPoolExecutor(1), ThreadPoolExecutor()
    # On a CPU, XLA's own level 3 compiles longer than 2 for code no quicker. What runs once is
    # done with even less.
    on_cpu = jax.default_backend() == "cpu"

    def start(lower: Callable[[], jax.stages.Lowered], level: int) -> Callable[..., Any]:
        options: dict[str, Any] = {"xla_backend_optimization_level": level} if on_cpu else {}
        lowered = tracer.submit(lower)
        program = compiler.submit(lambda: lowered.result().compile(options))
        return lambda *arguments: program.result()(*arguments)

    ready = algorithm._replace(
        init=start(lambda: init, 1),
        round=start(lambda: _jitted(algorithm.round).lower(state, data, plan), 2),
        evaluate=start(lambda: _jitted(algorithm.evaluate).lower(state, test, data.label_share), 2),
    )
    tracer.shutdown(wait=False)
    compiler.shutdown(wait=False)
    return ready


def _plan_shapes(setting: Setting, state: State, per_round: int, noise: bool) -> Plan:
    """Shapes of the plan of every round; `state` holds shapes, too."""

    def shape(*sizes: int, kind: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(sizes, kind)

    together = setting.devices * resolve_block_size(setting.block_size, per_round, setting.devices)
    padded = -(-per_round // together) * together
    return Plan(
        clients=shape(padded),
        slots=shape(padded, state.slots.shape[1]),
        load=state.load,
        steps=shape(padded),
        tamper=shape(padded, kind=jnp.float32),
        noise=shape(padded, kind=jnp.float32) if noise else None,
        secret=shape(2, kind=jnp.uint32) if setting.secret else None,
    )


def _jitted(function: Callable[..., Any]) -> jax.stages.Wrapped:
    assert isinstance(function, jax.stages.Wrapped)
    return function
