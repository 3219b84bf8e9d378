"""Settings and fixtures that all tests share."""

from __future__ import annotations

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests compile the same programs, some of them in processes of their own. Reading one, even of
# the smallest, takes less than half of compiling it; how long that took depends on what else runs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# XLA's newer code generator compiles a round three times as long as the older one, which is gone in
# JAX 0.12, and to cut a program into pieces that compile side by side costs small ones a tenth of
# their time.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        *(
            ["--xla_cpu_use_fusion_emitters=false"]
            if int(version("jax").split(".")[1]) < 12
            else []
        ),
        "--xla_cpu_parallel_codegen_split_count=1",
    )
).strip()

import hypothesis
import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401

# Shapes in annotations are checked whenever tests run, and cost users nothing.
install_import_hook(
    ["flexmoe_jax.client", "flexmoe_jax.models", "flexmoe_jax.server"], "tests.shapes.only_shapes"
)

from flexmoe_jax import data  # noqa: E402

# Whoever starts the tests in the background has these ignored, which the launchers under test
# would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Tests compile far more than they compute, and so do the processes that they start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update("jax_disable_most_optimizations", True)
# A computation uses more than one of them only if its mesh says so.
jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes objects by the million, nearly all of which live on.
gc.set_threshold(200_000, 50, 100)
hypothesis.settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("default")

LONGEST = tuple(
    Path(__file__).parent / f"{name}.py"
    for name in (
        *("deploy/test_federation", "experiments/test_faults", "experiments/test_train"),
        *("simulation/test_precision", "experiments/test_edge", "simulation/test_rounds"),
        *("experiments/test_report", "simulation/test_defences", "experiments/test_damage"),
        *("experiments/test_export", "experiments/test_sweep", "experiments/test_processes"),
        *("simulation/test_on_device", "test_examples", "deploy/test_flower"),
    )
)
"""Files that start many processes or compile many programs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts slow files first, so that no worker is left with one when the others are done."""
    items.sort(key=lambda item: item.path not in LONGEST)


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    """Returns 300 real digits for training, of all 10 classes."""
    return data.load(data.DataOptions("digits", train_limit=300, test_limit=100))


CAPACITY = np.array([1, 3, 2, 1, 2, 3, 1])
"""Experts that each of the seven clients below has room for."""


@pytest.fixture(scope="session")
def clients(digits: data.Dataset) -> data.ClientData:
    """Returns the digits, distributed unevenly over seven clients."""
    options = data.PartitionOptions("dirichlet", alpha=0.3, min_per_client=1)
    parts = data.partition(options, digits.train_labels, len(CAPACITY), seed=0)
    return data.build_clients(digits, parts)
