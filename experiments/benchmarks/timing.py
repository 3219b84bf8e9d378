"""Seconds and floating-point rates, measured side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
from absl import flags
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.devices import prepare_devices
from flexmoe_jax.simulation.blocks import AXIS

_TURNS = 5
_TURN_SECONDS = 0.2  # that a turn of something quick lasts
_SLOW, _VERY_SLOW = 2.0, 10.0  # seconds a call


def set_up() -> None:
    """Prepares JAX as the launchers do: a CPU becomes a device a core."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    prepare_devices(0)


def interleave(contestants: Sequence[Callable[[], object]], warm_up: int = 2) -> list[list[float]]:
    """Seconds of each call of each contestant; they take turns, so that all meet the same machine.

    A quick contestant has five turns of several calls, one that takes over 2 s two turns of one,
    and one that takes over 10 s is called once only; it should have been compiled before.

    Args:
      contestants: each call ends when what it returns is computed.
      warm_up: calls that do not count; where the first is very slow, it counts instead.
    """
    first = [_seconds(contestant) for contestant in contestants]
    warm = [
        min([once, *(_seconds(contestant) for _ in range(warm_up - 1) if once <= _VERY_SLOW)])
        for once, contestant in zip(first, contestants, strict=True)
    ]
    seconds: list[list[float]] = [[once] if once > _VERY_SLOW else [] for once in first]
    for turn in range(_TURNS):
        for contestant, once, usual, taken in zip(contestants, first, warm, seconds, strict=True):
            if once <= _VERY_SLOW and (usual <= _SLOW or turn < 2):
                calls = max(1, min(10, int(_TURN_SECONDS / usual)))
                taken.extend(_seconds(contestant) for _ in range(calls))
    return seconds


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def compiled(function: Callable[..., object], *inputs: object) -> Callable[[], object]:
    """A call of a jittable function with these inputs that does not compile it any more."""
    return partial(jax.jit(function).lower(*inputs).compile(), *inputs)


def make_products(
    mesh: Mesh, side: int = 1024, count: int = 10
) -> tuple[Callable[[], object], int]:
    """Square float32 products on every device at once: what the machine can do at best.

    Args:
      mesh: the devices.
      side: of the matrices.
      count: products in a call, each of the one before with a fixed matrix.

    Returns:
      The call, and its floating-point operations.
    """
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    matrices = jax.random.normal(jax.random.key(0), (mesh.size * side, side)) / side**0.5

    @partial(jax.shard_map, mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec)
    def multiply(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, y: y @ x, x)

    flop = 2 * mesh.size * count * side**3
    return compiled(multiply, jax.device_put(matrices, sharding)), flop
