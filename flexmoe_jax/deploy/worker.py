"""A real client: it answers the server's messages, and keeps its own state on its own disk.

Axis legend: `G` groups of MoE layers, `K` expert slots, `E` experts, `N` examples, `Y` classes.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import Array as Numbers
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from flexmoe_jax import client
from flexmoe_jax.compiling import ONCE, USUAL, compiler_options, placed
from flexmoe_jax.deploy import wire
from flexmoe_jax.deploy.keeping import Kept, keep, recall, require_same_examples
from flexmoe_jax.errors import InputError, printable
from flexmoe_jax.federation import Federation
from flexmoe_jax.types import Array, Download, Own, Params, PyTree, Tally, Upload

_LOG = logging.getLogger(__name__)
# Share of the time before the deadline that a client plans to use.
_MARGIN = 0.8


class Mine(NamedTuple):
    """A client's data.

    Attributes:
      name: name of the client.
      arrays: its training examples, leaves (N, ...), on the device.
      tests: its own test examples, leaves (m, ...); None to use the common test set.
      label_share: (Y,) share of each class in its training examples; Y = 0 if they have no class.
    """

    name: str
    arrays: Mapping[str, Array]
    tests: Mapping[str, Any] | None
    label_share: np.ndarray

    @property
    def size(self) -> int:
        """N, the number of training examples."""
        return len(next(iter(self.arrays.values())))


class Setup(NamedTuple):
    """The setup that the server sends to a client before the first order.

    Attributes:
      federation: id of this federation.
      config: its config as JSON.
      number: number of this client.
      slots: K.
      classes: names of the Y classes.
      key: random key for the client's own gates.
      prepare: named arrays (channels,) that standardise inputs; empty to use inputs unchanged.
      tests: the common test set, leaves (M, ...).
      private: initial values of the private parameters, as a record of `wire.pack`.
    """

    federation: str
    config: str
    number: int
    slots: int
    classes: tuple[str, ...]
    key: Array
    prepare: Mapping[str, Any]
    tests: Mapping[str, Any]
    private: ArrayRecord


Join = Callable[[Setup], tuple[Federation, Mine]]
"""From a setup, makes the client's federation, which has this client only, and its data.

It raises `InputError` if the client's examples do not fit."""


class Worker:
    """Answers messages of the server, as long as the client takes part.

    Args:
      name: name of the client.
      size: N.
      memory: bytes that training may use; 0 to train as many experts as the config says.
      join: see `Join`.
      folder: folder of the client's own state.
      tells_labels: whether the server may learn the client's label shares, if it asks for them.
    """

    def __init__(
        self,
        name: str,
        size: int,
        memory: int,
        join: Join,
        folder: Path,
        tells_labels: bool = False,
    ) -> None:
        """Start without a federation: the setup comes from the server."""
        self._hello = ConfigRecord({"name": name, "examples": size, "memory": memory, "setup": ""})
        self._name, self._join, self._folder = name, join, folder
        self._tells_labels = tells_labels
        self._part: _Part | None = None

    def answer(self, message: RecordDict) -> RecordDict:
        """Answer a message; if it cannot be carried out, the answer is a refusal with a reason."""
        try:
            ask: Any = message["ask"]
            if ask["what"] == "hello":
                return RecordDict({"hello": self._hello})
            if ask["what"] == "setup":
                return self._set_up(message)
            if self._part is None or ask["federation"] != self._hello["setup"]:
                return RecordDict({"lacks": ConfigRecord({"setup": True})})
            if ask["what"] == "train":
                return self._part.train(ask, message)
            return self._part.evaluate(ask, message)
        except (InputError, wire.WireError, OSError) as error:
            _LOG.warning("%s: refused: %s", self._name, error)
            return _refusal(str(error))
        except Exception as error:  # If the client ended, the server would ask it again and again.
            line = printable(f"{type(error).__name__}: {error}", 300)
            _LOG.error("%s: failed: %s", self._name, line)
            return _refusal(line)

    def _set_up(self, message: RecordDict) -> RecordDict:
        setup = read_setup(message)
        federation, mine = self._join(setup)
        self._part = _Part(federation, mine, setup, self._folder / setup.federation)
        self._hello["setup"] = setup.federation
        _LOG.info(
            "%s: joined as client %d of %s, with %d examples",
            self._name,
            setup.number,
            setup.federation,
            mine.size,
        )
        ready: dict[str, Any] = {"layout": layout_of(federation)}
        if federation.needs_labels and self._tells_labels:
            ready["label_share"] = np.asarray(mine.label_share, np.float64).tolist()
        return RecordDict({"ready": ConfigRecord(ready)})


def _refusal(why: str) -> RecordDict:
    return RecordDict({"refused": ConfigRecord({"why": printable(why, 300)})})


def layout_of(federation: Federation) -> str:
    """Hash the names and shapes of all parameters, which must be equal on server and client."""
    shapes = jax.tree.leaves(federation.layout.split(federation.shapes))
    known = [federation.layout.paths, [f"{x.dtype}{x.shape}" for x in shapes], federation.group]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def write_setup(setup: Setup) -> RecordDict:
    """Convert a setup to records."""
    words = {
        "federation": setup.federation,
        "config": setup.config,
        "number": setup.number,
        "slots": setup.slots,
        "classes": list(setup.classes),
        "key": np.asarray(jax.random.key_data(setup.key)).tolist(),
    }
    return RecordDict(
        {
            "ask": ConfigRecord({"what": "setup"}),
            "setup": ConfigRecord(words),
            "prepare": _named(setup.prepare),
            "tests": _named(setup.tests),
            "private": setup.private,
        }
    )


def read_setup(message: RecordDict) -> Setup:
    """Convert records to the setup that they hold.

    Raises:
      WireError: if they do not hold a setup.
    """
    try:
        words: Any = message["setup"]
        key = jax.random.wrap_key_data(jnp.asarray(words["key"], jnp.uint32))
        prepare, tests = (
            {name: array.numpy() for name, array in message.array_records[part].items()}
            for part in ("prepare", "tests")
        )
        return Setup(
            federation=_plain_name(words["federation"]),
            config=str(words["config"]),
            number=int(words["number"]),
            slots=int(words["slots"]),
            classes=tuple(words["classes"]),
            key=key,
            prepare=prepare,
            tests=tests,
            private=message.array_records["private"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise wire.WireError(f"setup cannot be read ({error})") from error


def _plain_name(given: object) -> str:
    """Check a federation's id, which becomes the name of a folder."""
    name = str(given)
    if not (name.isascii() and name.isalnum() and len(name) <= 64):
        raise wire.WireError("a federation's id is made of letters and digits")
    return name


def _named(arrays: Mapping[str, Any]) -> ArrayRecord:
    return ArrayRecord({name: Numbers(np.asarray(values)) for name, values in arrays.items()})


class _Part:
    """A client that has joined a federation."""

    def __init__(
        self,
        federation: Federation,
        mine: Mine,
        setup: Setup,
        folder: Path,
    ) -> None:
        self._federation, self._mine, self._setup = federation, mine, setup
        self._site, self._folder = federation.site, folder
        shapes = federation.layout.split(federation.shapes)
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
        self._log_share = None
        if mine.label_share.size and federation.task.adjust is not None:
            self._log_share = client.log_shares(jnp.asarray(mine.label_share))
        as_usual = compiler_options(USUAL)
        self._train = jax.jit(partial(_train, federation), compiler_options=as_usual)
        self._judge = jax.jit(
            partial(_judge, federation, len(setup.classes)), compiler_options=as_usual
        )
        self._compiled, self._rate = False, 0.0
        require_same_examples(folder, mine.arrays)
        self._kept = recall(folder, self._first())

    def train(self, ask: Mapping[str, Any], message: RecordDict) -> RecordDict:
        """Train on an order; a repeated order for the same steps gives the same answer."""
        down, experts = self._download(ask, message)
        if down is None:
            return RecordDict({"lacks": ConfigRecord({"experts": True})})
        steps: Any = np.int32(self._in_time(ask))
        down = down._replace(steps=steps)
        key = jax.random.wrap_key_data(jnp.asarray(ask["key"], jnp.uint32))
        begin = time.monotonic()
        own = self._kept.settled(int(ask["accepted"]))
        index = np.arange(self._mine.size, dtype=np.int32)
        share = self._log_share if self._federation.local.prior else None
        own, given, index, share, key = placed((own, down, index, share, key))
        found = self._train(own, given, dict(self._mine.arrays), index, share, key)
        before, after, upload = jax.device_get(found)
        seconds = time.monotonic() - begin
        self._learn_pace(int(upload.examples), seconds)
        self._kept = Kept(before, after, int(down.round), experts)
        keep(self._folder, self._kept)
        done = int(down.round) + 1, int(upload.examples), seconds
        _LOG.info("%s: round %d: %d examples in %.1f s", self._mine.name, *done)
        answer = wire.pack_upload(
            upload, self._site.group, np.asarray(down.slots), self._site.experts
        )
        answer["answer"] = ConfigRecord({"round": int(down.round), "seconds": seconds})
        return answer

    def evaluate(self, ask: Mapping[str, Any], message: RecordDict) -> RecordDict:
        """Evaluate the client's model on the common test set and on the client's own examples."""
        down, _ = self._download(ask, message)
        if down is None:
            return RecordDict({"lacks": ConfigRecord({"experts": True})})
        own = self._kept.settled(int(ask["accepted"]))
        common, mine, joint = self._on(self._setup.tests, own, down)
        units = self._units(self._setup.tests)
        if self._mine.tests is not None:
            _, of_own, _ = self._on(self._mine.tests, own, down)
            personal = jax.tree.map(lambda x: np.float32(x.sum()), of_own)
            weight = jnp.float32(self._units(self._mine.tests).sum())
        else:
            share = self._mine.label_share
            given = jnp.asarray(share if share.size else np.ones(1, np.float32))
            personal, weight = client.weigh_classes(mine, jnp.asarray(units), given)
        numbers = jax.device_get((common, personal, jnp.asarray(weight)))
        answer = RecordDict(
            {"judged": wire.pack(numbers), "answer": ConfigRecord({"round": int(down.round)})}
        )
        if ask["joint"]:
            answer["joint"] = wire.pack(joint)
        return answer

    def _first(self) -> Kept:
        """Make the client's own state before its first round."""
        draw = jax.jit(self._federation.own, compiler_options=compiler_options(ONCE))
        own = draw(self._zeros(), self._setup.key)
        private = wire.unpack(self._setup.private, self._shapes.private)
        own = jax.device_get(own)._replace(private=private)
        return Kept(own, own, -1, {})

    def _zeros(self) -> Params:
        zeros: Params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes)
        return zeros

    def _download(
        self, ask: Mapping[str, Any], message: RecordDict
    ) -> tuple[Download | None, wire.Experts]:
        """Read the download, and add experts that the client still has; None if one is missing.

        Raises:
          WireError: if the download does not fit the client's model.
        """
        groups = self._federation.groups
        slots: Any = np.asarray(ask["slots"], np.int32).reshape(groups, -1)
        if slots.shape[1] != self._federation.slots:
            raise wire.WireError(f"{slots.shape[1]} slots where the client has others")
        one = wire.one_of_each(self._shapes.experts, self._site.group)
        experts: wire.Experts = {}
        for expert in wire.held(slots, self._site.experts):
            record = message.get(wire.name_of(expert))
            if isinstance(record, ArrayRecord):
                experts[expert] = wire.unpack(record, one(expert[0]))
            elif expert in self._kept.experts:
                experts[expert] = self._kept.experts[expert]
            else:
                return None, {}
        stacks = wire.stack_experts(experts, self._site.group, slots, self._shapes.experts)
        shared = wire.unpack(message.array_records["shared"], self._shapes.shared)
        steps: Any = np.int32(ask["steps"])
        done: Any = np.int32(ask["round"])
        use: Any = None
        if "use" in ask:
            use = np.asarray(ask["use"], np.float32)
            if use.size != slots.size or not ((use >= 0) & (use <= 1)).all():
                raise wire.WireError(f"parts {use.tolist()} for {slots.size} slots")
            use = use.reshape(slots.shape)
        return Download(shared, stacks, slots, steps, done, use), experts

    def _in_time(self, ask: Mapping[str, Any]) -> int:
        """Return the number of steps that the client can do before the deadline."""
        wanted, seconds = int(ask["steps"]), float(ask["seconds"])
        return wanted if not self._rate else max(1, min(wanted, int(self._rate * seconds)))

    def _learn_pace(self, examples: int, seconds: float) -> None:
        # The first round is not counted: most of its time is compilation.
        if self._compiled and examples:
            batch = self._federation.local.batch_size
            self._rate = _MARGIN * max(examples / batch, 1.0) / max(seconds, 1e-3)
        self._compiled = True

    def _on(self, tests: Mapping[str, Any], own: Own, down: Download) -> tuple:
        """Sum over test examples by class, without and with the client's prior; joint outputs."""
        own, down = placed((own, down))
        size = min(500, len(next(iter(tests.values()))))
        total, outputs = None, []
        for rows in _chunks(tests, size):
            arrays, valid = rows
            *tallies, joint = self._judge(own, down, arrays, valid, self._log_share)
            total = tallies if total is None else jax.tree.map(jnp.add, total, tallies)
            outputs.append(jax.tree.map(lambda x, v=valid: np.asarray(x)[v], joint))
        assert total is not None
        return (*total, jax.tree.map(lambda *x: np.concatenate(x), *outputs))

    def _units(self, tests: Mapping[str, Any]) -> np.ndarray:
        """Count the units of each class, (Y,)."""
        everything = jnp.ones(len(next(iter(tests.values()))), bool)
        classes = len(self._setup.classes) if self._mine.label_share.size else 0
        judge = client.Judge(self._federation.task, tests, everything, classes)
        return np.asarray(judge.units_by_class())


def _chunks(tests: Mapping[str, Any], size: int) -> list[tuple[dict, np.ndarray]]:
    """Split test examples into chunks of one size, with a mask; the last chunk is padded."""
    count = len(next(iter(tests.values())))
    found = []
    for begin in range(0, count, size):
        rows = np.arange(begin, begin + size)
        taken = {name: np.asarray(x)[rows.clip(max=count - 1)] for name, x in tests.items()}
        found.append((taken, rows < count))
    return found


def _train(
    federation: Federation,
    own: Own,
    down: Download,
    arrays: dict[str, Array],
    index: Array,
    log_share: Array | None,
    key: Array,
) -> tuple[Own, Own, Upload]:
    """Train one round; return the client's own state before and after it, and the upload."""
    site, size = federation.site, jnp.int32(index.shape[0])
    before = client.receive(site, own, down.slots)
    batches = client.draw_batches(federation.local, key, index, size)
    down = down._replace(steps=jnp.minimum(federation.local.steps(size), down.steps))
    after, upload = client.train_and_answer(site, before, down, arrays, batches, log_share)
    return before, after, upload


def _judge(
    federation: Federation,
    classes: int,
    own: Own,
    down: Download,
    arrays: dict[str, Array],
    valid: Array,
    log_share: Array | None,
) -> tuple[Tally, Tally, PyTree]:
    """Sum a chunk by class, without and with the client's prior; also return joint outputs."""
    params, held = client.model_of(federation.site, own, down)
    outputs, _ = federation.apply(params, federation.task.inputs(arrays), held)
    judge = client.Judge(
        federation.task, arrays, valid, classes if federation.task.labels is not None else 0
    )
    mine = federation.own_outputs(outputs, log_share)
    return judge.by_class(outputs), judge.by_class(mine), federation.task.mean[0](outputs)
