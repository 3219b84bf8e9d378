"""Benchmarks: `python -m experiments.bench SUITE` prints one JSON object per line.

Each suite is a module of `experiments.benchmarks`; its docstring explains the figures:

- `assignment`: solvers, by problem size; `assignment SOLVER CLIENTS EXPERTS LOAD` for one case.
- `clients`: a training round compared with a naive round, by workload; `clients W1` for one
  workload, and `clients W1 alone` without the naive round, which is slow.
- `startup`: time from launch to the first round, before and after programs are compiled.
- `moe`: the cost of the mixture for a client, and three ways to compute its experts.
- `evaluate`: evaluation of all clients' models on a test set, compared with running each whole
  model.
- `scale`: rounds of a federation of 100,000 clients; `scale P` for one cohort size.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys

from flexmoe_jax.errors import InputError

SUITES = ("assignment", "clients", "startup", "moe", "evaluate", "scale")


def main(arguments: list[str]) -> int:
    """Runs the suite named on the command line and returns the exit code."""
    try:
        if {"-h", "-help", "--help"} & set(arguments):
            print(__doc__, flush=True)
            return 0
        if not arguments or arguments[0] not in SUITES:
            raise InputError("suite", " ".join(arguments), f"give one of {', '.join(SUITES)}")
        # Import only this suite: a solver that does not need JAX would be charged for its memory.
        suite = importlib.import_module(f"experiments.benchmarks.{arguments[0]}")
        for figures in suite.run(arguments[1:]):
            print(json.dumps(figures), flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "backend" not in str(error):
            raise
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        # A process of the suite failed and has already printed the reason.
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except OSError as error:
        # No reader is left, so stop instead of measuring for minutes; discard buffered output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        print(f"{error.filename or 'stdout'}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
