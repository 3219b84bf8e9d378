"""Measures seconds and floating-point rates side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
from absl import flags
from jax import lax
from jax.sharding import Mesh, NamedSharding

from experiments.devices import prepare_devices
from flexmoe_jax.simulation.blocks import ALONG_FIRST

_TURNS = 5
_TURN_SECONDS = 0.2  # length of a turn of a quick contestant
_SLOW, _VERY_SLOW = 2.0, 10.0  # seconds per call


def set_up() -> None:
    """Prepares JAX as the launchers do: a CPU is split into one device per core."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    prepare_devices(0)


def interleave(contestants: Sequence[Callable[[], object]], warm_up: int = 2) -> list[list[float]]:
    """Measures the seconds of each call of each contestant.

    Contestants take turns, so that all run under the same conditions. A quick contestant has five
    turns of several calls. One that takes over 2 s has two turns of one call. One that takes over
    10 s is called only once, so it should be compiled beforehand.

    Args:
      contestants: the calls to measure; a call ends when its result is computed.
      warm_up: calls that do not count; if the first is very slow, it counts and is the only one.
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
    """Compiles a jittable function for these inputs, and returns a call that runs it on them."""
    return partial(jax.jit(function).lower(*inputs).compile(), *inputs)


def make_products(
    mesh: Mesh, side: int = 1024, count: int = 10
) -> tuple[Callable[[], object], int]:
    """Makes a call that computes square float32 products on every device: the machine's best rate.

    Args:
      mesh: the devices.
      side: number of rows and columns of the matrices.
      count: products per call; each multiplies the previous product by a fixed matrix.

    Returns:
      The call, and its number of floating-point operations.
    """
    sharding = NamedSharding(mesh, ALONG_FIRST)
    matrices = jax.random.normal(jax.random.key(0), (mesh.size * side, side)) / side**0.5

    @partial(jax.shard_map, mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec)
    def multiply(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, y: y @ x, x)

    flop = 2 * mesh.size * count * side**3
    return compiled(multiply, jax.device_put(matrices, sharding)), flop
