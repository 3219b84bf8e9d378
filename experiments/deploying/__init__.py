"""Real clients: Flower's processes, and what the launchers `serve` and `join` have in common."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

from absl import flags

from flexmoe_jax.errors import InputError


def require_flower() -> None:
    """Refuses to go on without Flower.

    Raises:
      InputError: naming the extra that brings it.
    """
    if find_spec("flwr") is None:
        remedy = "real clients need Flower; install the extra: pip install 'flexmoe_jax[deploy]'"
        raise InputError("flwr", "not installed", remedy)


def show_log() -> None:
    """Shows what happens, with its time and level, on standard output.

    `--verbosity` says how much, as in all of absl's programs: 1 and 0 everything, -1 what went
    wrong, -2 what stays wrong. There is nothing secret in it: no keys, no examples, no parameters.
    """
    given = flags.FLAGS["verbosity"]
    level = logging.INFO
    if given.present and given.value is not None and given.value < 0:
        level = logging.WARNING if given.value == -1 else logging.ERROR
    log = logging.StreamHandler(sys.stdout)
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    for name in ("flexmoe_jax.deploy", "experiments.deploying"):
        ours = logging.getLogger(name)
        ours.setLevel(level)
        ours.propagate = False
        ours.addHandler(log)
