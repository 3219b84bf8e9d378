"""The processes of a program find each other, and that they mean the same, before JAX is loaded.

JAX's own coordination aborts a process where another does not come, comes twice, or has another
configuration in mind. Here process 0 listens at the coordinator's address first; each of the others
sends it a line of JSON, and is told in a line that all begin, or why not. Then the port is JAX's.
Nothing is authenticated, here or there: such a port belongs on a private network.
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

# Longer lines, and more callers than these beside our own, are strangers'.
_LONGEST, _STRANGERS = 2**20, 64
_SILENT_SECONDS, _RETRY_SECONDS, _PATIENCE_SECONDS = 2.0, 0.2, 2.0
# Where the data lie may differ from machine to machine.
_LOCAL_FIELDS = ("data.dir", "data.download")


def muster(program: Program, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Waits until all processes of a program are there.

    Args:
      program: its processes, and which of them this is.
      config: flat config, which must be the same in all.
      say: shows a line while there is nothing to do but wait.

    Raises:
      InputError: they did not all come in time, or do not fit together.
    """
    same = {name: metadata.version(name) for name in ("flexmoe_jax", "jax", "jaxlib")}
    same |= {name: value for name, value in config.items() if name not in _LOCAL_FIELDS}
    card = {"process": program.number, "count": program.size, "same": same}
    # As it looks to whoever reads it: a tuple is a list in JSON.
    card = json.loads(json.dumps(card))
    if program.number == 0:
        _gather(program, card, _Wait(program, say))
    else:
        _call(program, card, _Wait(program, say))


def bind_address(program: Program) -> str:
    """Where process 0 listens: at the address that all were given, not at every one it has."""
    return os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or program.coordinator


class _Wait:
    """The time that is left, and what to show meanwhile."""

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
    """A caller that belongs elsewhere; the others go on without it."""


def _gather(program: Program, card: Card, wait: _Wait) -> None:
    """As process 0: lets the others in, and begins when all are there."""
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
    """Tells all why nothing begins; those that call within some seconds, too."""
    told: set[int] = set()
    end = time.monotonic() + seconds
    while True:
        for number in come.keys() - told:
            _tell([come[number]], refused=[error.field, str(error.value), error.remedy])
            told.add(number)
        if len(told) >= others or time.monotonic() >= end:
            return
        # Whatever else does not fit, one reason is enough.
        with suppress(InputError):
            hear()


def _listen(program: Program) -> socket.socket:
    host, port = program._replace(coordinator=bind_address(program)).address()
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        with ExitStack() as undo:
            undo.callback(listener.close)
            # Calls of an earlier program may linger for a minute.
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
    """A remark, where a host's name leads no further than the host: as Debian sets its own up."""
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
    """Takes what a caller sends: a card, a part of one, or an end."""
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
    """The number of a caller that belongs here."""
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
        # As text: one NaN is as good as another. What files hold is compared once they are read.
        if json.dumps(here) != json.dumps(there) and not may_have_moved(name, here, there):
            remedy = (
                f"process {number} has {there}; give all processes of a run the same, or start "
                "each alone with --distributed=off"
            )
            raise InputError(name, here, remedy)


def _call(program: Program, card: Card, wait: _Wait) -> None:
    """As any other process: calls process 0 until it says that all begin."""
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
    """What process 0 says; ends with the call, or with anything that is not ours."""
    rest = b""
    while len(rest) < _LONGEST:
        # It is process 0 that knows who is missing when time is up.
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
    """A line's object, empty where it holds none."""
    with suppress(ValueError, RecursionError):
        said = json.loads(line)
        return said if isinstance(said, dict) else {}
    return {}


def _tell(calls: Iterable[socket.socket], **words: object) -> None:
    line = json.dumps(words).encode() + b"\n"
    for call in list(calls):
        with suppress(OSError):
            call.sendall(line)
