"""Real clients: Flower's processes, and code that the launchers `serve` and `join` share."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

from absl import flags

from flexmoe_jax.errors import InputError


def require_flower() -> None:
    """Checks that Flower is installed.

    Raises:
      InputError: Flower is missing; the message names the extra that installs it.
    """
    if find_spec("flwr") is None:
        remedy = "real clients need Flower; install the extra: pip install 'flexmoe_jax[deploy]'"
        raise InputError("flwr", "not installed", remedy)


def show_log() -> None:
    """Prints the log to standard output, with time and level.

    `--verbosity` sets the level, as in all absl programs: 1 and 0 print everything, -1 warnings and
    errors, and -2 errors. The log has no secrets: no keys, no examples, no parameters.
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
