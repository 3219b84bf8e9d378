"""The server's post: tracks connected clients, sends them messages, and collects the answers.

One loop does all of this. When a node connects, it says which client it is, and gets the setup of
the federation. A client gets a pending order as soon as it is ready. Messages that are lost with a
node, or with Flower's own process, are sent again.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flwr.app import ConfigRecord, RecordDict

from flexmoe_jax.deploy.carrier import Carrier, LostError, Reply
from flexmoe_jax.errors import InputError, StoppedError, printable
from flexmoe_jax.options.deploy import DeployOptions

_LOG = logging.getLogger(__name__)
# Seconds between two polls for answers.
_POLL = 0.1
# Seconds without any client after which the server says that it waits.
_QUIET = 5.0
# How often the same order is sent to a client that fails.
_TRIES = 3
# The kinds of orders.
_ASKED = ("train", "evaluate")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Facts(NamedTuple):
    """What a client reports about itself.

    Attributes:
      name: name of the client.
      examples: number of its training examples.
      memory: bytes that training may use; 0 if not reported.
    """

    name: str
    examples: int
    memory: int = 0


@dataclass
class ClientStatus:
    """Statistics of a client, for monitoring.

    Attributes:
      node: id of its latest node; 0 if it never connected.
      asked: number of orders sent to it.
      answered: number of its answers that were accepted.
      late: number of times that a round continued without its answer.
      refused: number of its answers that were rejected.
      why: reason of the latest rejection.
      seconds: seconds between its latest answered order and the answer.
    """

    node: int = 0
    asked: int = 0
    answered: int = 0
    late: int = 0
    refused: int = 0
    why: str = ""
    seconds: float = 0.0


class Order(NamedTuple):
    """A message that asks a client to train or to evaluate.

    Attributes:
      content: the message without the experts that the client still has.
      whole: returns the message with all experts.
    """

    content: RecordDict
    whole: Callable[[], RecordDict]


@dataclass
class _Sent:
    """A message that was sent and not answered yet."""

    node: int
    purpose: str
    number: int
    begun: float = field(default_factory=time.monotonic)


class Post:
    """Sends messages to clients and collects their answers.

    Args:
      carrier: carries the messages.
      again: called if the carrier is lost; returns when it works again.
      stop: returns whether to stop waiting for clients, where no deadline ends a wait.
    """

    def __init__(
        self,
        carrier: Carrier,
        again: Callable[[], None] = lambda: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start without any client."""
        self._carrier, self._again, self._stop = carrier, again, stop
        self.facts: dict[str, Facts] = {}
        self.status: dict[str, ClientStatus] = {}
        self._numbers: dict[str, int] | None = None
        self._setup: Callable[[int], RecordDict] | None = None
        self._hear: Callable[[int, Mapping[str, object]], str] = lambda number, told: ""
        self._names: dict[int, str] = {}  # node -> client's name
        self._greeted: set[int] = set()
        self._ready: set[int] = set()
        self._out: set[int] = set()  # Numbers of clients that refused, or did not fit, the setup.
        self._sent: dict[str, _Sent] = {}
        self._layout = ""

    def gather(self, count: int) -> list[Facts]:
        """Wait until `count` clients have reported; clients are numbered in the order of names.

        Returns:
          The facts of each client, by its number.

        Raises:
          StoppedError: if `stop` says to stop waiting.
        """
        told = -1
        while len(self.facts) < count:
            self._wait_a_little()
            if len(self.facts) != told:
                told = len(self.facts)
                _LOG.info("%d of %d clients are there", told, count)
        return [self.facts[name] for name in sorted(self.facts, key=natural)[:count]]

    def wait_for_any(self) -> None:
        """Wait until a client is ready, so that no round passes while all of them are away.

        Raises:
          StoppedError: if `stop` says to stop waiting.
          InputError: no client is left that takes part; it says why the first does not.
        """
        begin, told = time.monotonic(), False
        while not self._ready:
            self._wait_a_little()
            self._require_some()
            if not told and not self._names and time.monotonic() - begin > _QUIET:
                told = True
                _LOG.warning("all clients are away; the next round waits for one of them")

    def _wait_a_little(self) -> None:
        if self._stop():
            raise StoppedError
        self._step({}, {}, "query", "")
        time.sleep(_POLL)

    def _require_some(self) -> None:
        names = {number: name for name, number in (self._numbers or {}).items()}
        if names and set(names) == self._out:
            remedy = f"all have refused, or have another model; {names[0]}: {self.of(0).why}"
            raise InputError("clients.count", "nobody takes part", remedy)

    def admit(
        self,
        clients: Sequence[Facts],
        setup: Callable[[int], RecordDict],
        layout: str,
        meet: Callable[[int, Mapping[str, object]], str],
    ) -> None:
        """Set the clients that take part, and the setup that each gets first.

        Args:
          clients: the clients, by their numbers; all others are rejected, and so is one that
            returns with another number of examples, or with less memory.
          setup: client number -> its setup message.
          layout: hash of the names and shapes of the model's parameters; a client's must be equal.
          meet: (number, what the client tells once it is set up) -> reason to reject the client;
            empty if it takes part.
        """
        self._numbers = {one.name: number for number, one in enumerate(clients)}
        self._setup, self._layout, self._hear = setup, layout, meet
        for one in clients:
            self.facts[one.name] = one
            self.status.setdefault(one.name, ClientStatus())

    def shown(self) -> dict[str, dict[str, object]]:
        """Return the state and statistics of each client, by name; callable from any thread."""
        nodes = {name: node for node, name in list(self._names.items())}
        asked = {sent.number for sent in list(self._sent.values()) if sent.purpose in _ASKED}
        return {
            name: {"state": self._state_of(name, nodes, asked), **vars(self.status[name])}
            for name in self._numbers or ()
        }

    def _state_of(self, name: str, nodes: Mapping[str, int], asked: set[int]) -> str:
        number = (self._numbers or {}).get(name, -1)
        if number in self._out:
            return "out"
        if name not in nodes:
            return "away"
        if nodes[name] not in self._ready:
            return "joining"
        return "asked" if number in asked else "ready"

    def of(self, number: int) -> ClientStatus:
        """Return the statistics of a client."""
        return self.status[self.name_of(number)]

    def name_of(self, number: int) -> str:
        """Return the name of a client."""
        return {n: name for name, n in (self._numbers or {}).items()}[number]

    def ask(
        self,
        kind: str,
        group: str,
        orders: Mapping[int, Order],
        take: Callable[[int, RecordDict], str],
        options: DeployOptions,
        enough: int,
    ) -> None:
        """Send orders to clients, and pass their answers on.

        Args:
          kind: `train` or `evaluate`.
          group: label of the messages in Flower's logs.
          orders: client number -> its order.
          take: (number, answer) -> reason for a rejection; empty if the answer is accepted.
          options: how long to wait for clients.
          enough: number of accepted answers after which to stop waiting.

        Raises:
          InputError: no client is left that takes part; it says why the first does not.
        """
        open_orders = {number: order for number, order in orders.items() if number not in self._out}
        begin, taken = time.monotonic(), 0
        seen = dict.fromkeys(open_orders, begin)
        names = {number: name for name, number in (self._numbers or {}).items()}
        tries: dict[int, int] = {}
        while taken < enough and self._to_be_waited_for(open_orders, seen, begin, options):
            for number, content in self._step(open_orders, tries, kind, group):
                status = self.status[names[number]]
                why = take(number, content)
                open_orders.pop(number, None)
                if why:
                    status.refused, status.why = status.refused + 1, why
                    _LOG.warning("%s: refused: %s", names[number], printable(why, 200))
                else:
                    status.answered, taken = status.answered + 1, taken + 1
            if open_orders:
                time.sleep(_POLL)
        for number in open_orders:
            status = self.status[names[number]]
            status.late += 1
            _LOG.warning("%s: did not answer in time (%s)", names[number], kind)
        self._require_some()
        # Forget open orders: answers that still arrive belong to a round that is over.
        self._sent = {m: s for m, s in self._sent.items() if s.purpose in ("hello", "setup")}

    def _to_be_waited_for(
        self,
        orders: Mapping[int, Order],
        seen: dict[int, float],
        begin: float,
        options: DeployOptions,
    ) -> bool:
        """Return whether to wait for any client; note in `seen` which clients are ready now."""
        now = time.monotonic()
        seen.update(dict.fromkeys(map(self._number_of, self._ready), now))
        in_time = now - begin < options.deadline
        return in_time and any(now - seen[number] <= options.absence for number in orders)

    def _step(
        self, orders: dict[int, Order], tries: dict[int, int], kind: str, group: str
    ) -> list[tuple[int, RecordDict]]:
        """Send and collect whatever is possible now; return answers with the clients' numbers."""
        try:
            nodes = set(self._carrier.nodes())
            self._forget_all_but(nodes)
            self._greet(nodes)
            self._push(orders, kind, group)
            return self._collect(orders, tries)
        except LostError:
            _LOG.warning("Flower's run is gone; waiting for the next")
            self._forget_all_but(set())
            self._again()
            return []

    def _forget_all_but(self, nodes: set[int]) -> None:
        self._names = {node: name for node, name in self._names.items() if node in nodes}
        self._greeted &= nodes
        self._ready &= nodes
        self._sent = {m: sent for m, sent in self._sent.items() if sent.node in nodes}

    def _greet(self, nodes: set[int]) -> None:
        """Ask new nodes for their facts, and send the setup to clients that take part."""
        asked = nodes - self._greeted
        if asked:
            hello = RecordDict({"ask": ConfigRecord({"what": "hello"})})
            sent = self._send("query", "hello", [(n, "hello", -1, hello) for n in sorted(asked)])
            self._greeted |= {one.node for one in sent}
        if self._numbers is None or self._setup is None:
            return
        told = {sent.node for sent in self._sent.values() if sent.purpose == "setup"}
        for node, name in self._names.items():
            number = self._numbers.get(name)
            if node not in self._ready | told and number is not None:
                self._send("query", "setup", [(node, "setup", number, self._setup(number))])

    def _push(self, orders: Mapping[int, Order], kind: str, group: str) -> None:
        """Send orders to the clients that are ready and have not got them yet."""
        under_way = {sent.number for sent in self._sent.values() if sent.purpose == kind}
        there = {self._number_of(node): node for node in sorted(self._ready)}
        wanted = [number for number in orders if number in there and number not in under_way]
        messages = [(there[n], kind, n, orders[n].content) for n in wanted]
        for sent in self._send(kind, group, messages) if messages else ():
            self.status[self._names[sent.node]].asked += 1

    def _number_of(self, node: int) -> int:
        return (self._numbers or {}).get(self._names.get(node, ""), -1)

    def _send(
        self, kind: str, group: str, messages: list[tuple[int, str, int, RecordDict]]
    ) -> list[_Sent]:
        """Send messages; return those that the carrier has taken. The others are sent again."""
        ids = self._carrier.push(kind, group, [(node, what) for node, _, _, what in messages])
        sent = {
            name: _Sent(node, purpose, number)
            for name, (node, purpose, number, _) in zip(ids, messages, strict=True)
            if name
        }
        self._sent |= sent
        return list(sent.values())

    def _collect(
        self, orders: dict[int, Order], tries: dict[int, int]
    ) -> list[tuple[int, RecordDict]]:
        found = []
        for reply in self._carrier.pull(list(self._sent)):
            sent = self._sent.pop(reply.message, None)
            if sent is None:
                continue
            if reply.content is None:
                self._failed(sent, reply, orders, tries)
            elif sent.purpose == "hello":
                self._meet(sent.node, reply.content)
            elif sent.purpose == "setup":
                self._set_up(sent, reply.content, orders)
            elif isinstance(lacks := reply.content.get("lacks"), ConfigRecord):
                self._complete(sent, lacks, orders)
            elif sent.number in orders:
                name = self._names.get(sent.node, "")
                if name in self.status:
                    self.status[name].seconds = time.monotonic() - sent.begun
                found.append((sent.number, reply.content))
        return found

    def _failed(
        self, sent: _Sent, reply: Reply, orders: dict[int, Order], tries: dict[int, int]
    ) -> None:
        """Note that a node could not answer; after `_TRIES` failures, drop its order."""
        if sent.purpose == "hello":
            self._greeted.discard(sent.node)
        elif sent.number in orders:
            tries[sent.number] = tries.get(sent.number, 0) + 1
            if tries[sent.number] >= _TRIES:
                name = self._names.get(sent.node, str(sent.node))
                _LOG.error("%s: failed %d times: %s", name, _TRIES, printable(reply.error, 200))
                del orders[sent.number]

    def _meet(self, node: int, content: RecordDict) -> None:
        try:
            words = content["hello"]
            assert isinstance(words, ConfigRecord)
            facts = Facts(str(words["name"]), int(words["examples"]), int(words["memory"]))  # type: ignore[arg-type]
            if not _NAME.fullmatch(facts.name) or not 0 < facts.examples < 2**31:
                raise ValueError("a name of letters, digits and _ . - is needed, and examples")
        except (KeyError, TypeError, ValueError, OverflowError, AssertionError) as error:
            _LOG.warning(
                "node %d: refused: does not say who it is (%s)", node, printable(error, 100)
            )
            return
        if self._numbers is not None and facts.name not in self._numbers:
            _LOG.warning("%s: refused: takes no part in this federation", facts.name)
            return
        if self._numbers is not None and (why := _changed(self.facts[facts.name], facts)):
            _LOG.error("%s: takes no part: %s", facts.name, why)
            self.status[facts.name].why = why
            self._out.add(self._numbers[facts.name])
            return
        others = [n for n, name in self._names.items() if name == facts.name and n != node]
        for other in others:  # The client reconnected; messages to its former node are lost.
            self._names.pop(other)
            self._ready.discard(other)
            self._sent = {m: s for m, s in self._sent.items() if s.node != other}
        self._names[node] = facts.name
        self._out.discard((self._numbers or {}).get(facts.name, -1))
        self.facts[facts.name] = facts
        self.status.setdefault(facts.name, ClientStatus()).node = node

    def _set_up(self, sent: _Sent, content: RecordDict, orders: dict[int, Order]) -> None:
        name = self._names.get(sent.node, str(sent.node))
        ready, refused = content.get("ready"), content.get("refused")
        why = "has another model" if ready is not None else "gives no reason"
        if isinstance(ready, ConfigRecord) and ready.get("layout") == self._layout:
            why = self._hear(sent.number, ready)
            if not why:
                self._ready.add(sent.node)
                return
        if isinstance(refused, ConfigRecord):
            why = printable(refused.get("why", why), 300)
        _LOG.error("%s: takes no part: %s", name, why)
        self._names.pop(sent.node, None)
        self._out.add(sent.number)
        orders.pop(sent.number, None)
        if name in self.status:
            self.status[name].why = why

    def _complete(self, sent: _Sent, lacks: ConfigRecord, orders: dict[int, Order]) -> None:
        """Arrange to send what a client says it lacks: all experts, or the setup."""
        if "setup" in lacks:
            self._ready.discard(sent.node)
        elif sent.number in orders:
            orders[sent.number] = orders[sent.number]._replace(content=orders[sent.number].whole())


def _changed(first: Facts, now: Facts) -> str:
    """Return why a client that returns cannot take part as before; empty if it can."""
    if now.examples != first.examples:
        return f"has {now.examples} examples, and had {first.examples} when the run began"
    if now.memory < first.memory:
        return f"has {now.memory} bytes for training, and had {first.memory} when the run began"
    return ""


def natural(name: str) -> tuple:
    """Return a sort key that orders numbers in names by value: client_2 before client_10."""
    parts = re.split(r"(\d+)", name)
    return tuple((part.isdigit(), int(part) if part.isdigit() else part) for part in parts)
