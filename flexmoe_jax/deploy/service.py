"""Rounds of a real server: send orders, collect and admit answers, and close the round.

Axis legend: `C` clients, `P` clients of the round's plan, `G` groups of MoE layers, `K` expert
slots, `E` experts, `Y` classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from flexmoe_jax import client, server
from flexmoe_jax.compiling import ONCE, USUAL, compiler_options, everywhere, placed
from flexmoe_jax.deploy import wire
from flexmoe_jax.deploy.post import Order, Post
from flexmoe_jax.deploy.worker import Setup, write_setup
from flexmoe_jax.errors import printable
from flexmoe_jax.federation import Federation
from flexmoe_jax.options.deploy import DeployOptions
from flexmoe_jax.types import (
    Array,
    Evaluation,
    Feedback,
    Key,
    Params,
    Plan,
    PyTree,
    Roll,
    RoundReport,
    Server,
    Tally,
    Upload,
)

_LOG = logging.getLogger(__name__)
# Larger predictions are not requested, and the evaluation of the joint predictions is left out.
_JOINT_BYTES = 2**23


class ServerState(NamedTuple):
    """The state of a federation on its server; it replaces the `State` of a simulation.

    Attributes:
      server: state of the server.
      clients: what the server knows about the clients.
    """

    server: Server
    clients: Roll


class Common(NamedTuple):
    """What the server shares with all clients, and the sizes of the clients.

    Attributes:
      config: config of the federation, as JSON.
      federation_id: id of this federation, letters and digits.
      classes: names of the Y classes.
      prepare: named arrays that standardise inputs.
      tests: the common test set, leaves (M, ...).
      examples: (C,) number of training examples of each client.
    """

    config: str
    federation_id: str
    classes: tuple[str, ...]
    prepare: Mapping[str, Any]
    tests: Mapping[str, Any]
    examples: np.ndarray


class Service:
    """The server of a federation with real clients.

    Args:
      federation: the federation's settings.
      common: what the server shares with all clients.
      post: sends messages to the clients and collects the answers.
      options: how long the server waits for clients.
      key: random key of the run.
      cache: if true, experts that a client still has are not sent again.
    """

    def __init__(
        self,
        federation: Federation,
        common: Common,
        post: Post,
        options: DeployOptions,
        key: Key,
        cache: bool = True,
    ) -> None:
        """Prepare the server; functions are compiled at their first call."""
        self.federation, self._common, self._post = federation, common, post
        self._options, self._key, self._cache = options, key, cache
        shapes = federation.layout.split(federation.shapes)
        self._shapes: Params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes
        )
        self._like = upload_shapes(federation, self._shapes)
        self._units_of_one = float(_units_of_one(federation))
        self._told: dict[int, np.ndarray] = {}  # Label shares (Y,) by client, until a round's end.
        as_usual = compiler_options(USUAL)
        compiled = partial(jax.jit, compiler_options=as_usual, out_shardings=everywhere())
        self._take = compiled(partial(_take, federation), donate_argnums=0)
        self._close = compiled(partial(_close, federation))

    def init(self, key: Key) -> ServerState:
        """Return the state before the first round."""
        federation = self.federation
        # Compiled, as in a simulation: without compilation, values are rounded differently.
        begin = jax.jit(
            partial(_begin, federation),
            compiler_options=compiler_options(ONCE),
            out_shardings=everywhere(),
        )
        begun = begin(key)
        shape = federation.clients, federation.groups, federation.slots
        empty = jnp.full(shape, federation.layout.experts, jnp.int32)
        never = jnp.full(federation.clients, -1, jnp.int32)
        if not federation.needs_labels:
            return ServerState(begun, Roll(empty, never))
        shares = jnp.zeros((federation.clients, len(self._common.classes)), jnp.float32)
        return ServerState(begun, Roll(empty, never, shares))

    def setup(self, number: int) -> RecordDict:
        """Return the setup of a client, as records."""
        model_key, gate_key = jax.random.split(self._key)
        draw = jax.jit(self.federation.draw, compiler_options=compiler_options(ONCE))
        private = draw(model_key).private
        common = self._common
        return write_setup(
            Setup(
                federation=common.federation_id,
                config=common.config,
                number=number,
                slots=self.federation.slots,
                classes=common.classes,
                key=jax.random.fold_in(gate_key, number),
                prepare=common.prepare,
                tests=common.tests,
                private=wire.pack(private),
            )
        )

    def meet(self, number: int, told: Mapping[str, Any]) -> str:
        """Note the label shares that a client tells; return why it cannot take part, if so."""
        if not self.federation.needs_labels:
            return ""
        classes = len(self._common.classes)
        try:
            share = np.asarray(told.get("label_share", np.zeros(classes)), np.float32)
        except (TypeError, ValueError):
            share = np.zeros(0, np.float32)
        parts = (share >= 0).all() and (not share.any() or abs(share.sum() - 1) < 1e-3)
        if share.shape != (classes,) or not parts:
            return f"its label shares are not {classes} parts of 1"
        if not share.any():
            _LOG.warning(
                "%s keeps its label shares: fitness.affinity is 0 for it (its command can tell "
                "them: --tell_label_shares)",
                self._post.name_of(number),
            )
        self._told[number] = share
        return ""

    def assign(
        self, state: ServerState, cohort: np.ndarray, data: object = None
    ) -> tuple[Any, ...]:
        """Return the solutions for a cohort, as a simulation does, by what clients have told."""
        federation, shares = self.federation, state.clients.label_share
        assign = federation.make_assign(
            self._common.examples, np.asarray(shares) if len(shares) else None
        )
        return assign(state.server, cohort)

    def round(
        self, state: ServerState, plan: Plan
    ) -> tuple[ServerState, RoundReport, np.ndarray, np.ndarray]:
        """Send orders to the clients of a plan, collect their answers, and close the round.

        The round begins once a client is ready.

        Returns:
          The state after the round, its report, and two arrays (P,) bool: the clients of the plan
          that were sent an order, and those with a valid answer.
        """
        self._post.wait_for_any()
        federation, done = self.federation, int(state.server.round)
        numbers, slots = np.asarray(plan.clients), np.asarray(plan.slots)
        rows = {int(c): row for row, c in enumerate(numbers) if c < federation.clients}
        key = jax.random.fold_in(state.server.key, done)
        orders = {}
        for number, row in rows.items():
            own_key = np.asarray(jax.random.key_data(jax.random.fold_in(key, number))).tolist()
            words = {"steps": int(plan.steps[row]), "key": own_key}
            if plan.use is not None:
                words["use"] = np.asarray(plan.use[row], np.float64).ravel().tolist()
            orders[number] = self._order(state, number, "train", slots[row], words)
        uploads: dict[int, Upload] = {}
        bad: set[int] = set()

        def take(number: int, content: RecordDict) -> str:
            try:
                uploads[number] = self._read(content, done, number, slots[rows[number]])
            except wire.WireError as error:
                bad.add(number)
                return str(error)
            return ""

        enough = max(1, int(np.ceil(self._options.quota * len(orders) - 1e-9)))
        before = {number: self._post.of(number).asked for number in rows}
        self._post.ask("train", f"round {done + 1}", orders, take, self._options, enough)
        reached = np.zeros(len(numbers), bool)
        for number, row in rows.items():
            reached[row] = self._post.of(number).asked > before[number]
        delivered = np.isin(numbers, list(uploads))
        following, report = self._finish(state, plan, uploads, bad)
        return following, report, reached, delivered

    def evaluate(self, state: ServerState) -> Evaluation:
        """Collect the evaluations that the clients report for their own models."""
        federation = self.federation
        done, slots = int(state.server.round), np.asarray(state.clients.slots)
        has = (slots[:, :, 0] < federation.layout.experts).any(axis=1)
        tests = self._common.tests
        outputs, joint_bytes = self._joint_shapes(tests)
        joint = joint_bytes <= _JOINT_BYTES
        orders = {
            int(c): self._order(state, int(c), "evaluate", slots[c], {"joint": joint})
            for c in np.flatnonzero(has)
        }
        like, units = self._judged_shapes(), np.asarray(self._judge_of_tests().units_by_class())
        found: dict[int, tuple] = {}

        def take(number: int, content: RecordDict) -> str:
            try:
                found[number] = (
                    _checked(_part(content, "judged", like), units),
                    _part(content, "joint", outputs) if joint else None,
                )
            except wire.WireError as error:
                return str(error)
            return ""

        self._post.ask("evaluate", f"after round {done}", orders, take, self._options, len(orders))
        return self._together(state, found, like, joint)

    def _order(
        self, state: ServerState, number: int, what: str, slots: np.ndarray, words: dict[str, Any]
    ) -> Order:
        """Make an order for a client, with ψ and the experts that the client does not have."""
        federation = self.federation
        there = wire.held(slots, federation.layout.experts)
        current = np.asarray(state.server.ledger.current)
        skip = {e for e in there if self._cache and current[e[0], number, e[1]]}
        ask = {
            "what": what,
            "federation": self._common.federation_id,
            "round": int(state.server.round),
            "slots": slots.ravel().tolist(),
            "accepted": int(state.clients.accepted[number]),
            "seconds": float(self._options.deadline),
            "steps": 0,
            **words,
        }
        shared, experts = jax.device_get((state.server.shared, state.server.experts))
        wanted = {expert: expert[1] for expert in there}

        def content(skip: set[wire.Expert]) -> RecordDict:
            return RecordDict(
                {
                    "ask": ConfigRecord(ask),
                    "shared": wire.pack(shared),
                    **wire.pack_experts(experts, federation.group, wanted, skip),
                }
            )

        return Order(content(skip), lambda: content(set()))

    def _read(self, content: RecordDict, done: int, number: int, slots: np.ndarray) -> Upload:
        """Read a client's answer to this round.

        Raises:
          WireError: if the message is not a valid answer.
        """
        refused, answer = content.get("refused"), content.get("answer")
        if isinstance(refused, ConfigRecord):
            raise wire.WireError(f"the client says: {printable(refused.get('why', ''), 300)}")
        if not isinstance(answer, ConfigRecord) or answer.get("round") != done:
            raise wire.WireError(f"is no answer to round {done + 1}")
        federation = self.federation
        upload = wire.unpack_upload(
            content, self._like, federation.group, slots, federation.layout.experts
        )
        most = int(federation.local.examples(np.asarray(self._common.examples[number])))
        wire.check_upload(upload, most, self._units_of_one)
        if federation.fitness.score == "loss" and np.any(upload.feedback.loss < 0):
            raise wire.WireError("feedback has a loss below 0, which fitness.score=loss excludes")
        return upload

    def _finish(
        self, state: ServerState, plan: Plan, uploads: Mapping[int, Upload], bad: set[int]
    ) -> tuple[ServerState, RoundReport]:
        """Admit the answers in the plan's order, and close the round."""
        federation, begun = self.federation, state.server
        nothing: Upload = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._like)
        total = federation.aggregation.zero(
            begun.shared, begun.experts, len(plan.clients), federation.slots
        )
        verdicts = []
        for row, number in enumerate(np.asarray(plan.clients)):
            upload = placed(uploads.get(int(number), nothing))
            total, verdict = self._take(total, begun, upload, plan.slots[row], plan.steps[row])
            verdicts.append(verdict)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *verdicts)
        clients = np.asarray(plan.clients)
        # Only an answer proves that a client stored its experts. In the records, the others are
        # padding: they keep their old experts, and later orders skip no expert that has moved.
        stored = np.where(np.isin(clients, list(uploads)), clients, federation.clients)
        known = plan._replace(clients=placed(stored.astype(np.int32)))
        following, verdicts, report = self._close(begun, total, stacked, known)
        broken = np.isin(clients, list(bad))
        report = report._replace(quarantined=np.asarray(report.quarantined) | broken)
        took = clients[np.asarray(verdicts.accepted)]
        roll = state.clients._replace(
            slots=state.clients.slots.at[stored].set(plan.slots, mode="drop"),
            accepted=state.clients.accepted.at[took].set(begun.round, mode="drop"),
        )
        return ServerState(following, self._with_told(roll)), report

    def _with_told(self, roll: Roll) -> Roll:
        """Add the label shares that clients have told since the last round."""
        told, self._told = self._told, {}
        if not told:
            return roll
        shares: Any = roll.label_share
        return roll._replace(label_share=shares.at[np.array(list(told))].set(list(told.values())))

    def _joint_shapes(self, tests: Mapping[str, Any]) -> tuple[PyTree, int]:
        """Return the shapes of a client's predictions of the test set, for averaging, and bytes."""
        federation = self.federation
        count = len(next(iter(tests.values())))
        one, _ = federation.outputs
        averaged = jax.eval_shape(federation.task.mean[0], one)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), averaged
        )
        leaves = jax.tree.leaves(shapes)
        return shapes, sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves)

    def _judged_shapes(self) -> tuple[Tally, Tally, Any]:
        columns = len(self._common.classes) if self.federation.task.labels is not None else 1
        hits = self.federation.task.hits is not None

        def tally(*shape: int) -> Tally:
            sums: Any = jax.ShapeDtypeStruct(shape, np.float32)
            return Tally(sums if hits else None, sums)

        return tally(columns), tally(), jax.ShapeDtypeStruct((), np.float32)

    def _judge_of_tests(self) -> client.Judge:
        task, tests = self.federation.task, self._common.tests
        everything = jnp.ones(len(next(iter(tests.values()))), bool)
        classes = len(self._common.classes) if task.labels is not None else 0
        return client.Judge(task, dict(tests), everything, classes)

    def _together(
        self, state: ServerState, found: Mapping[int, tuple], like: tuple, joint: bool
    ) -> Evaluation:
        """Combine the clients' reports and the server's own results into one evaluation."""
        federation, tests = self.federation, self._common.tests
        clients = federation.clients
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        rows = [found[c][0] if c in found else empty for c in range(clients)]
        common, personal, weight = jax.tree.map(lambda *x: np.stack(x), *rows)
        evaluated: Any = np.isin(np.arange(clients), list(found))
        judge = self._judge_of_tests()
        none: Any = np.float32(np.nan)
        together = Tally(none if like[0].hits is not None else None, none)
        if joint and found:
            outputs = [found[c][1] for c in sorted(found)]
            mean = jax.tree.map(lambda *x: jnp.asarray(sum(x) / len(x)), *outputs)
            together = judge.all_rows(federation.task.mean[1](mean))
        assembled = None
        if federation.assembles:
            params, leads = federation.assemble(state.server)
            inputs = federation.task.inputs(tests)
            assembled = judge.all_rows(federation.apply(params, inputs, leads)[0])
        return Evaluation(
            common=common,
            units=judge.units_by_class(),
            personal=personal,
            personal_weight=weight,
            server=together,
            assembled=assembled,
            evaluated=evaluated,
        )


def upload_shapes(federation: Federation, shapes: Params) -> Upload:
    """Return the shapes of an upload as the codec sends it; experts are leaves (K, ...)."""
    slots = federation.slots

    def answer(shared: PyTree, experts: PyTree) -> Upload:
        held = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), experts)
        sent = client.encode(federation.codec, shared, held)
        sums = jnp.zeros((len(federation.layout.layers), slots), jnp.float32)
        one = jnp.zeros((), jnp.float32)
        return Upload(*sent, Feedback(sums, sums, sums), one, one, one)

    found: Upload = jax.eval_shape(answer, shapes.shared, shapes.experts)
    return found


def _begin(federation: Federation, key: Key) -> Server:
    """Initialise the server before the first round."""
    params = federation.draw(jax.random.split(key)[0])
    return server.init(federation.desk, key, params.shared, params.experts, federation.clients)


def _units_of_one(federation: Federation) -> float:
    """Return the most units that one example can have."""
    weight = jax.eval_shape(federation.task.weight, federation.sample)
    return float(np.prod(weight.shape[1:]))


def _part(content: RecordDict, name: str, like: PyTree) -> PyTree:
    record, refused = content.get(name), content.get("refused")
    if isinstance(refused, ConfigRecord):
        raise wire.WireError(f"the client says: {printable(refused.get('why', ''), 300)}")
    if not isinstance(record, ArrayRecord):
        raise wire.WireError(f"{name}: no arrays")
    found = wire.unpack(record, like)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
        raise wire.WireError(f"{name}: not all numbers")
    return found


def _checked(judged: tuple[Tally, Tally, Any], units: np.ndarray) -> tuple[Tally, Tally, Any]:
    """Check a client's report about its model: hits must not exceed units.

    Raises:
      WireError: if the report is impossible.
    """
    common, personal, weight = judged
    if weight < 0:
        raise wire.WireError("judged: a weight below 0")
    for tally, most in ((common, units), (personal, weight)):
        hits = 0 if tally.hits is None else np.asarray(tally.hits)
        if np.any(hits < 0) or np.any(hits > most * 1.001 + 1e-3):
            raise wire.WireError("judged: more hits than units")
    return judged


def _take(
    federation: Federation, total: Any, begun: Server, upload: Upload, slots: Array, steps: Array
) -> tuple[Any, server.Verdict]:
    """Decode one answer, decide whether to admit it, and add it to the aggregate."""
    site, desk = federation.site, federation.desk
    down = server.send(desk, begun, slots, steps)
    sent = client.decode(site.codec, (upload.shared, upload.experts), (down.shared, down.experts))
    arrived = upload._replace(shared=sent[0], experts=sent[1])
    by_layer = {layer: slots[group] for layer, group in site.group.items()}
    update, verdict = server.admit(
        desk.admission, arrived, by_layer, steps, server.limits(desk, begun), desk.fitness.sketched
    )
    block = jax.tree.map(lambda x: x[None], update)
    return federation.aggregation.add(total, block), verdict


def _close(
    federation: Federation, begun: Server, total: Any, verdicts: server.Verdict, plan: Plan
) -> tuple[Server, server.Verdict, RoundReport]:
    """Close the round; return the server after it, the final verdicts, and the report."""
    desk = federation.desk
    following, verdicts, late = server.conclude(
        desk, federation.aggregation, begun, total, verdicts, plan
    )
    finite = client.all_finite((following.shared, following.experts))
    report = server.report(desk, plan, verdicts, late, finite)
    return following, verdicts, report
