"""Trains one federation with real clients on this machine: server and clients as processes.

    python -m experiments.deploy_local --config=experiments/configs/digits.py --clients=4 \
        --workdir=runs/local

The launcher starts `experiments.serve`, which rejects whatever does not fit before anything is
written. It then splits the config's data set as in a simulation, into one file per client in
WORKDIR-clients, and starts one `experiments.join` per client on loopback. A client that a signal
kills is started again. They all end when the launcher ends, for any reason.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from absl import flags

from experiments.cli import define_config, read_config, refuse_words, run_cli, user_path
from experiments.deploying import require_flower
from experiments.fields import check_fields
from experiments.shutdown import Wish
from flexmoe_jax.errors import InputError, printable

_Process = subprocess.Popen[bytes]
# The server's name among the children; no client can be called so.
_SERVER = ""
# Seconds between two looks at the clients' processes.
_POLL = 0.5
# How often a client is started again; one that is killed more often needs a person.
_STARTS_AGAIN = 10
define_config("config", "Config file of the experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_CLIENTS = flags.DEFINE_integer(
    "clients", None, "How many clients; as clients.count if not given.", lower_bound=1
)
_PORT = flags.DEFINE_integer("port", 0, "Of the server; 0 for a free one.", lower_bound=0)
_REPORT = flags.DEFINE_bool("report", True, "Write the report's page at the end.")


def main(argv: list[str]) -> int:
    """Runs the federation to its end.

    Returns:
      exit code of the server, or 1 if a client ended before the server.

    Raises:
      InputError: the flags or the config are invalid; nothing is written then.
    """
    refuse_words(argv)
    config = read_config("config")
    if _CLIENTS.value is not None:
        config.clients.count = _CLIENTS.value
    check_fields(config)
    if not _WORKDIR.value:
        raise InputError("--workdir", _WORKDIR.value, "name a folder for the run, as runs/local")
    require_flower()
    from experiments.deploying.checks import check_deployable
    from experiments.deploying.flower import free_port, require_free

    check_deployable(config)
    if _PORT.value:
        require_free("127.0.0.1", _PORT.value)
    folder = user_path("--workdir", _WORKDIR.value)
    port = _PORT.value or free_port()
    server = [
        *("experiments.serve", *_for_server(sys.argv[1:])),
        *(f"--config.clients.count={config.clients.count}", f"--port={port}"),
    ]
    clients = Path(f"{folder.resolve()}-clients")
    with ExitStack() as stack:

        def joins(process: _Process) -> Mapping[str, list[str]]:
            from experiments.deploying.splitting import write_clients
            from experiments.examples import load_examples

            examples = load_examples(config)
            if not _is_open(process, port):
                return {}
            files = write_clients(examples, clients)
            stack.enter_context(_warm(clients / "flower.log"))
            return {path.stem: _join(path, port) for path in files}

        return _run(server, joins, clients)


def _for_server(words: Sequence[str]) -> Iterator[str]:
    """Yields the flags of this launcher, flag files included, without --clients."""
    given = iter(flags.FLAGS.read_flags_from_files(list(words), force_gnu=False))
    for word in given:
        if word in ("--clients", "-clients"):
            next(given)
        elif not word.startswith(("--clients=", "-clients=")):
            yield word


def _run(
    server: list[str], joins: Callable[[_Process], Mapping[str, list[str]]], logs: Path
) -> int:
    """Runs the server to its end, together with the clients.

    Args:
      server: the words of the server's command.
      joins: returns the words of each client's command by name, once the server's process has
        checked its input.
      logs: folder for the clients' output.
    """
    children: dict[str, _Process] = {}

    def pass_on(times: int) -> None:
        first = children.get(_SERVER)
        if first is not None and times == 1:
            _let_end(first)
        elif first is not None:
            first.kill()

    with Wish(passed_on=pass_on):
        try:
            children[_SERVER] = _start(server, None)
            words_of = joins(children[_SERVER])
            for name, words in words_of.items():
                children[name] = _start(words, logs / f"{name}.log")
            return _wait(children, words_of, logs)
        finally:
            for child in children.values():
                _let_end(child)
            for child in children.values():
                try:
                    child.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    child.kill()


def _is_open(server: _Process, port: int) -> bool:
    """Waits until the server listens, or ends; returns whether it listens."""
    while server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=_POLL):
            return True
        time.sleep(_POLL)
    return False


def _join(path: Path, port: int) -> list[str]:
    """Returns the words of a client's command; `path` is the file of its examples."""
    return [
        *("experiments.join", f"--server=127.0.0.1:{port}", f"--name={path.stem}"),
        *(f"--data={path}", f"--folder={path.with_suffix('')}", "--tell_label_shares"),
    ]


@contextmanager
def _warm(log: Path) -> Iterator[None]:
    """Starts a process that all clients share, so that Flower's modules are in memory only once."""
    from experiments.deploying.flower import WARM, Warm

    with tempfile.TemporaryDirectory(prefix="flexmoe-") as home:
        door = Path(home) / "warm.sock"
        warm = Warm(door, Path(home), log)
        os.environ[WARM] = str(door)
        try:
            yield
        finally:
            warm.end()


def _wait(children: dict[str, _Process], joins: Mapping[str, list[str]], logs: Path) -> int:
    """Waits until the server ends.

    A client that a signal killed is started again; if one ends by itself, or was killed too often,
    it is named, and the server ends as well.
    """
    server, again = children[_SERVER], Counter[str]()
    while True:
        try:
            return server.wait(timeout=_POLL)
        except subprocess.TimeoutExpired:
            ended = [name for name in joins if children[name].poll() is not None]
        for name in ended:
            number, log = -children[name].returncode, logs / f"{name}.log"
            if number > 0 and again[name] < _STARTS_AGAIN:
                again[name] += 1
                print(f"{name}: killed by signal {number}; started again", file=sys.stderr)
                _let_end(children[name])
                children[name] = _start(joins[name], log)
                continue
            last = (log.read_text(errors="replace").splitlines() or ["no output"])[-1]
            print(f"{name}: ended before the server: {printable(last, 300)}", file=sys.stderr)
            _let_end(server)
            server.wait()
            return 1


def _let_end(child: _Process) -> None:
    """Closes a child's standard input, upon which it ends."""
    if child.stdin is not None:
        child.stdin.close()


def _start(words: list[str], log: Path | None) -> _Process:
    """Starts a process in its own group; it ends when its standard input is closed."""
    output = None if log is None else log.open("ab")
    try:
        return subprocess.Popen(
            [sys.executable, "-m", *words, "--end_with_input"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            process_group=0,
        )
    finally:
        if output is not None:
            output.close()


if __name__ == "__main__":
    run_cli(main)
