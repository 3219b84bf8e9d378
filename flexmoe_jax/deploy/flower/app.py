"""The Flower app: it carries messages between Flower and the processes that do the work.

Flower starts a new process for every message to a client. That process does not import JAX. It
passes the message to the client's process, which runs as long as the federation, and takes the
answer back. The server's app does the same for the server's process, as long as its run lasts. They
talk over a Unix socket that only the user may open, in lines of JSON and Flower's protobuf bytes.
"""

from __future__ import annotations

import json
from multiprocessing.connection import Client, Connection

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from flwr.serverapp import Grid, ServerApp

client_app = ClientApp()
server_app = ServerApp()


def _bytes(records: RecordDict) -> bytes:
    found: bytes = recorddict_to_proto(records).SerializeToString()
    return found


def _records(data: bytes) -> RecordDict:
    return recorddict_from_proto(Proto.FromString(data))


def _answer(message: Message, context: Context) -> Message:
    with Client(str(context.node_config["socket"]), "AF_UNIX") as line:
        line.send_bytes(_bytes(message.content))
        return Message(_records(line.recv_bytes()), reply_to=message)


client_app.query()(_answer)
client_app.train()(_answer)
client_app.evaluate()(_answer)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Serve the requests of the server's process until it closes the socket."""
    with Client(str(context.run_config["socket"]), "AF_UNIX") as line:
        while True:
            try:
                wish = json.loads(line.recv_bytes())
            except EOFError:
                return
            {"nodes": _nodes, "push": _push, "pull": _pull}[wish["do"]](grid, line, wish)


def _tell(line: Connection, said: object) -> None:
    line.send_bytes(json.dumps(said).encode())


def _nodes(grid: Grid, line: Connection, wish: dict) -> None:
    _tell(line, list(grid.get_node_ids()))


def _push(grid: Grid, line: Connection, wish: dict) -> None:
    messages = [
        Message(_records(line.recv_bytes()), node, wish["kind"], group_id=wish["group"])
        for node in wish["to"]
    ]
    ids = list(grid.push_messages(messages))
    # Flower has no id for a message that it refuses, and no ids at all if together they are too
    # large for a proxy on the way (HTTP status 413).
    _tell(line, ids + [None] * (len(messages) - len(ids)))


def _error(message: Message) -> str | None:
    """Return why there is no answer; None if there is one. Flower gives a code, if no reason."""
    if not message.has_error():
        return None
    return message.error.reason or f"error {message.error.code}"


def _pull(grid: Grid, line: Connection, wish: dict) -> None:
    found = list(grid.pull_messages(wish["ids"])) if wish["ids"] else []
    _tell(line, [[m.metadata.reply_to_message_id, _error(m)] for m in found])
    for message in found:
        line.send_bytes(b"" if message.has_error() else _bytes(message.content))
