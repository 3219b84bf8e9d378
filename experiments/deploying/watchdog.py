"""Runs a command and ends it when standard input closes, whatever closed the other end.

python -m experiments.deploying.watchdog COMMAND [ARGUMENTS]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

# Seconds that a command has to end after SIGTERM.
_PATIENCE = 5.0


def main() -> int:
    """Runs the command to its end and returns its exit code."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, process_group=0)

    def end(number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        end(signal.SIGTERM)
        timer = threading.Timer(_PATIENCE, end, [signal.SIGKILL])
        timer.daemon = True
        timer.start()

    threading.Thread(target=watch, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda given, frame: end(signal.SIGTERM))
    code = child.wait()
    end(signal.SIGKILL)  # Processes that the command started must not outlive it.
    return code


if __name__ == "__main__":
    sys.exit(main())
