"""Launchers of experiments; they hold no algorithm."""

import signal
import sys

from experiments.endings import at_once

# `python -m experiments.NAME` imports for seconds before it can do anything else about a Ctrl-C.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, at_once("ended at once"))
