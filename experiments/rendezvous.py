"""Lets the processes of a program find each other and compare configs, before JAX is loaded.

JAX's own coordination aborts a process if another one does not arrive, arrives twice, or has a
different configuration. Here, process 0 first listens at the coordinator's address. Each other
process sends it a line of JSON, and receives a line that says that all begin, or why they do not.
Afterwards JAX uses the port. Neither this exchange nor JAX's is authenticated: use such a port only
on a private network.
"""

from __future__ import annotations

import ipaddress
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from importlib import metadata
from typing import Any

from experiments.inputs import may_have_moved
from experiments.program import Program
from flexmoe_jax.errors import InputError

Card = dict[str, Any]

# Longer lines, or more connections than these beside our own, come from other programs.
_LONGEST, _STRANGERS = 2**20, 64
_SILENT_SECONDS, _RETRY_SECONDS, _PATIENCE_SECONDS = 2.0, 0.2, 2.0
# The location of the data may differ between machines.
_LOCAL_FIELDS = ("data.dir", "data.download")


def rendezvous(program: Program, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Waits until all processes of a program have arrived.

    Args:
      program: the processes of the program, and the number of this one.
      config: flat config, which must be the same in all processes.
      say: shows a line while this process waits.

    Raises:
      InputError: some processes did not arrive in time, or their configs or versions differ.
    """
    same = {name: metadata.version(name) for name in ("flexmoe_jax", "jax", "jaxlib")}
    same |= {name: value for name, value in config.items() if name not in _LOCAL_FIELDS}
    card = {"process": program.number, "count": program.size, "same": same}
    # Convert the card to the form that a receiver sees: in JSON, a tuple becomes a list.
    card = json.loads(json.dumps(card))
    if program.number == 0:
        _gather(program, card, _Wait(program, say))
    else:
        _call(program, card, _Wait(program, say))


def bind_address(program: Program) -> str:
    """Returns the address where process 0 listens: the given one, not all addresses of the host."""
    return os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or program.coordinator


class _Wait:
    """Tracks the remaining waiting time, and shows messages while waiting."""

    def __init__(self, program: Program, say: Callable[[str], None]) -> None:
        self._begin, self._seconds = time.monotonic(), program.seconds
        self._say, self._said = say, ""

    def left(self) -> float:
        return self._begin + self._seconds - time.monotonic()

    def show(self, line: str) -> None:
        if time.monotonic() - self._begin > _SILENT_SECONDS and line != self._said:
            self._said = line
            self._say(f"{line}, up to {self._seconds} s (--join_seconds)")


class _StrayError(Exception):
    """A connection that does not belong to this program; the others continue without it."""


def _gather(program: Program, card: Card, wait: _Wait) -> None:
    """Runs process 0's part: accepts the others, and lets all begin once all have arrived."""
    come: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(program))
        where = _reached_from(program, listener)
        calls = stack.enter_context(selectors.DefaultSelector())
        calls.register(listener, selectors.EVENT_READ)

        def hear() -> None:
            for key, _ in calls.select(timeout=0.2):
                if key.fileobj is listener:
                    _accept(listener, calls, program, stack)
                else:
                    _hear(key, calls, card, come)

        try:
            while len(come) < program.size - 1:
                _expect(program, come, wait, where)
                hear()
                _tell(come.values(), waiting=program.size - 1 - len(come))
        except InputError as error:
            _dismiss(error, come, program.size - 1, hear, min(_PATIENCE_SECONDS, wait.left()))
            raise
        _tell(come.values(), begin=True)


def _dismiss(
    error: InputError,
    come: Mapping[int, socket.socket],
    others: int,
    hear: Callable[[], None],
    seconds: float,
) -> None:
    """Tells all processes why the run does not begin, including those that call a little later."""
    told: set[int] = set()
    end = time.monotonic() + seconds
    while True:
        for number in come.keys() - told:
            _tell([come[number]], refused=[error.field, str(error.value), error.remedy])
            told.add(number)
        if len(told) >= others or time.monotonic() >= end:
            return
        # One reason is enough: ignore further mismatches.
        with suppress(InputError):
            hear()


def _listen(program: Program) -> socket.socket:
    host, port = program._replace(coordinator=bind_address(program)).address()
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        with ExitStack() as undo:
            undo.callback(listener.close)
            # Connections of an earlier program may block the port for a minute.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(program.size + _STRANGERS)
            listener.setblocking(False)
            undo.pop_all()
        return listener
    except OSError as error:
        remedy = f"process 0 cannot listen there ({error.strerror}); choose another address or port"
        raise InputError("--coordinator", program.coordinator, remedy) from error


def _reached_from(program: Program, listener: socket.socket) -> str:
    """Returns a remark if the host's name resolves to loopback, as in Debian's default setup."""
    address = listener.getsockname()[0]
    only_here = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if not only_here or program.address()[0] in ("localhost", address):
        return ""
    return f" ({address}, which only this machine reaches)"


def _expect(program: Program, come: Mapping[int, socket.socket], wait: _Wait, where: str) -> None:
    missing = sorted(set(range(1, program.size)) - come.keys())
    of = f"{len(missing)} of {program.size} processes"
    wait.show(f"waiting for {of} at {program.coordinator}{where}")
    if wait.left() <= 0:
        some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        remedy = (
            f"{of} did not come within {program.seconds} s{where}: {some}; start them together, "
            "or wait longer with --join_seconds"
        )
        raise InputError("--coordinator", program.coordinator, remedy)


def _accept(
    listener: socket.socket, calls: selectors.BaseSelector, program: Program, stack: ExitStack
) -> None:
    with suppress(OSError):
        call = stack.enter_context(closing(listener.accept()[0]))
        if len(calls.get_map()) > program.size + _STRANGERS:
            call.close()
        else:
            call.setblocking(False)
            calls.register(call, selectors.EVENT_READ, bytearray())


def _hear(
    key: selectors.SelectorKey,
    calls: selectors.BaseSelector,
    card: Card,
    come: dict[int, socket.socket],
) -> None:
    """Reads what a caller sends: a card, a part of a card, or the end of the connection."""
    call: Any = key.fileobj
    try:
        data = call.recv(2**16)
    except BlockingIOError:
        return
    except OSError:
        data = b""
    key.data.extend(data)
    line, end, _ = bytes(key.data).partition(b"\n")
    ours = [number for number, one in come.items() if one is call]
    if end and not ours:
        theirs = _json(line)
        try:
            number = _admit(theirs, card, come)
        except _StrayError as stray:
            _tell([call], refused=["--process_id", str(theirs.get("process")), str(stray)])
            data = b""
        else:
            come[number] = call
            _compare(number, theirs["same"], card["same"])
    if not data or len(key.data) > _LONGEST:
        for number in ours:
            del come[number]
        calls.unregister(call)
        call.close()


def _admit(theirs: Card, ours: Card, come: Mapping[int, socket.socket]) -> int:
    """Returns the process number of a caller that belongs to this program."""
    number, count = theirs.get("process"), ours["count"]
    if not isinstance(theirs.get("same"), dict):
        raise _StrayError("process 0 is of another version of flexmoe_jax")
    if theirs.get("count") != count:
        raise _StrayError(f"process 0 has --process_count={count}, not {theirs.get('count')}")
    if type(number) is not int or not 0 < number < count:
        raise _StrayError(f"give 0 to {count - 1}")
    if number in come:
        raise _StrayError("another process has this number")
    return number


def _compare(number: int, theirs: Card, ours: Card) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(name), theirs.get(name)
        # Compare as text, so that NaN equals NaN. File contents are compared after they are read.
        if json.dumps(here) != json.dumps(there) and not may_have_moved(name, here, there):
            remedy = (
                f"process {number} has {there}; give all processes of a run the same, or start "
                "each alone with --distributed=off"
            )
            raise InputError(name, here, remedy)


def _call(program: Program, card: Card, wait: _Wait) -> None:
    """Runs any other process's part: calls process 0 until it says that all begin."""
    why = "nobody listens there"
    while wait.left() > 0:
        wait.show(f"waiting for process 0 at {program.coordinator}")
        try:
            with socket.create_connection(program.address(), min(2.0, wait.left())) as call:
                call.sendall(json.dumps(card).encode() + b"\n")
                for said in _lines(call, wait):
                    if "begin" in said:
                        return
                    if "refused" in said:
                        field, value, remedy = said["refused"]
                        raise InputError(field, value, remedy)
                    wait.show(f"waiting for {said['waiting']} of {program.size} processes")
            why = "who answers there is not process 0"
        except InputError:
            raise
        except (OSError, ValueError, TypeError, KeyError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or why
        time.sleep(_RETRY_SECONDS)
    remedy = (
        f"no process 0 within {program.seconds} s ({why}); start them together, "
        "or wait longer with --join_seconds"
    )
    raise InputError("--coordinator", program.coordinator, remedy)


def _lines(call: socket.socket, wait: _Wait) -> Iterator[Card]:
    """Yields process 0's messages, until the connection ends or an unknown message arrives."""
    rest = b""
    while len(rest) < _LONGEST:
        # Wait a little longer than process 0: only it knows which processes are missing.
        call.settimeout(max(0.0, wait.left()) + _PATIENCE_SECONDS)
        data = call.recv(4096)
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            if not (said := _json(line)):
                return
            yield said
        if not data:
            return


def _json(line: bytes) -> Card:
    """Returns the JSON object of a line; empty if the line has none."""
    with suppress(ValueError, RecursionError):
        said = json.loads(line)
        return said if isinstance(said, dict) else {}
    return {}


def _tell(calls: Iterable[socket.socket], **words: object) -> None:
    line = json.dumps(words).encode() + b"\n"
    for call in list(calls):
        with suppress(OSError):
            call.sendall(line)
