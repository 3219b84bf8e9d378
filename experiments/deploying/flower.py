"""Starts Flower's processes, restarts them if they end, and ends them with this process."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket as socketlib
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from experiments.deploying.credentials import Tls
from experiments.deploying.fork_server import write_commands
from flexmoe_jax.errors import InputError, printable

_LOG = logging.getLogger(__name__)
# Seconds before restarting a process that ended by itself: at first, and after many restarts.
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
# Seconds to wait until the port of a killed server is free.
_PORT_PATIENCE = 8.0
# Variable with the socket of the process that starts Flower's short-lived processes, for several
# clients of one machine.
WARM = "FLEXMOE_WARM_SOCKET"
# Environment of all of Flower's processes: no telemetry, and two polls for tasks per second. With
# ten polls per second, many SuperNodes on one machine spend more on polling than on anything else.
_SETTINGS = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}


class Process:
    """One of Flower's processes. It ends when this one ends, for any reason (see `watchdog.py`).

    Args:
      words: the words of its command.
      home: Flower's folder, used by this process alone.
      log: file for its output.
    """

    def __init__(self, words: Sequence[str], home: Path, log: Path) -> None:
        """Starts the process."""
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "experiments.deploying.watchdog", *words],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(home),
                process_group=0,
            )

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._child.poll() is not None

    def end(self) -> None:
        """Ends the process, and waits until it has ended."""
        if self._child.stdin is not None:
            with suppress(OSError):
                self._child.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=10)
        self._child.kill()
        self._child.wait()


class Warm:
    """The process that starts Flower's short-lived processes (see `fork_server.py`).

    Args:
      address: path of its socket.
      home: Flower's folder.
      log: file for the output of this process and of those that it starts.
    """

    def __init__(self, address: Path, home: Path, log: Path) -> None:
        """Starts the process."""
        self._words = [sys.executable, "-m", "experiments.deploying.fork_server", str(address)]
        self._home, self._log = home, log
        self._process = Process(self._words, home, log)

    def watch(self) -> None:
        """Restarts the process if it has ended; until then, Flower's own commands do its work."""
        if self._process.ended:
            self._process = Process(self._words, self._home, self._log)

    def end(self) -> None:
        """Ends the process."""
        self._process.end()


def environment(home: Path) -> Mapping[str, str]:
    """Returns the environment of Flower's processes.

    Flower finds our commands in `home` first, and then those of this installation.
    """
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join([str(home / "bin"), here, os.environ.get("PATH", "")])
    root = str(Path(__file__).parents[2])
    modules = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **_SETTINGS, "FLWR_HOME": str(home), "PATH": path, "PYTHONPATH": modules}


class SuperLink:
    """The server side of Flower, and the Flower run that transports our messages.

    Args:
      home: folder used by the SuperLink alone.
      host: address that clients reach.
      port: port of the SuperLink.
      socket: socket on which the run's app connects to this process.
      tls: certificates; None for plain connections.
      keys: public keys of the clients that may connect; None to accept any client.
    """

    def __init__(
        self,
        home: Path,
        host: str,
        port: int,
        socket: Path,
        tls: Tls | None = None,
        keys: Sequence[Path] | None = None,
    ) -> None:
        """Starts the SuperLink and the run; both are restarted whenever they end."""
        self._home, self._host, self._port, self._tls = home, host, port, tls
        self._keys, self._known = keys, False
        self._socket, self._log = socket, home / "superlink.log"
        self._app = home / "app"
        shutil.copytree(str(files("flexmoe_jax.deploy") / "flower"), self._app)
        self._ended = threading.Event()
        self._process: Process | None = None
        self._wanted = threading.Event()
        self._wanted.set()
        self._submitted = 0
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def log(self) -> Path:
        """File with the output of the SuperLink."""
        return self._log

    def again(self, runs: int) -> None:
        """Requests a new run after `runs` runs have ended, unless one is already being started."""
        if self._submitted <= runs:
            self._wanted.set()

    def close(self) -> None:
        """Ends the SuperLink and the run."""
        self._ended.set()
        if self._process is not None:
            self._process.end()

    def _watch(self) -> None:
        said = ""
        while not self._ended.is_set():
            if self._process is None or self._process.ended:
                if self._process and (why := _last_words(self._log)) != said:
                    said = why
                    _LOG.warning("Flower's SuperLink ended, starting again: %s", why)
                self._process = Process(self._words(), self._home, self._log)
                self._known = self._keys is None
                self._wanted.set()
            if self._wanted.is_set() and self._is_up() and not self._ended.is_set():
                self._wanted.clear()
                self._submit()
            self._ended.wait(0.2)

    def _words(self) -> list[str]:
        words = [
            "flower-superlink",
            f"--host={self._host}",
            f"--port={self._port}",
            "--disable-runtime-dependency-installation",
        ]
        if self._tls is None:
            return [*words, "--insecure"]
        words += [] if self._keys is None else ["--enable-supernode-auth"]
        return [
            *words,
            f"--ssl-ca-certfile={self._tls.authority}",
            f"--ssl-certfile={self._tls.certificate}",
            f"--ssl-keyfile={self._tls.key}",
        ]

    def _is_up(self) -> bool:
        try:
            with socketlib.create_connection((self._host, self._port), timeout=1):
                return True
        except OSError:
            return False

    def _submit(self) -> None:
        """Starts the Flower run whose app connects to our socket."""
        self._submitted += 1
        secure = ["insecure = true"]
        if self._tls is not None:
            secure = [f'root-certificates = "{self._tls.authority.resolve()}"']
        lines = ["[superlink]", 'default = "here"', "[superlink.here]"]
        host = f"[{self._host}]" if ":" in self._host else self._host
        lines += [f'address = "{host}:{self._port}"', *secure]
        (self._home / "config.toml").write_text("\n".join(lines) + "\n")
        for key in [] if self._known else self._keys or ():
            if not self._flwr("supernode", "register", str(key)):
                break
        else:
            self._known = True
        setting = f'socket="{self._socket}"'
        if not (self._known and self._flwr("run", str(self._app), config=setting)):
            self._submitted -= 1
            self._ended.wait(_PAUSE)
            self._wanted.set()

    def _flwr(self, *words: str, config: str = "") -> bool:
        """Runs a Flower command on our SuperLink; returns whether it succeeded."""
        more = ["--run-config", config] if config else []
        done = subprocess.run(
            ["flwr", *words, "here", *more],
            env=environment(self._home),
            capture_output=True,
            text=True,
            check=False,
        )
        with self._log.open("a") as log:
            log.write(done.stdout + done.stderr)
        return done.returncode == 0


class SuperNode:
    """The client side of Flower.

    Args:
      home: folder used by the SuperNode alone.
      server: host:port of the server.
      socket: socket on which the client's app connects to this process.
      name: name of the client.
      root: certificate that the client trusts; None for plain connections.
      key: private key of the client, if the server requires keys; None for none.
    """

    def __init__(
        self,
        home: Path,
        server: str,
        socket: Path,
        name: str,
        root: Path | None = None,
        key: Path | None = None,
    ) -> None:
        """Starts the SuperNode; it is restarted whenever it ends."""
        self._home, self._log = home, home / "supernode.log"
        address = Path(os.environ.get(WARM) or home / "warm.sock")
        write_commands(home / "bin", address, Path(sys.executable).parent)
        words = ["flower-supernode", f"--superlink={server}", f"--port={free_port()}"]
        words += ["--insecure"] if root is None else [f"--root-certificates={root}"]
        words += [] if key is None else [f"--auth-supernode-private-key={key}"]
        self._name = name
        self._words = [*words, "--node-config", f'socket="{socket}" name="{name}"']
        self._ended = threading.Event()
        self._warm = None if WARM in os.environ else Warm(address, home, self._log)
        self._process = Process(self._words, home, self._log)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def log(self) -> Path:
        """File with the output of the SuperNode."""
        return self._log

    def close(self) -> None:
        """Ends the SuperNode."""
        self._ended.set()
        self._process.end()
        if self._warm is not None:
            self._warm.end()

    def _watch(self) -> None:
        said, pause = "", _PAUSE
        while not self._ended.wait(pause):
            if self._warm is not None:
                self._warm.watch()
            if not self._process.ended:
                pause = _PAUSE
                continue
            if (why := _last_words(self._log)) != said:
                said = why
                _LOG.warning("%s: no connection, trying again: %s", self._name, why)
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._process = Process(self._words, self._home, self._log)


def _last_words(log: Path) -> str:
    """Returns the last line of a Flower log that gives a reason for the end of the process."""
    lines = [
        re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
        for line in log.read_text(errors="replace").splitlines()[-40:]
    ]
    told = [line for line in lines if re.search("error|fail|refus|denied|invalid|not ", line, re.I)]
    return printable((told or lines or ["its process ended"])[-1], 200)


def require_free(host: str, port: int) -> None:
    """Rejects a port that another process uses, after waiting some seconds for it.

    The SuperLink of a killed server keeps the port for some more seconds.

    Raises:
      InputError: naming the port.
    """
    end = time.monotonic() + _PORT_PATIENCE
    family = socketlib.AF_INET6 if ":" in host else socketlib.AF_INET
    while True:
        with socketlib.socket(family) as probe:
            probe.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_REUSEADDR, 1)
            try:
                return probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                    remedy = f"cannot be had at {host}: {error.strerror}"
                    raise InputError("--port", port, remedy) from error
        time.sleep(0.2)


def free_port() -> int:
    """Returns a port of this machine that is free now."""
    with socketlib.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
