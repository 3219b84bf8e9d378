from __future__ import annotations

import subprocess
import sys


def test_import_pulls_in_no_other_framework():
    heavy = (
        "tensorflow",
        "torch",
        "cvxpy",
        "ortools",
        "sklearn",
        "matplotlib",
        "tensorflow_datasets",
        "flwr",
    )
    code = (
        "import sys, flexmoe_jax.assignment, flexmoe_jax.data, flexmoe_jax.simulation\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_assignment_needs_no_flax():
    code = "import sys, flexmoe_jax.assignment; print('flax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
