"""Evaluates every client's model on the whole test set, in one pass over the examples.

Features that all clients compute identically are computed once per example, not once per client.
The parts that differ between clients (gates, held experts, private parts) run on those features,
one block of clients at a time. The devices share the examples.

Axis legend: `C` clients, `B` batch, `U` units of an example, `Y` classes (a single column for all
examples if they have no class), `E` experts, `K` expert slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexmoe_jax import client
from flexmoe_jax.data import About
from flexmoe_jax.errors import InputError, check_range
from flexmoe_jax.federation import Federation
from flexmoe_jax.simulation.blocks import AXES, WHOLE, client_mesh, over_devices
from flexmoe_jax.simulation.exchange import OF_STATE, expert_devices, fetch_alike
from flexmoe_jax.simulation.standalone import of_client
from flexmoe_jax.types import Array, Evaluation, Params, PyTree, State, Tally

_SHARED = PartitionSpec(None, AXES)


class TestSet(NamedTuple):
    """The test set in chunks of equal size.

    Attributes:
      arrays: named examples, leaves (chunks, B, ...).
      valid: (chunks, B) bool; False marks padding.
      group: (chunks, B) int32, the group of each example, -1 for none. A group is a domain or a
        single client (see `data.About`). None if clients have no test examples of their own.
    """

    arrays: dict[str, Array]
    valid: Array
    group: Array | None = None


def chunk_test_set(
    arrays: dict[str, np.ndarray],
    batch_size: int = 500,
    mesh: Mesh | None = None,
    group: np.ndarray | None = None,
) -> TestSet:
    """Cuts a test set into equal chunks of about `batch_size`, shared by the devices of a mesh.

    Args:
      arrays: named examples, leaves (M, ...).
      batch_size: the approximate B; padding is kept as small as possible.
      mesh: from `client_mesh`; None for one device.
      group: (M,) int, the group of each example, -1 for none. A client without a group's examples
        has no personal figures. None if no client has test examples of its own.

    Raises:
      InputError: arrays of different lengths, no examples, a `batch_size` below 1, or groups that
        are not one whole number for each example.
    """
    mesh = mesh or client_mesh(1)
    lengths = {name: len(values) for name, values in arrays.items()}
    count = next(iter(lengths.values()), 0)
    if not count or set(lengths.values()) != {count}:
        raise InputError("test", lengths, "give arrays with one entry for each test example")
    if batch_size < 1:
        raise InputError("batch_size", batch_size, "choose 1 or more")
    if group is not None:
        group = np.asarray(group)
        if group.shape != (count,) or not np.issubdtype(group.dtype, np.integer):
            found = f"{group.dtype}{list(group.shape)}"
            raise InputError("group", found, f"give a whole number for each example: int[{count}]")
    chunks = -(-count // batch_size)
    size = -(-count // (chunks * mesh.size)) * mesh.size
    padding = chunks * size - count
    shared = NamedSharding(mesh, _SHARED)

    def cut(values: np.ndarray, filler: int) -> Array:
        ends = np.full((padding, *values.shape[1:]), filler, values.dtype)
        padded = np.concatenate([values, ends])
        return jax.device_put(padded.reshape(chunks, size, *values.shape[1:]), shared)

    return TestSet(
        {name: cut(values, 0) for name, values in arrays.items()},
        cut(np.ones(count, bool), 0),
        None if group is None else cut(group.astype(np.int32), -1),
    )


class Checked:
    """The jitted `evaluate`, which checks a test set on its first use."""

    def __init__(self, federation: Federation, jitted: jax.stages.Wrapped) -> None:
        """Wraps the jitted function; no test set is checked yet."""
        self._check, self._jitted = checker(federation), jitted
        self.lower, self.trace = jitted.lower, jitted.trace

    def __call__(
        self, state: State, test: TestSet, about: About, models: Params | None = None
    ) -> Evaluation:
        """See `evaluate`."""
        self._check(test, about)
        found: Evaluation = self._jitted(state, test, about, models)
        return found


def checker(federation: Federation) -> Callable[[TestSet, About], None]:
    """Returns `check_test`, which leaves out a test set that it checked the last time."""
    seen: list[TestSet] = []

    def check(test: TestSet, about: About) -> None:
        if not any(test is known for known in seen):
            check_test(federation, test, about)
            seen[:] = [test]

    return check


def check_test(federation: Federation, test: TestSet, about: About) -> None:
    """Refuses a test set that does not fit a federation.

    Raises:
      InputError: `test` is not a `TestSet`, the task or the model cannot take its arrays, a group
        number is out of range, or examples have classes that the clients' label shares do not know.
    """
    if not isinstance(test, TestSet):
        remedy = "give what chunk_test_set(arrays) makes of them"
        raise InputError("test", type(test).__name__, remedy)
    leaves = jax.tree.leaves(test)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) or jax.process_count() > 1:
        return  # The values cannot be read here.
    try:
        jax.eval_shape(federation.task.inputs, {n: x[0] for n, x in test.arrays.items()})
    except KeyError as error:
        remedy = (
            f"the task reads {error}: give the test examples the names of the training examples"
        )
        raise InputError("test", ", ".join(test.arrays), remedy) from error
    valid = np.asarray(test.valid).ravel()
    rows = _Rows(test.arrays, valid)
    federation.check(rows)
    clients, classes = about.label_share.shape
    if classes and federation.task.labels is not None:
        named: dict[str, Any] = {name: rows[name] for name in rows}
        labels = np.asarray(federation.task.labels(named))
        check_range("labels of the test set", labels, 0, classes - 1, "the classes of `counts`")
    if test.group is None:
        return
    group = np.asarray(test.group).ravel()[valid]
    most = clients if about.owns is None else about.owns.shape[1]
    check_range("group", group, -1, most - 1, "where -1 is for what is nobody's own")


class _Rows(Mapping[str, np.ndarray]):
    """The test examples by name (M, ...); each array is copied to the host on access."""

    def __init__(self, chunks: Mapping[str, Array], valid: np.ndarray) -> None:
        self._chunks, self._valid = chunks, valid

    def __getitem__(self, name: str) -> np.ndarray:
        chunked = np.asarray(self._chunks[name])
        rows: np.ndarray = chunked.reshape(-1, *chunked.shape[2:])[self._valid]
        return rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)


def evaluate(
    federation: Federation,
    mesh: Mesh,
    state: State,
    test: TestSet,
    about: About,
    models: Params | None = None,
) -> Evaluation:
    """Evaluates all clients with the aggregated ψ and θ, their own gates and latest experts.

    Args:
      federation: the configuration of the federation.
      mesh: devices that share the examples. If several of them share the experts, no device ever
        has all experts, and the model of all experts is left out (`Evaluation.assembled` is None).
      state: of the federation.
      test: the test set.
      about: information about the clients. If they have no test examples of their own, personal
        figures are means over the classes of the test set, weighted by their label shares.
      models: (C, ...) the clients' models from `tune`. None for the clients' current models, which
        consist of the aggregated parts and their own. Label shares are added to the outputs of
        tuned models only if training leaves them out (`local.prior`). Otherwise the tuned models
        have learnt them.

    Returns:
      The evaluation. Clients that have never held an expert are left out.
    """
    # Slots are sorted and empty slots come last: if the first slot is empty, all are.
    evaluated = (state.clients.slots[:, :, 0] < federation.layout.experts).any(axis=1)

    if models is not None:  # Each model has its own trunk; for the prior see `models` above.
        whole = federation.model._replace(
            trunk=lambda params, inputs: inputs, head=federation.model.apply
        )
        prior = federation.prior and federation.local.prior > 0
        federation = federation.replace(model=whole, prior=prior)

    def of_device(test: TestSet, known: _Known) -> tuple[_Sums, None]:
        return _count(federation, mesh, test, known), None

    known = state, about, evaluated, models
    of_known = OF_STATE, WHOLE, WHOLE, WHOLE
    sums, _ = over_devices(of_device, test, known, mesh, spec=_SHARED, of_whole=of_known)
    weight = sums.own_units
    personal = sums.personal
    if test.group is None:
        given = about.label_share if about.label_share.shape[1] else jnp.ones((1, 1), jnp.float32)
        share = jnp.broadcast_to(given, (evaluated.size, given.shape[1]))
        personal, weight = client.weigh_classes(sums.personal, sums.units, share)
    return Evaluation(
        common=sums.common,
        units=sums.units,
        personal=personal,
        personal_weight=weight,
        server=sums.server,
        assembled=sums.assembled,
        evaluated=evaluated,
    )


class _Sums(NamedTuple):
    """Sums over test examples, as in `Evaluation`; without groups, `personal` is by class."""

    common: Tally
    units: Array
    personal: Tally
    own_units: Array
    server: Tally
    assembled: Tally | None


_Known = tuple[State, About, Array, Params | None]
"""The state, the clients' `About`, which clients have held an expert, and their models if given."""


def _count(federation: Federation, mesh: Mesh, test: TestSet, known: _Known) -> _Sums:
    """Computes the sums over one device's share of the examples."""
    state, about, evaluated, models = known
    clients, classes = about.label_share.shape
    log_share = client.log_shares(about.label_share)
    numbers = jnp.arange(clients, dtype=jnp.int32)
    blocks = _blocks((numbers, state.clients, models, log_share, about.owns, evaluated))
    trunk, fetch = _trunk(federation), fetch_alike(mesh)

    @jax.jit  # As is `judge_client`: one trace for the shapes of the sums and for the scan.
    def of_chunk(chunk: TestSet) -> _Sums:
        features = trunk(state.server.shared, chunk.arrays)
        judge = client.Judge(federation.task, chunk.arrays, chunk.valid, classes)

        @jax.jit
        def judge_client(*row: Any) -> tuple:
            number, own, model, log_share, owns, counts = row
            given, held = of_client(federation, state.server, own, fetch)
            outputs = _outputs(federation, given if model is None else model, features, held)
            mine = federation.own_outputs(outputs, log_share)
            personal = judge.by_class(mine)
            if chunk.group is not None:
                theirs = chunk.group == number
                if owns is not None:
                    theirs = (chunk.group >= 0) & owns[chunk.group]
                personal = judge.of_rows(mine, theirs)
            common = judge.by_class(outputs)
            joint = federation.task.mean[0](outputs)
            return _if_counted(counts, (joint, (common, personal)))

        def of_block(total: PyTree, block: tuple) -> tuple[PyTree, tuple[Tally, Tally]]:
            joint, tallies = jax.vmap(judge_client)(*block)
            return jax.tree.map(lambda t, x: t + x.sum(axis=0), total, joint), tallies

        first = jax.tree.map(lambda x: x[0, 0], blocks)
        nothing = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(judge_client, *first)[0]
        )
        total, tallies = lax.scan(of_block, nothing, blocks)
        common, personal = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:clients], tallies)
        number = jnp.maximum(evaluated.sum(dtype=jnp.float32), 1.0)
        joint = federation.task.mean[1](jax.tree.map(lambda x: x / number, total))
        return _Sums(
            common=common,
            units=judge.units_by_class(),
            personal=personal,
            own_units=_units_of_own(judge, chunk, about),
            server=judge.all_rows(joint),
            assembled=_assembled(federation, mesh, state, features, judge),
        )

    one = jax.tree.map(lambda x: x[0], test)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_chunk, one))
    total, _ = lax.scan(
        lambda t, chunk: (jax.tree.map(jnp.add, t, of_chunk(chunk)), None), none, test
    )
    return total


def _if_counted(counts: Array, figures: tuple) -> tuple:
    """Returns a client's figures, or zeros: without experts they may be NaN, and so is 0 · NaN."""
    kept: tuple = jax.tree.map(lambda x: jnp.where(counts, x, jnp.zeros_like(x)), figures)
    return kept


def _units_of_own(judge: client.Judge, chunk: TestSet, about: About) -> Array:
    """(C,) units of each client's own test examples; all 0 if clients have none of their own."""
    clients = about.label_share.shape[0]
    groups = clients if about.owns is None else about.owns.shape[1]
    none = jnp.zeros(groups, jnp.float32)
    if chunk.group is None:
        return jnp.zeros(clients, jnp.float32)
    # An index out of range is dropped, but a negative index would count from the end.
    group = jnp.where(chunk.group >= 0, chunk.group, groups)
    units = none.at[group].add(judge.units(), mode="drop")
    return units if about.owns is None else jnp.where(about.owns, units[None], 0.0).sum(axis=1)


def _outputs(
    federation: Federation, params: Params, features: PyTree, held: dict[str, Array]
) -> PyTree:
    """Outputs from the trunk's features, or from the inputs if every client has its own trunk."""
    model, merged = federation.model, federation.layout.merge(params)
    if federation.shares_trunk:
        return model.head(merged, features, held)[0]
    return model.apply(merged, features, held)[0]


def _assembled(
    federation: Federation, mesh: Mesh, state: State, features: PyTree, judge: client.Judge
) -> Tally | None:
    """Evaluates all experts in one model; None if parts stay with clients, or on other devices."""
    if not federation.assembles or expert_devices(mesh) > 1:
        return None
    params, held = federation.assemble(state.server)
    return judge.all_rows(_outputs(federation, params, features, held))


def _trunk(federation: Federation) -> Any:
    """Returns (ψ, named arrays) -> features, or inputs, that are the same for all clients."""

    def shared_trunk(shared: PyTree, arrays: dict[str, Array]) -> PyTree:
        inputs = federation.task.inputs(arrays)
        if not federation.shares_trunk:
            return inputs
        return federation.model.trunk(federation.layout.merge_shared(shared), inputs)

    return shared_trunk


def _blocks(clients: PyTree) -> PyTree:
    """Reshapes leaves (C, ...) to (blocks, p, ...), padded with zeros; p clients run together."""
    count = jax.tree.leaves(clients)[0].shape[0]
    together = 1 if jax.default_backend() == "cpu" else min(64, count)

    def cut(leaf: Array) -> Array:
        padding = [(0, -count % together)] + [(0, 0)] * (leaf.ndim - 1)
        padded = jnp.pad(leaf, padding)
        return padded.reshape(len(padded) // together, together, *leaf.shape[1:])

    return jax.tree.map(cut, clients)
