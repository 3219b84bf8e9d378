"""How messages reach clients and come back: through Flower, or within one process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import NamedTuple, Protocol

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto


class LostError(ConnectionError):
    """Flower's process is gone, and with it all messages that were on their way."""


class Reply(NamedTuple):
    """What came back for a message.

    Attributes:
      message: its id.
      content: the client's answer; None where there is none.
      error: why there is none, in Flower's words.
    """

    message: str
    content: RecordDict | None
    error: str = ""


class Carrier(Protocol):
    """Carries messages to clients' nodes, and answers back."""

    def nodes(self) -> list[int]:
        """Ids of the nodes that are there."""

    def push(self, kind: str, group: str, orders: Sequence[tuple[int, RecordDict]]) -> list[str]:
        """Sends each node its own message; returns the messages' ids."""

    def pull(self, messages: Sequence[str]) -> list[Reply]:
        """What has come back for any of these messages so far, each once."""


def to_bytes(records: RecordDict) -> bytes:
    """Records as Flower's protobuf bytes."""
    found: bytes = recorddict_to_proto(records).SerializeToString()
    return found


def from_bytes(data: bytes) -> RecordDict:
    """The records of protobuf bytes."""
    return recorddict_from_proto(Proto.FromString(data))


class FlowerCarrier:
    """Through the Flower app of a run (see `flower/app.py`), which comes to a Unix socket.

    A run that ends, with its SuperLink or alone, is lost; the next one that comes takes its place.

    Args:
      path: of the socket, in a folder that no other user may open.

    Attributes:
      runs: how many have come.
    """

    def __init__(self, path: Path) -> None:
        """Listens."""
        self._listener = Listener(str(path), "AF_UNIX")
        self._line: Connection | None = None
        self.runs = 0

    def wait(self) -> None:
        """Waits for the app of a run."""
        self._line = self._listener.accept()
        self.runs += 1

    def close(self) -> None:
        """Lets the run end."""
        if self._line is not None:
            self._line.close()
        self._line = None
        self._listener.close()

    def nodes(self) -> list[int]:
        """See `Carrier`.

        Raises:
          LostError: the run is gone; so for the other methods.
        """
        found: list[int] = json.loads(self._ask({"do": "nodes"})[0])
        return found

    def push(self, kind: str, group: str, orders: Sequence[tuple[int, RecordDict]]) -> list[str]:
        """See `Carrier`."""
        wish = {"do": "push", "kind": kind, "group": group, "to": [node for node, _ in orders]}
        frames = [to_bytes(content) for _, content in orders]
        found: list[str] = json.loads(self._ask(wish, *frames)[0])
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
        """Sends a wish and its frames; of many answers the first says how many follow."""
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
"""What a client does with a message."""


class LocalCarrier:
    """Within this process: every client answers when its answer is pulled.

    Args:
      clients: by their nodes' ids; may be changed between calls, as nodes come and go.
    """

    def __init__(self, clients: dict[int, Answer]) -> None:
        """Nothing is on its way."""
        self.clients = clients
        self._waiting: dict[str, tuple[int, bytes]] = {}
        self._sent = 0

    def nodes(self) -> list[int]:
        """See `Carrier`."""
        return list(self.clients)

    def push(self, kind: str, group: str, orders: Sequence[tuple[int, RecordDict]]) -> list[str]:
        """See `Carrier`."""
        names = []
        for node, content in orders:
            self._sent += 1
            names.append(str(self._sent))
            self._waiting[names[-1]] = node, to_bytes(content)
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
    """Answers the messages that Flower's processes bring to a Unix socket, one after the other.

    Args:
      path: of the socket, in a folder that no other user may open.
      answer: what to do with a message.

    Returns:
      The socket; whoever closes it ends the thread that answers.
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
                except (EOFError, OSError):
                    continue  # Flower's process is gone; the server asks again.

    threading.Thread(target=serve, daemon=True).start()
    return listener
