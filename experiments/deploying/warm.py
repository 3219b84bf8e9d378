"""Starts Flower's client apps without loading Flower each time.

Flower starts a process for every message to a client, and that process needs 1.6 CPU-seconds to
load Flower, more than many clients need to train. Here, one process loads it once and forks for
each message. Flower finds `flwr-clientapp` on its PATH: a command of ours, which hands its words to
that process, or, should it not be there, becomes Flower's own command.

python -m experiments.deploying.warm SOCKET                   loads Flower and forks
python -ISE experiments/deploying/warm.py SOCKET REAL ...     hands over the words after REAL
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
from pathlib import Path

COMMAND = "flwr-clientapp"


def write_command(folder: Path, address: Path, real: Path) -> None:
    """Writes the command that Flower finds.

    Args:
      folder: to be put first on Flower's PATH; made here.
      address: socket of the process that forks.
      real: Flower's own command.
    """
    folder.mkdir()
    words = [sys.executable, "-ISE", str(Path(__file__).resolve()), str(address), str(real)]
    command = folder / COMMAND
    command.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    command.chmod(0o700)


def hand_over(address: str, real: str, words: list[str]) -> None:
    """Lets the process at a socket do the work, or does it as Flower would."""
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(address)
            line.sendall(json.dumps(words).encode() + b"\n")
            if line.recv(1):
                return
    except OSError:
        pass
    os.execv(real, [real, *words])


def fork_for_each(address: str) -> None:
    """Loads Flower, and forks for each command that comes to a socket; does not return."""
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401  What our app loads.
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for them.
    Path(address).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen(64)
        while True:
            line, _ = door.accept()
            with line, line.makefile() as text:
                words = json.loads(text.readline())
                if os.fork():
                    line.sendall(b"!")
                    continue
            door.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.argv = [COMMAND, *words]
            flwr_clientapp()
            os._exit(0)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        fork_for_each(sys.argv[1])
    else:
        hand_over(sys.argv[1], sys.argv[2], sys.argv[3:])
