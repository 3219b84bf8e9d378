"""Simulates a federation: init, assign, plan, round and evaluate, as pure functions.

A round has two parts. On the host, the server assigns experts to the cohort. Then, in one jit,
every client of the plan receives its experts, trains and answers, and the server admits and
aggregates the answers and closes the round. The functions of `client` and `server` are mapped over
blocks of clients.

Axis legend: `C` clients, `P` clients of the plan, `E` experts, `K` expert slots, `G` groups of MoE
layers, `L` MoE layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from flexmoe_jax import client, server
from flexmoe_jax.assignment import Solution
from flexmoe_jax.data import ClientData
from flexmoe_jax.errors import InputError
from flexmoe_jax.federation import Federation
from flexmoe_jax.options.execution import ExecutionOptions
from flexmoe_jax.simulation.blocks import (
    WHOLE,
    client_mesh,
    over_blocks,
    over_devices,
    put_rows,
    replicate,
    resolve_block_size,
    take_rows,
    together,
)
from flexmoe_jax.simulation.evaluate import Checked, evaluate
from flexmoe_jax.simulation.exchange import OF_SERVER, check_split, fetch_own, split_sums
from flexmoe_jax.simulation.initial import init, places
from flexmoe_jax.simulation.plan import Arrival, Floor, Tampering, check_cohort, make_plan
from flexmoe_jax.simulation.probe import probe_all
from flexmoe_jax.simulation.rows import ALL_STEPS, Row, draw_rows
from flexmoe_jax.simulation.tuning import tune
from flexmoe_jax.types import (
    Array,
    Download,
    Evaluation,
    Key,
    Own,
    Params,
    Plan,
    PyTree,
    RoundReport,
    Server,
    State,
    Upload,
)

# Number of batches on which a client scores each expert, whether it holds the expert or not.
_ASKED = 4


class MakePlan(Protocol):
    """See `Simulation.plan`."""

    def __call__(
        self,
        cohort: np.ndarray,
        solutions: tuple[Solution, ...],
        arrival: Arrival | None = None,
    ) -> Plan:
        """Lays out a cohort and its assignment."""


class Setting(NamedTuple):
    """The settings of all rounds, for code that plans rounds on the device or compiles them.

    Attributes:
      floor: the layout in which cohorts train.
      capacity: (C,) int k_c.
      steps: (C,) int local steps of each client in a round.
      federation: the configuration of the federation.
      mesh: the devices.
    """

    floor: Floor
    capacity: np.ndarray
    steps: np.ndarray
    federation: Federation
    mesh: Mesh


class Simulation(NamedTuple):
    """A federation as pure functions.

    Attributes:
      init: key -> State. Jitted.
      assign: (State, cohort (P,), ClientData=None) -> a Solution for each group of MoE layers. Runs
        on the host. The data are needed if clients score all experts first (`fitness.probe`).
      plan: (cohort (P,), solutions, Arrival or None) -> Plan, the arrays that `round` takes. Runs
        on the host. Without an `Arrival`, all clients deliver all their work.
      round: (State, ClientData, Plan) -> (State, RoundReport). Jitted; the state is donated.
      tune: (State, ClientData of all clients) -> Params (C, ...): each client's model after it has
        trained once more, for itself alone (see `tuning.tune`). Jitted.
      evaluate: (State, TestSet, About, models=None) -> Evaluation, of the given models of the
        clients if there are any. Jitted.
      setting: the settings that the functions above were built with.
    """

    init: Callable[[Key], State]
    assign: Callable[..., tuple[Solution, ...]]
    plan: MakePlan
    round: Callable[[State, ClientData, Plan], tuple[State, RoundReport]]
    tune: Callable[[State, ClientData], Params]
    evaluate: Callable[..., Evaluation]
    setting: Setting


def simulate(
    federation: Federation,
    data: ClientData,
    *,
    rows: int = 0,
    block_size: int = 0,
    mesh: Mesh | None = None,
) -> Simulation:
    """Builds the simulation of a federation.

    Args:
      federation: the configuration of the federation.
      data: every client's examples, on the device or on the host. `round` takes them, or those of
        its cohort (`data.feed_cohorts`), as an argument, so that the compiled program contains no
        examples.
      rows: how many clients a plan has room for, if cohorts differ in size; 0 for the cohort's.
      block_size: clients side by side on a device; 0 for automatic.
      mesh: the devices that share a cohort, from `client_mesh`; None for one device. Pass to
        `round` and `evaluate` arrays that `replicate` has put on this mesh.

    Raises:
      InputError: the data do not fit the federation, or the experts cannot be split over the mesh.
    """
    federation.check_data(data.arrays, data.label_share)
    ExecutionOptions.check(client_block_size=block_size)
    mesh = mesh or client_mesh(1)
    check_split(federation, mesh)
    everywhere = NamedSharding(mesh, WHOLE)
    of_state = places(federation.clients, mesh)
    steps = np.asarray(federation.local.steps(np.asarray(data.size)))
    floor = Floor(federation.clients, federation.slots, rows, block_size, mesh.size)
    jitted = partial(jax.jit, out_shardings=everywhere)
    return Simulation(
        init=jax.jit(partial(init, federation), out_shardings=of_state),
        assign=_assigner(federation, floor, mesh, data, jitted),
        plan=partial(_plan, federation, floor, steps, mesh),
        round=jax.jit(
            partial(run_round, federation, floor, mesh),
            donate_argnums=0,
            out_shardings=(of_state, everywhere),
        ),
        tune=jitted(partial(tune, federation, floor, mesh)),
        evaluate=Checked(federation, jitted(partial(evaluate, federation, mesh))),
        setting=Setting(floor, np.asarray(federation.capacity, np.int64), steps, federation, mesh),
    )


def _assigner(
    federation: Federation,
    floor: Floor,
    mesh: Mesh,
    data: ClientData,
    jitted: Callable[[Callable[..., Array]], Callable[..., Array]],
) -> Callable[..., tuple[Solution, ...]]:
    """See `Simulation.assign`."""
    assign = federation.make_assign(
        np.asarray(data.size),
        np.asarray(data.label_share) if data.label_share.shape[1] else None,
        _given_profile(federation, data),
    )
    ask = jitted(partial(ask_cohort, federation, floor, mesh))

    def assign_cohort(
        state: State, cohort: np.ndarray, data: ClientData | None = None
    ) -> tuple[Solution, ...]:
        cohort = check_cohort(cohort, federation.clients)
        if federation.fitness.probe != "all":
            return assign(state.server, cohort)
        if data is None:
            raise InputError("data", None, "fitness.probe=all asks clients: give the cohort's data")
        room = max(floor.rows, len(cohort))
        numbers = np.pad(cohort, (0, room - len(cohort)), constant_values=federation.clients)
        begin = time.perf_counter()
        said = np.asarray(ask(state, data, replicate(numbers.astype(np.int32), mesh)))
        asking = time.perf_counter() - begin
        first, *others = assign(state.server, cohort, said[:, : len(cohort)])
        # The time for asking clients is part of the assignment's time; only one solution gets it.
        return (replace(first, seconds=first.seconds + asking), *others)

    return assign_cohort


def _given_profile(federation: Federation, data: ClientData) -> np.ndarray | None:
    """Prior knowledge (C, F) about the clients, minus its mean; None if updates provide a profile.

    Raises:
      InputError: nothing is known about the clients in advance.
    """
    if not federation.fitness.affinity or federation.fitness.profile != "given":
        return None
    known = np.asarray(data.label_share if data.owns is None else data.owns, np.float64)
    if not known.shape[1]:
        remedy = "nothing is known of clients beforehand: give updates"
        raise InputError("fitness.profile", "given", remedy)
    share = known / np.maximum(known.sum(axis=1, keepdims=True), 1e-12)
    return np.asarray(share - share.mean(axis=0))


def _plan(
    federation: Federation,
    floor: Floor,
    steps: np.ndarray,
    mesh: Mesh,
    cohort: np.ndarray,
    solutions: tuple[Solution, ...],
    arrival: Arrival | None = None,
) -> Plan:
    """See `Simulation.plan`."""
    cohort = check_cohort(cohort, federation.clients)
    planned = steps[cohort]
    assignment = np.stack([solution.assignment for solution in solutions], axis=1)
    if len(assignment) != len(cohort):
        remedy = f"give the solutions of this cohort, of {len(cohort)} clients"
        raise InputError("solutions", f"for {len(assignment)} clients", remedy)
    if (over := assignment.sum(axis=2).max(axis=1) > federation.capacity[cohort]).any():
        remedy = f"client {cohort[over][0]} has no room for so many: give those of this cohort"
        raise InputError("solutions", f"{assignment[over][0].sum(axis=1).max()} experts", remedy)
    use = None
    if federation.splits_use:
        even = assignment / np.maximum(assignment.sum(axis=2, keepdims=True), 1)
        given = [even[:, g] if s.use is None else s.use for g, s in enumerate(solutions)]
        use = np.stack(given, axis=1)
    room = max(floor.rows, len(cohort), 1)
    tampering = Tampering() if arrival is None else Tampering(arrival.tamper, arrival.noise)
    if arrival is not None:
        planned = np.floor(arrival.work * planned + 1e-9).astype(np.int32)
        cohort, planned, assignment, use, tampering = jax.tree.map(
            lambda x: x[arrival.reached], (cohort, planned, assignment, use, tampering)
        )
    size = resolve_block_size(floor.block_size, room, floor.devices)
    secret = federation.admission.private and not federation.admission.simulated_noise
    laid_out = make_plan(
        cohort,
        assignment,
        np.stack([solution.load for solution in solutions]),
        floor._replace(rows=room, block_size=size),
        planned,
        tampering,
        server.draw_secret() if secret else None,
        use,
    )
    if federation.fitness.sketched:
        alike: Any = np.array(any(solution.alike for solution in solutions))
        laid_out = laid_out._replace(alike=alike)
    # A solver with a time limit may give different results on different hosts: all hosts use the
    # plan of the first one.
    if jax.process_count() > 1:
        laid_out = multihost_utils.broadcast_one_to_all(laid_out)
    plan: Plan = replicate(laid_out, mesh)
    return plan


def run_round(
    federation: Federation, floor: Floor, mesh: Mesh, state: State, data: ClientData, plan: Plan
) -> tuple[State, RoundReport]:
    """Runs one round for all clients of a plan (P,): send, train, admit, close."""
    site, desk = federation.site, federation.desk
    key = jax.random.fold_in(state.server.key, state.server.round)
    received = jax.vmap(partial(client.receive, site))(
        take_rows(state.clients, plan.clients), plan.slots
    )
    total, (owns, verdicts) = _train_cohort(
        federation, floor, mesh, state.server, received, data, plan, key
    )

    def gather(shared_out: Any, spec: PyTree = WHOLE) -> Any:
        if mesh.size == 1:
            return shared_out
        return lax.with_sharding_constraint(
            shared_out, jax.tree.map(partial(NamedSharding, mesh), spec)
        )

    # Every device gets all results before the server continues. Otherwise devices exchange parts
    # inside a median's sort, which takes longer than the whole sort on each device, and inside a
    # robust mean's loops, where XLA's CPU devices can wait for each other in different exchanges
    # and deadlock.
    owns = gather(owns)
    verdicts = together(gather, verdicts) if mesh.size > 1 else verdicts
    aggregator, of_total = split_sums(federation.aggregation, mesh)
    following, verdicts, late = server.conclude(
        desk, aggregator, state.server, total, verdicts, plan, partial(gather, spec=of_total)
    )
    finite = client.all_finite((following.shared, following.experts, owns.gates, owns.private))
    report = server.report(desk, plan, verdicts, late, finite)
    # Clients whose updates are refused late keep what they had before.
    kept = jax.vmap(client.keep_if_accepted)(received, owns, ~late)
    return State(following, put_rows(state.clients, plan.clients, kept)), report


def _train_cohort(
    federation: Federation,
    floor: Floor,
    mesh: Mesh,
    begun: Server,
    received: Own,
    data: ClientData,
    plan: Plan,
    key: Key,
) -> tuple[Any, tuple[Own, server.Verdict]]:
    """Sends to every client of a plan, trains it and admits its answer; devices share the clients.

    Returns:
      The aggregator's total; what each client then owns unless its answer is refused late; and the
      verdict on each answer, leaves (P, ...).
    """
    site, desk, fetch = federation.site, federation.desk, fetch_own(mesh)
    aggregator, of_total = split_sums(federation.aggregation, mesh)
    limits = server.limits(desk, begun)

    def train_share(share: tuple[Plan, Own], known: tuple) -> tuple[Any, PyTree]:
        plan, received = share
        data, begun, key, limits = known
        rows = draw_rows(federation, data, plan, key), received

        def visit(one: tuple[Row, Own]) -> tuple[server.Arrived, tuple[Own, server.Verdict]]:
            row, own = one
            down = server.send(desk, begun, row.slots, row.steps, fetch, row.use)
            after, upload = client.train_and_answer(
                site, own, down, data.arrays, row.batches, row.log_share
            )
            arrived = _deliver(site, upload, down, row)
            slots = {layer: row.slots[group] for layer, group in site.group.items()}
            update, verdict = server.admit(
                desk.admission, arrived, slots, row.steps, limits, desk.fitness.sketched
            )
            return update, (client.keep_if_accepted(own, after, verdict.accepted), verdict)

        zero = aggregator.zero(begun.shared, begun.experts, len(plan.clients), floor.slots)
        size = resolve_block_size(floor.block_size, len(plan.clients))
        return over_blocks(visit, aggregator.add, zero, rows, size)

    share, known = (_of_clients(plan), received), (data, begun, key, limits)
    return over_devices(
        train_share,
        share,
        known,
        mesh,
        merge=aggregator.merge,
        of_whole=(WHOLE, OF_SERVER, WHOLE, WHOLE),
        of_total=of_total,
    )


def _of_clients(plan: Plan) -> Plan:
    """Returns a plan without the arrays that have no client axis, to divide it among devices."""
    nothing: Any = None
    return plan._replace(load=nothing, secret=nothing, alike=nothing)


def ask_cohort(
    federation: Federation, floor: Floor, mesh: Mesh, state: State, data: ClientData, cohort: Array
) -> Array:
    """Scores all experts (G, P, E) on a few of the batches that each client trains on next."""
    key = jax.random.fold_in(state.server.key, state.server.round)
    slots = take_rows(state.clients.slots, cohort)
    nothing: Any = None
    plan = Plan(cohort, slots, nothing, jnp.full(cohort.shape, ALL_STEPS), nothing)
    rows = draw_rows(federation, data, plan, key)
    each = take_rows(state.clients, cohort), rows.batches.rows[:, :_ASKED], rows.log_share
    return probe_all(federation, mesh, state.server, each, data.arrays)


def _deliver(site: client.Site, upload: Upload, down: Download, row: Row) -> Upload:
    """Returns an answer as it reaches the server: decoded, and altered if its client is faulty."""
    like = down.shared, down.experts
    shared, experts = client.decode(site.codec, (upload.shared, upload.experts), like)
    sent = tamper((shared, experts), row.tampering, row.key)
    return upload._replace(shared=sent[0], experts=sent[1])


def tamper(sent: tuple[PyTree, PyTree], tampering: Tampering, key: Key) -> tuple[PyTree, PyTree]:
    """Alters an update as a faulty client does: multiplies it by a factor and adds noise.

    Args:
      sent: Δψ and Δθ, leaves (...) and (K, ...).
      tampering: factor (), and the L2 norm of the noise relative to the update's own (), or None.
      key: for the noise.
    """
    changed = jax.tree.map(lambda x: x * tampering.factor, sent)
    if tampering.noise is None:
        return changed
    noise = optax.tree.random_like(key, sent, jax.random.normal)
    # Entries that the client does not send get no noise: an attacker would not send them either.
    noise = jax.tree.map(lambda n, x: jnp.where(x == 0, 0.0, n), noise, sent)
    length = tampering.noise * optax.tree.norm(sent) / jnp.maximum(optax.tree.norm(noise), 1e-12)
    return jax.tree.map(lambda x, n: x + length * n, changed, noise)
