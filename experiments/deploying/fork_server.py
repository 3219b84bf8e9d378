"""Starts Flower's short-lived processes without loading Flower each time.

Flower starts a process for every message to a client, and that process needs 1.6 CPU-seconds to
load Flower, more than many clients need to train. Here, one process loads Flower once and forks for
each command, so the modules are in memory only once. Flower finds its commands on its PATH. Ours
come first: they pass their words to that process, or run Flower's own command if it is not there.

python -m experiments.deploying.fork_server SOCKET                loads Flower and forks
python -ISE experiments/deploying/fork_server.py SOCKET REAL ...  hands over REAL and what follows
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path

# The Flower commands replaced here: one runs for each message, one once beside each SuperNode.
_COMMANDS = {
    "flwr-clientapp": ("flwr.supernode.cli.flwr_clientapp", "flwr_clientapp"),
    "flower-superexec": ("flwr.supercore.cli.flower_superexec", "flower_superexec"),
}


def write_commands(folder: Path, address: Path, installed: Path) -> None:
    """Writes the commands that Flower finds on its PATH.

    Args:
      folder: folder for the commands, to be put first on Flower's PATH; it is created here.
      address: socket of the process that forks.
      installed: folder of Flower's own commands.
    """
    folder.mkdir()
    for name in _COMMANDS:
        ours = [sys.executable, "-ISE", str(Path(__file__).resolve()), str(address)]
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec {shlex.join([*ours, str(installed / name)])} "$@"\n')
        command.chmod(0o700)


def hand_over(address: str, real: str, words: list[str]) -> None:
    """Passes a command to the process at a socket; if there is none, runs the real command."""
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(address)
            asked = {"words": [real, *words], "environment": dict(os.environ)}
            line.sendall(json.dumps(asked).encode() + b"\n")
            if line.recv(1):
                return
    except OSError:
        pass
    os.execv(real, [real, *words])


def fork_for_each(address: str) -> None:
    """Loads Flower, and forks for each command that arrives at a socket; does not return."""
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401  What our app loads.

    mains = {name: getattr(import_module(at), what) for name, (at, what) in _COMMANDS.items()}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Child processes are not waited for.
    Path(address).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen(64)
        while True:
            line, _ = door.accept()
            with line, line.makefile() as text:
                asked = json.loads(text.readline())
                if os.fork():
                    line.sendall(b"!")
                    continue
            door.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(asked["environment"])
            sys.argv = asked["words"]
            mains[Path(sys.argv[0]).name]()
            os._exit(0)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        fork_for_each(sys.argv[1])
    else:
        hand_over(sys.argv[1], sys.argv[2], sys.argv[3:])
