"""Evaluation of every client's model on the whole test set, in one pass over the examples.

What all clients compute alike of an example is computed once, not once per client; what differs
(gates, experts held, private parts) runs on those features, block by block of clients. Devices
share the examples.

Axis legend: `C` clients, `B` batch, `U` units of an example, `Y` classes (one column for all
examples where they have no class), `E` experts, `K` expert slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from flexmoe_jax.simulation.blocks import AXIS, client_mesh, over_devices
from flexmoe_jax.simulation.standalone import of_client
from flexmoe_jax.types import Array, Evaluation, Params, PyTree, State, Tally

_SHARED = PartitionSpec(None, AXIS)


class TestSet(NamedTuple):
    """The test set in equal chunks.

    Attributes:
      arrays: named examples, leaves (chunks, B, ...).
      valid: (chunks, B) bool; False marks padding.
      group: (chunks, B) int32, the group that each example is of, -1 for none: a domain, or one
        client (see `data.About`). None where clients have no test examples of their own.
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
    """Cuts a test set into chunks of about `batch_size`, as even as can be, shared by the mesh.

    Args:
      arrays: named examples, leaves (M, ...).
      batch_size: B, about.
      mesh: from `client_mesh`; None for one device.
      group: (M,) int, the group that each example is of, -1 for none; None where clients have no
        test examples of their own.

    Raises:
      InputError: arrays of different lengths, or none; or a `batch_size` below 1.
    """
    mesh = mesh or client_mesh(1)
    lengths = {name: len(values) for name, values in arrays.items()}
    count = next(iter(lengths.values()), 0)
    if not count or set(lengths.values()) != {count}:
        raise InputError("test", lengths, "give arrays with one entry for each test example")
    if batch_size < 1:
        raise InputError("batch_size", batch_size, "choose 1 or more")
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
        None if group is None else cut(np.asarray(group, np.int32), -1),
    )


class Checked:
    """The jitted `evaluate`, which looks at a test set when it is first given it."""

    def __init__(self, federation: Federation, jitted: jax.stages.Wrapped) -> None:
        """Has seen none."""
        self._federation, self._jitted = federation, jitted
        self.lower, self.trace = jitted.lower, jitted.trace
        self._seen: TestSet | None = None

    def __call__(
        self, state: State, test: TestSet, about: About, models: Params | None = None
    ) -> Evaluation:
        """See `evaluate`."""
        if test is not self._seen:
            check_test(self._federation, test, about)
            self._seen = test
        found: Evaluation = self._jitted(state, test, about, models)
        return found


def check_test(federation: Federation, test: TestSet, about: About) -> None:
    """Refuses a test set that does not fit a federation.

    Raises:
      InputError: arrays where a test set belongs, arrays that the task or the model cannot take,
        or groups that are nobody's.
    """
    if not isinstance(test, TestSet):
        remedy = "give what chunk_test_set(arrays) makes of them"
        raise InputError("test", type(test).__name__, remedy)
    leaves = jax.tree.leaves(test)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) or jax.process_count() > 1:
        return  # Nobody can look at the numbers here.
    try:
        jax.eval_shape(federation.task.inputs, {n: x[0] for n, x in test.arrays.items()})
    except KeyError as error:
        remedy = (
            f"the task reads {error}: give the test examples the names of the training examples"
        )
        raise InputError("test", ", ".join(test.arrays), remedy) from error
    valid = np.asarray(test.valid).ravel()
    federation.check(_Rows(test.arrays, valid))
    if test.group is None:
        return
    group = np.asarray(test.group).ravel()[valid]
    most = federation.clients if about.owns is None else about.owns.shape[1]
    check_range("group", group, -1, most - 1, "where -1 is for what is nobody's own")


class _Rows(Mapping[str, np.ndarray]):
    """The test examples by name (M, ...), brought to the host as they are asked for."""

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
      federation: all its choices.
      mesh: devices that share the examples, along its axis `AXIS`.
      state: of the federation.
      test: the test set.
      about: what is known of the clients. Where they have no test examples of their own, personal
        figures are means over the classes of the test set, weighted by their label shares.
      models: (C, ...) of the clients, from `tune`; None for those that they have: the aggregated
        parts, and their own. Label shares are added to outputs of tuned ones only where training
        leaves them out (`local.prior`): else they have learnt them.

    Returns:
      What the models make of it. Clients that have never held an expert take no part.
    """
    # Slots rise, so an empty first slot means none held.
    evaluated = (state.clients.slots[:, :, 0] < federation.layout.experts).any(axis=1)

    if models is not None:  # Each has a trunk of its own, and has learnt its prior as well.
        whole = federation.model._replace(
            trunk=lambda params, inputs: inputs, head=federation.model.apply
        )
        prior = federation.prior and federation.local.prior > 0
        federation = federation.replace(model=whole, prior=prior)

    def of_device(test: TestSet, known: _Known) -> tuple[_Sums, None]:
        return _count(federation, test, known), None

    known = state, about, evaluated, models
    sums, _ = over_devices(of_device, test, known, mesh, spec=_SHARED)
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
    """Sums over test examples: see `Evaluation`; `personal` is by class without owners."""

    common: Tally
    units: Array
    personal: Tally
    own_units: Array
    server: Tally
    assembled: Tally | None


_Known = tuple[State, About, Array, Params | None]
"""The federation, its clients, who of them has held an expert, and their models if given."""


def _count(federation: Federation, test: TestSet, known: _Known) -> _Sums:
    """Sums over one device's share of the examples."""
    state, about, evaluated, models = known
    clients, classes = about.label_share.shape
    log_share = client.log_shares(about.label_share)
    numbers = jnp.arange(clients, dtype=jnp.int32)
    blocks = _blocks((numbers, state.clients, models, log_share, about.owns, evaluated))
    trunk = _trunk(federation)

    def of_chunk(chunk: TestSet) -> _Sums:
        features = trunk(state.server.shared, chunk.arrays)
        judge = client.Judge(federation.task, chunk.arrays, chunk.valid, classes)

        def judge_client(*row: Any) -> tuple:
            number, own, model, log_share, owns, counts = row
            given, held = of_client(federation, state.server, own)
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
            counted: tuple[PyTree, tuple[Tally, Tally]] = jax.tree.map(
                lambda x: counts.astype(x.dtype) * x, (joint, (common, personal))
            )
            return counted

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
            assembled=_assembled(federation, state, features, judge),
        )

    one = jax.tree.map(lambda x: x[0], test)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_chunk, one))
    total, _ = lax.scan(
        lambda t, chunk: (jax.tree.map(jnp.add, t, of_chunk(chunk)), None), none, test
    )
    return total


def _units_of_own(judge: client.Judge, chunk: TestSet, about: About) -> Array:
    """(C,) units of each client's own examples; 0 where nobody has any."""
    clients = about.label_share.shape[0]
    groups = clients if about.owns is None else about.owns.shape[1]
    none = jnp.zeros(groups, jnp.float32)
    if chunk.group is None:
        return jnp.zeros(clients, jnp.float32)
    # A number out of range is dropped; a negative one would count from the end.
    group = jnp.where(chunk.group >= 0, chunk.group, groups)
    units = none.at[group].add(judge.units(), mode="drop")
    return units if about.owns is None else jnp.where(about.owns, units[None], 0.0).sum(axis=1)


def _outputs(
    federation: Federation, params: Params, features: PyTree, held: dict[str, Array]
) -> PyTree:
    """Outputs from the trunk's features, or from the inputs where every client has its own."""
    model, merged = federation.model, federation.layout.merge(params)
    if federation.shares_trunk:
        return model.head(merged, features, held)[0]
    return model.apply(merged, features, held)[0]


def _assembled(
    federation: Federation, state: State, features: PyTree, judge: client.Judge
) -> Tally | None:
    """All experts and their gates in one model, where none of its parts stays with a client."""
    if not federation.assembles:
        return None
    params, held = federation.assemble(state.server)
    return judge.all_rows(_outputs(federation, params, features, held))


def _trunk(federation: Federation) -> Any:
    """(ψ, named arrays) -> what every client computes alike of them."""

    def shared_trunk(shared: PyTree, arrays: dict[str, Array]) -> PyTree:
        inputs = federation.task.inputs(arrays)
        if not federation.shares_trunk:
            return inputs
        return federation.model.trunk(federation.layout.merge_shared(shared), inputs)

    return shared_trunk


def _blocks(clients: PyTree) -> PyTree:
    """Leaves (C, ...) as (blocks, p, ...), padded with zeros: p clients run side by side."""
    count = jax.tree.leaves(clients)[0].shape[0]
    together = 1 if jax.default_backend() == "cpu" else min(64, count)

    def cut(leaf: Array) -> Array:
        padding = [(0, -count % together)] + [(0, 0)] * (leaf.ndim - 1)
        padded = jnp.pad(leaf, padding)
        return padded.reshape(len(padded) // together, together, *leaf.shape[1:])

    return jax.tree.map(cut, clients)
