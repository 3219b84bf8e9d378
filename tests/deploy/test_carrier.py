"""Messages that get lost, are refused or cannot be read harm no other message."""

from __future__ import annotations

import threading
from contextlib import closing
from multiprocessing.connection import Client

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flexmoe_jax.deploy import Facts, FlowerCarrier, LocalCarrier, Post, answer_calls
from flexmoe_jax.deploy.carrier import from_bytes, to_bytes
from flexmoe_jax.deploy.flower import app
from flexmoe_jax.deploy.post import Order
from flexmoe_jax.options.deploy import DeployOptions


def ask(what: str) -> RecordDict:
    return RecordDict({"ask": ConfigRecord({"what": what})})


def client(message: RecordDict) -> RecordDict:
    answers = {
        "hello": {"hello": ConfigRecord({"name": "a", "examples": 1, "memory": 0})},
        "setup": {"ready": ConfigRecord({"layout": "same"})},
        "train": {"answer": ConfigRecord({"round": 0})},
    }
    return RecordDict(answers[message["ask"]["what"]])


class Refusing(LocalCarrier):
    """Takes the first message of no kind, as Flower does with a message that it rejects."""

    def __init__(self, clients):
        super().__init__(clients)
        self.seen = set()

    def push(self, kind, group, orders):
        if kind not in self.seen:
            self.seen.add(kind)
            return [None] * len(orders)
        return super().push(kind, group, orders)


def test_only_orders_that_were_sent_are_counted():
    post = Post(Refusing({1: client}))
    post.admit([Facts("a", 1)], lambda number: ask("setup"), "same", lambda number, told: "")
    orders = {0: Order(ask("train"), lambda: ask("train"))}
    post.ask("train", "round 1", orders, lambda number, content: "", DeployOptions(), 1)
    assert (post.of(0).asked, post.of(0).answered) == (1, 1)


class Failing:
    """A grid of one node, which answers every message with an error that has no reason."""

    def get_node_ids(self):
        return [7]

    def push_messages(self, messages):
        self.messages = list(messages)
        if len(self.messages) > 1:  # As Flower does with what is too large for its connection.
            return []
        for number, message in enumerate(self.messages):
            message.metadata.__dict__["_message_id"] = str(number)
        return [message.metadata.message_id for message in self.messages]

    def pull_messages(self, names):
        return [Message(Error(code=3), reply_to=message) for message in self.messages]


def test_an_error_without_a_reason_is_no_answer(tmp_path, monkeypatch):
    for name in ("task_id", "run_id", "node_id"):  # As in the process of Flower's app.
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    socket = tmp_path / "server.sock"
    carrier = FlowerCarrier(socket)
    context = Context(1, 1, {}, RecordDict(), {"socket": str(socket)})
    thread = threading.Thread(target=app.serve, args=(Failing(), context), daemon=True)
    thread.start()
    with closing(carrier):
        carrier.wait()
        assert carrier.nodes() == [7]
        (name,) = carrier.push("train", "round 1", [(7, ask("train"))])
        assert carrier.pull([name]) == [(name, None, "error 3")]
        assert carrier.push("train", "round 1", [(7, ask("train"))] * 2) == [None, None]
    thread.join()


def test_a_client_answers_after_a_message_that_it_cannot_read(tmp_path):
    socket = tmp_path / "client.sock"
    with closing(answer_calls(socket, client)):
        with Client(str(socket), "AF_UNIX") as line:
            line.send_bytes(b"\xff")
        with Client(str(socket), "AF_UNIX") as line:
            line.send_bytes(to_bytes(ask("train")))
            assert line.poll(10)
            assert from_bytes(line.recv_bytes())["answer"]["round"] == 0
