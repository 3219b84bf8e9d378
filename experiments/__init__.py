"""Launchers for experiments. They contain no algorithms."""

import signal
import sys

from experiments.shutdown import at_once

# `python -m experiments.NAME` spends seconds on imports before it can handle Ctrl-C in another way.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, at_once("ended at once"))
