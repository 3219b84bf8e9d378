"""Flower's own processes: started here, started again when they are gone, and ended with us."""

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
from typing import NamedTuple

from experiments.deploying.warm import write_commands
from flexmoe_jax.errors import InputError, printable

_LOG = logging.getLogger(__name__)
# Seconds between two starts of a process that ends by itself: at first, and after many.
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
# Seconds to wait for the port of a server that was killed.
_PORT_PATIENCE = 8.0
# Says where a process is that starts Flower's short-lived ones for several clients of a machine.
WARM = "FLEXMOE_WARM_SOCKET"
# Environment of all of Flower's processes: no telemetry, and tasks looked for twice a second. Ten
# times a second, as many SuperNodes of one machine spend more on being asked than on all else.
_SETTINGS = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}


class Tls(NamedTuple):
    """Certificates of a server.

    Attributes:
      authority: the certificate that clients trust.
      certificate: of the server.
      key: of the server.
    """

    authority: Path
    certificate: Path
    key: Path


def read_tls(folder: Path) -> Tls:
    """The certificates in a folder.

    Raises:
      InputError: one is not there.
    """
    found = Tls(*(folder / name for name in ("ca.crt", "server.pem", "server.key")))
    for path in found:
        if not path.is_file():
            remedy = "make one with python -m experiments.serve --make_certificates=DIR"
            raise InputError("--certificates", path, remedy)
    return found


def read_keys(folder: Path) -> list[Path]:
    """The public keys in a folder.

    Raises:
      InputError: there are none.
    """
    found = sorted(folder.glob("*.pub"))
    if not found:
        remedy = "holds no *.pub; each client makes its pair: ssh-keygen -t ecdsa -b 384 -f NAME"
        raise InputError("--client_keys", folder, remedy)
    return [path.resolve() for path in found]


class Process:
    """One of Flower's processes, on a leash: it ends when this process does, whatever ends that.

    Args:
      words: of its command.
      home: Flower's folder, for it alone.
      log: gets what it prints.
    """

    def __init__(self, words: Sequence[str], home: Path, log: Path) -> None:
        """Starts it."""
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "experiments.deploying.leash", *words],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(home),
                process_group=0,
            )

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self._child.poll() is not None

    def end(self) -> None:
        """Ends it, and waits until it has."""
        if self._child.stdin is not None:
            with suppress(OSError):
                self._child.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=10)
        self._child.kill()
        self._child.wait()


class Warm:
    """The process that starts Flower's short-lived ones (see `warm.py`).

    Args:
      address: of its socket.
      home: Flower's folder.
      log: gets what it and those that it starts print.
    """

    def __init__(self, address: Path, home: Path, log: Path) -> None:
        """Starts it."""
        self._words = [sys.executable, "-m", "experiments.deploying.warm", str(address)]
        self._home, self._log = home, log
        self._process = Process(self._words, home, log)

    def watch(self) -> None:
        """Starts it again if it is gone; meanwhile Flower's own commands do its work."""
        if self._process.ended:
            self._process = Process(self._words, self._home, self._log)

    def end(self) -> None:
        """Ends it."""
        self._process.end()


def environment(home: Path) -> Mapping[str, str]:
    """Of Flower's processes: its commands are ours in `home`, or those of this installation."""
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join([str(home / "bin"), here, os.environ.get("PATH", "")])
    root = str(Path(__file__).parents[2])
    modules = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **_SETTINGS, "FLWR_HOME": str(home), "PATH": path, "PYTHONPATH": modules}


class SuperLink:
    """The server's side of Flower, and the run that carries our messages.

    Args:
      home: folder of its own.
      host: address that clients reach.
      port: of it.
      socket: where the run's app finds this process.
      tls: certificates; None for plain connections.
      keys: public keys of the clients that may come; None for whoever comes.
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
        """Starts it, and the run; both are started again whenever they are gone."""
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
        """What it prints."""
        return self._log

    def again(self, runs: int) -> None:
        """Says that the run is gone, the last of so many; another may be on its way already."""
        if self._submitted <= runs:
            self._wanted.set()

    def close(self) -> None:
        """Ends it all."""
        self._ended.set()
        if self._process is not None:
            self._process.end()

    def _watch(self) -> None:
        while not self._ended.is_set():
            if self._process is None or self._process.ended:
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
        """Starts the run whose app comes to our socket."""
        self._submitted += 1
        secure = ["insecure = true"]
        if self._tls is not None:
            secure = [f'root-certificates = "{self._tls.authority.resolve()}"']
        lines = ["[superlink]", 'default = "here"', "[superlink.here]"]
        lines += [f'address = "{self._host}:{self._port}"', *secure]
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
        """Runs a command of Flower's at our SuperLink; returns whether it was done."""
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
    """A client's side of Flower.

    Args:
      home: folder of its own.
      server: its host:port.
      socket: where the client's app finds this process.
      name: of the client.
      root: certificate that it trusts; None for plain connections.
      key: its private key, where the server asks for keys; None for none.
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
        """Starts it; it is started again whenever it is gone."""
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
        """What it prints."""
        return self._log

    def close(self) -> None:
        """Ends it."""
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
    """Why one of Flower's processes ended, as far as its log tells: the last line that says it."""
    lines = [
        re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
        for line in log.read_text(errors="replace").splitlines()[-40:]
    ]
    told = [line for line in lines if re.search("error|fail|refus|denied|invalid|not ", line, re.I)]
    return printable((told or lines or ["its process ended"])[-1], 200)


def require_free(host: str, port: int) -> None:
    """Refuses a port that somebody else has, and does not give up soon.

    The SuperLink of a server that was killed has it for some seconds more.

    Raises:
      InputError: naming it.
    """
    end = time.monotonic() + _PORT_PATIENCE
    while True:
        with socketlib.socket() as probe:
            probe.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_REUSEADDR, 1)
            try:
                return probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                    remedy = f"cannot be had at {host}: {error.strerror}"
                    raise InputError("--port", port, remedy) from error
        time.sleep(0.2)


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socketlib.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
