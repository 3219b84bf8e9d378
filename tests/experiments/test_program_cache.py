"""Compiled programs that a later launch finds without tracing them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from experiments import program_cache
from experiments.program_cache import DiskCache, open_cache
from tests.experiments.test_train import ROOT

# Adds one to an array, by the program in a cache if it is there.
PROGRAM = """
import sys
from pathlib import Path
import jax
from experiments.program_cache import DiskCache
cache = DiskCache(Path(sys.argv[1]))
load = cache.find("add", "one")
lowered = jax.jit(lambda x: {"sum": x + 1}).lower(jax.numpy.ones(3))
program = load() if load else cache.compile("add", "one", lowered, {})
print(bool(load), program(jax.numpy.arange(3.0))["sum"])
"""


def launch(folder):
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder / "launched")],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert process.stderr == ""
    return process.stdout.strip()


def test_another_process_finds_what_one_kept(tmp_path):
    assert launch(tmp_path) == "False [1. 2. 3.]"
    (kept,) = (tmp_path / "launched").iterdir()
    assert launch(tmp_path) == "True [1. 2. 3.]"
    # A damaged file is as good as none.
    content = kept.read_bytes()
    flipped = bytes([content[0] ^ 1]), bytes([content[-1] ^ 1])
    for damaged in (b"", content[:100], content[:-1] + flipped[1], flipped[0] + content[1:]):
        kept.write_bytes(damaged)
        assert launch(tmp_path) == "False [1. 2. 3.]"
    # The program now comes from JAX's cache, and could not be written again.
    kept.unlink()
    assert launch(tmp_path) == "False [1. 2. 3.]"
    assert not kept.exists()


@pytest.fixture
def here(tmp_path) -> Iterator[DiskCache]:
    """A cache beside one of JAX that is empty, too."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    compilation_cache.reset_cache()
    yield DiskCache(tmp_path / "launched")
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def keep(here, number, origin=None):
    lowered = jax.jit(lambda x: x + number).lower(jnp.ones(3))
    return here.compile("add", number if origin is None else origin, lowered, {})


def test_programs_are_told_apart_by_name_and_origin(here):
    keep(here, 1)
    keep(here, 2)
    assert here.find("add", 3) is None
    assert here.find("sub", 1) is None
    for number in (1, 2):
        np.testing.assert_array_equal(here.find("add", number)()(jnp.ones(3)), [1.0 + number] * 3)


def test_a_program_of_several_devices_is_found(here):
    mesh = jax.make_mesh((4,), ("clients",), devices=jax.devices()[2:6])
    split = NamedSharding(mesh, PartitionSpec("clients"))
    x = jax.device_put(jnp.arange(8.0), split)
    lowered = jax.jit(lambda x: x * x.sum(), out_shardings=split).lower(x)
    first = here.compile("sum", 0, lowered, {})(x)
    again = here.find("sum", 0)()(x)
    np.testing.assert_array_equal(again, first)
    assert again.sharding == first.sharding


def test_what_cannot_be_identified_is_not_kept(here):
    np.testing.assert_array_equal(keep(here, 1, object())(jnp.ones(3)), [2.0] * 3)
    assert here.find("add", object()) is None


def test_the_longest_unused_programs_make_room(here, monkeypatch):
    monkeypatch.setattr(program_cache, "_MOST", 2)
    for age, number in ((200, 1), (100, 2)):
        keep(here, number)
        os.utime(here._path("add", number), (age, age))
    assert here.find("add", 1)  # Used again, so the second is now the oldest.
    keep(here, 3)
    assert [bool(here.find("add", number)) for number in (1, 2, 3)] == [True, False, True]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(here, tmp_path):
    (tmp_path / "launched").touch()
    np.testing.assert_array_equal(keep(here, 1)(jnp.ones(3)), [2.0] * 3)
    assert here.find("add", 1) is None


@pytest.mark.parametrize("setting", ["jax_enable_compilation_cache", "jax_compilation_cache_dir"])
def test_there_is_no_cache_if_jax_keeps_no_programs(setting):
    before = jax.config.values[setting]
    assert open_cache() is not None
    try:
        jax.config.update(setting, False if setting.startswith("jax_enable") else None)
        assert open_cache() is None
    finally:
        jax.config.update(setting, before)
