"""Carry messages to clients and their answers back: through Flower, or within one process."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import NamedTuple, Protocol

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from flexmoe_jax.errors import StoppedError, printable

_LOG = logging.getLogger(__name__)
# Seconds after which a wait asks again whether it should go on.
_PATIENCE = 0.5


class LostError(ConnectionError):
    """Flower's process has ended, and all messages on their way are lost."""


class Reply(NamedTuple):
    """The reply to a message.

    Attributes:
      message: id of the message.
      content: the client's answer; None if there is none.
      error: the reason why there is no answer, as Flower states it.
    """

    message: str
    content: RecordDict | None
    error: str = ""


class Carrier(Protocol):
    """Carries messages to the clients' nodes, and their answers back."""

    def nodes(self) -> list[int]:
        """Return the ids of the connected nodes."""

    def push(
        self, kind: str, group: str, orders: Sequence[tuple[int, RecordDict]]
    ) -> list[str | None]:
        """Send each node its message; return the messages' ids, None for one that is not taken."""

    def pull(self, messages: Sequence[str]) -> list[Reply]:
        """Return the new replies to any of these messages; each reply is returned once."""


def to_bytes(records: RecordDict) -> bytes:
    """Convert records to Flower's protobuf bytes."""
    found: bytes = recorddict_to_proto(records).SerializeToString()
    return found


def from_bytes(data: bytes) -> RecordDict:
    """Convert protobuf bytes to records."""
    return recorddict_from_proto(Proto.FromString(data))


class FlowerCarrier:
    """Carries messages through the Flower app of a run, which connects to a Unix socket.

    See `flower/app.py`. If the run ends, with its SuperLink or alone, the carrier is lost until the
    next run connects.

    Args:
      path: path of the socket, in a folder that no other user may open.

    Attributes:
      runs: number of runs that have connected.
    """

    def __init__(self, path: Path) -> None:
        """Open the socket and listen."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(_PATIENCE)
        self._line: Connection | None = None
        self.runs = 0

    def wait(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait until the app of a run connects.

        Args:
          stop: returns whether to wait no longer.

        Raises:
          StoppedError: `stop` says so.
        """
        while not stop():
            try:
                line, _ = self._listener.accept()
            except TimeoutError:
                continue
            line.setblocking(True)
            self._line = Connection(line.detach())
            self.runs += 1
            return
        raise StoppedError

    def close(self) -> None:
        """Close the socket, so that the run ends."""
        if self._line is not None:
            self._line.close()
        self._line = None
        self._listener.close()

    def nodes(self) -> list[int]:
        """See `Carrier`.

        Raises:
          LostError: if the run has ended. `push` and `pull` raise it, too.
        """
        found: list[int] = json.loads(self._ask({"do": "nodes"})[0])
        return found

    def push(
        self, kind: str, group: str, orders: Sequence[tuple[int, RecordDict]]
    ) -> list[str | None]:
        """See `Carrier`."""
        wish = {"do": "push", "kind": kind, "group": group, "to": [node for node, _ in orders]}
        frames = [to_bytes(content) for _, content in orders]
        found: list[str | None] = json.loads(self._ask(wish, *frames)[0])
        return found

    def pull(self, messages: Sequence[str]) -> list[Reply]:
        """See `Carrier`."""
        head, *frames = self._ask({"do": "pull", "ids": list(messages)}, many=True)
        replies = []
        for (message, error), frame in zip(json.loads(head), frames, strict=True):
            content = None if error is not None else from_bytes(frame)
            replies.append(Reply(message, content, error or ""))
        return replies

    def _ask(self, wish: dict, *frames: bytes, many: bool = False) -> list[bytes]:
        """Send a request and its frames; if `many`, the first answer says how many follow."""
        if self._line is None:
            raise LostError("no run")
        try:
            self._line.send_bytes(json.dumps(wish).encode())
            for frame in frames:
                self._line.send_bytes(frame)
            head = self._line.recv_bytes()
            rest = len(json.loads(head)) if many else 0
            return [head, *(self._line.recv_bytes() for _ in range(rest))]
        except (EOFError, OSError) as error:
            self._line.close()
            self._line = None
            raise LostError(str(error)) from error


Answer = Callable[[RecordDict], RecordDict]
"""A client's function from a message to its answer."""


class LocalCarrier:
    """Carries messages within this process: a client answers when its reply is pulled.

    Args:
      clients: node id -> client. It may change between calls, as nodes connect and disconnect.
    """

    def __init__(self, clients: dict[int, Answer]) -> None:
        """Start without messages."""
        self.clients = clients
        self._waiting: dict[str, tuple[int, bytes]] = {}
        self._sent = 0

    def nodes(self) -> list[int]:
        """See `Carrier`."""
        return list(self.clients)

    def push(
        self, kind: str, group: str, orders: Sequence[tuple[int, RecordDict]]
    ) -> list[str | None]:
        """See `Carrier`."""
        names: list[str | None] = []
        for node, content in orders:
            self._sent += 1
            name = str(self._sent)
            names.append(name)
            self._waiting[name] = node, to_bytes(content)
        return names

    def pull(self, messages: Sequence[str]) -> list[Reply]:
        """See `Carrier`."""
        replies = []
        for message in messages:
            node, content = self._waiting.pop(message, (0, b""))
            if node in self.clients:
                answer = self.clients[node](from_bytes(content))
                replies.append(Reply(message, from_bytes(to_bytes(answer))))
        return replies


def answer_calls(path: Path, answer: Answer) -> Listener:
    """Answer the messages that Flower's processes send to a Unix socket, one after the other.

    Args:
      path: path of the socket, in a folder that no other user may open.
      answer: returns the answer to a message.

    Returns:
      The socket; closing it ends the thread that answers.
    """
    listener = Listener(str(path), "AF_UNIX")

    def serve() -> None:
        while True:
            try:
                line = listener.accept()
            except OSError:
                return
            with line:
                try:
                    line.send_bytes(to_bytes(answer(from_bytes(line.recv_bytes()))))
                except Exception as error:  # Flower reports it, and the server asks again.
                    why = printable(f"{type(error).__name__}: {error}", 200)
                    _LOG.warning("a message was not answered: %s", why)

    threading.Thread(target=serve, daemon=True).start()
    return listener
