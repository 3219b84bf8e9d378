"""The federated algorithm: init, assign, round, evaluate.

One round (FLEX-MoE): the server assigns experts to the cohort (host), the cohort trains and the
server aggregates and learns the fitness (one jit), and the state goes into the next round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexmoe_jax.assignment import Policy, Request, Solution, update_deficit
from flexmoe_jax.data import ClientData
from flexmoe_jax.federated.aggregate import Aggregator, Sums, all_finite, apply_sums, init_server
from flexmoe_jax.federated.client import LocalTraining, make_client
from flexmoe_jax.federated.compress import init_residual, move_residual
from flexmoe_jax.federated.evaluate import TestSet, evaluate
from flexmoe_jax.federated.execute import (
    CohortResult,
    client_mesh,
    replicate,
    resolve_block_size,
    train_cohort,
)
from flexmoe_jax.federated.fitness import Score, accuracy_score, update_fitness
from flexmoe_jax.federated.load import LoadModel, make_load_model
from flexmoe_jax.federated.participation import (
    check_setting,
    check_solution,
    make_plan,
)
from flexmoe_jax.federated.privacy import draw_secret, noise_key, privatise
from flexmoe_jax.federated.quarantine import init_norms, learn_norms, norm_limits, too_late
from flexmoe_jax.federated.uplink import Uplink
from flexmoe_jax.models import (
    FLEX_MOE,
    MoEClassifier,
    Ownership,
    Routing,
    merge_params,
    split_params,
)
from flexmoe_jax.types import (
    Array,
    Evaluation,
    Key,
    Params,
    Plan,
    PyTree,
    RoundReport,
    State,
)


class FitnessOptions(NamedTuple):
    """How the fitness is learnt; the start value and the optimism are our choices, not the paper's.

    Attributes:
      score: of a pair, from its feedback.
      beta: β in (0, 1], weight of the newest score.
      initial: start value of Q; at 1, the best score, no tried pair beats an untried one.
      optimism: added to Q, for the assignment alone, for pairs that have never been tried.
    """

    score: Score = accuracy_score
    beta: float = 0.5
    initial: float = 1.0
    optimism: float = 0.0


class Setting(NamedTuple):
    """What all rounds of a federation have in common, for whoever plans them on the device.

    Attributes:
      capacity: (C,) int k_c.
      steps: (C,) int local steps of each client in a round.
      optimism: added to Q, for the assignment alone, for pairs that have never been tried.
      block_size: clients side by side on a device; 0 for automatic.
      devices: how many share a cohort.
      equal_load: whether every holder weighs 1 in the load.
      policy: who holds which experts.
      secret: whether every plan brings random bits for the noise of differential privacy.
    """

    capacity: np.ndarray
    steps: np.ndarray
    optimism: float
    block_size: int
    devices: int
    equal_load: bool
    policy: Policy
    secret: bool


class Arrival(NamedTuple):
    """What of a cohort's work reaches the server.

    Attributes:
      work: (P,) share of its local steps that each client completes and delivers, in [0, 1].
      reached: (P,) bool, clients that received their experts; the others keep what they held.
      tamper: (P,) factor on each update on its way; 1 for an honest client.
      noise: (P,) L2 norm of the noise added to each, over its own; None where there is none.
    """

    work: np.ndarray
    reached: np.ndarray
    tamper: np.ndarray
    noise: np.ndarray | None = None


class MakePlan(Protocol):
    """See `Algorithm.plan`."""

    def __call__(
        self, cohort: np.ndarray, solution: Solution, arrival: Arrival | None = None
    ) -> Plan:
        """Lays a cohort out."""


class Algorithm(NamedTuple):
    """A federation as pure functions.

    Attributes:
      init: key -> State. Jitted.
      assign: (State, cohort (P,)) -> Solution for that cohort. Runs on the host.
      plan: (cohort (P,), Solution, Arrival or None) -> Plan: the arrays that `round` takes, on the
        host. Without an `Arrival` all clients deliver all their work.
      round: (State, ClientData, Plan) -> (State, RoundReport). Jitted; the state is donated.
      evaluate: (State, TestSet, label shares (C, Y)) -> Evaluation. Jitted.
      setting: what the functions above were built with.
    """

    init: Callable[[Key], State]
    assign: Callable[[State, np.ndarray], Solution]
    plan: MakePlan
    round: Callable[[State, ClientData, Plan], tuple[State, RoundReport]]
    evaluate: Callable[[State, TestSet, Array], Evaluation]
    setting: Setting


def flexmoe(
    model: MoEClassifier,
    data: ClientData,
    *,
    prepare: Callable[[Array], Array],
    capacity: np.ndarray | int,
    policy: Policy,
    local: LocalTraining,
    load_model: LoadModel | None = None,
    fitness: FitnessOptions | None = None,
    server: optax.GradientTransformation | None = None,
    ownership: Ownership = FLEX_MOE,
    uplink: Uplink | None = None,
    aggregator: Aggregator | None = None,
    rows: int = 0,
    deficit_decay: float = 1.0,
    share: np.ndarray | None = None,
    seed: int = 0,
    block_size: int = 0,
    mesh: Mesh | None = None,
) -> Algorithm:
    """Builds the federation of a mixture-of-experts classifier.

    Args:
      model: with all E experts; clients run it with K.
      data: every client's examples, on the device or on the host; `round` takes them, or those of
        its cohort (`data.feed_cohorts`), as an argument, so that none are baked into the program.
      prepare: uint8 images -> what the model takes; runs on device.
      capacity: (C,) int k_c, or one for all.
      policy: who holds which experts.
      local: how clients train.
      load_model: what an assignment weighs, and what counts as given; None for `clients`.
      fitness: how Q is learnt; None for `FitnessOptions()`.
      server: optax transform of the mean update; None for `optax.sgd(1.0)`, plain averaging.
      ownership: which of the model's parameters are averaged, and which stay with their clients.
      uplink: how updates reach the server; None for `Uplink()`.
      aggregator: makes the server's sums of all updates of a cohort together, which takes memory
        for all of them; None for weighted means, summed while the cohort trains.
      rows: for how many clients a plan makes room, where cohorts differ in size; 0 for the cohort.
      deficit_decay: how much of an expert's deficit lasts from round to round, in [0, 1].
      share: (E,) part of the load that the policy means each expert to get; None for the same.
      seed: of the policy's ties and draws.
      block_size: clients side by side on a device; 0 for automatic.
      mesh: the devices that share a cohort, from `client_mesh`; None for one. Give `round` and
        `evaluate` arrays that `replicate` has put there.

    Returns:
      The algorithm.

    Raises:
      InputError: capacities that do not fit clients and experts, or a model of other classes.
    """
    capacity = check_setting(capacity, data, model)
    load_model = load_model or make_load_model("clients", capacity, capacity)
    fitness = fitness or FitnessOptions()
    server = server or optax.sgd(1.0)
    uplink = uplink or Uplink()
    mesh = mesh or client_mesh(1)
    everywhere = NamedSharding(mesh, PartitionSpec())
    clients, experts = len(capacity), model.experts
    slots = int(capacity.max())
    steps = np.asarray(local.steps(np.asarray(data.size)))
    secret = bool(uplink.noise_multiplier and not uplink.simulated_noise)
    client_model = model.clone(experts=slots)

    def apply(params: Params, images: Array, held: Array) -> tuple[Array, Routing]:
        variables = {"params": merge_params(params)}
        outputs: Any = client_model.apply(variables, prepare(images), held)
        return outputs

    # What every client computes alike is computed once an image, not once a client.
    own_features = any(path.split("/")[0] == "backbone" for path in ownership.private)

    def features(shared: PyTree, images: Array) -> Array:
        if own_features:
            return images
        outputs: Any = model.apply({"params": shared}, prepare(images), method="features")
        return outputs

    def classify(params: Params, shared_features: Array, held: Array) -> Array:
        if own_features:
            return apply(params, shared_features, held)[0]
        variables = {"params": merge_params(params)}
        outputs: Any = client_model.apply(variables, shared_features, held, method="classify")
        return outputs[0]

    @partial(jax.jit, out_shardings=everywhere)
    def init(key: Key) -> State:
        held = jnp.ones(experts, bool)
        image = prepare(jnp.zeros((1, *data.images.shape[1:]), data.images.dtype))
        model_key, gate_key = jax.random.split(key)
        start = model.init(model_key, image, held)["params"]
        params = split_params(start, ownership)
        example: Any = model.apply({"params": start}, image, method="features")

        def init_gate(client: Array) -> PyTree:
            own = jax.random.fold_in(gate_key, client)
            drawn = model.init(own, example, held, method="classify")["params"]
            return split_params(drawn, ownership).gate

        shared_optimizer, expert_optimizer = init_server(server, params.shared, params.experts)
        return State(
            key=key,
            round=jnp.zeros((), jnp.int32),
            shared=params.shared,
            experts=params.experts,
            gates=jax.vmap(init_gate)(jnp.arange(clients, dtype=jnp.int32)),
            private=jax.tree.map(
                lambda x: jnp.broadcast_to(x, (clients, *x.shape)), params.private
            ),
            shared_optimizer=shared_optimizer,
            expert_optimizer=expert_optimizer,
            fitness=jnp.full((clients, experts), fitness.initial, jnp.float32),
            slots=jnp.full((clients, slots), experts, jnp.int32),
            held_rounds=jnp.zeros((clients, experts), jnp.int32),
            usage=jnp.zeros((clients, experts), jnp.float32),
            load=jnp.zeros(experts, jnp.float32),
            deficit=jnp.zeros(experts, jnp.float32),
            fresh=jnp.zeros((clients, experts), bool),
            residual=init_residual(params.shared, params.experts, clients, slots)
            if uplink.error_feedback and not uplink.compressor.lossless
            else (),
            norms=init_norms() if uplink.compares else (),
        )

    def assign(state: State, cohort: np.ndarray) -> Solution:
        known = jax.device_get(
            {name: getattr(state, name) for name in ("fitness", "held_rounds", "usage", "fresh")}
        )
        known = {name: table[cohort] for name, table in known.items()}
        untried = known["held_rounds"] == 0
        solution = policy(
            Request(
                fitness=known["fitness"] + fitness.optimism * untried,
                capacity=capacity[cohort],
                clients=cohort,
                round=int(state.round),
                seed=seed,
                load_weight=load_model.weigh(state, cohort),
                deficit=np.asarray(state.deficit),
                usage=known["usage"],
                held_rounds=known["held_rounds"],
                held=known["fresh"],
                descriptor=np.asarray(data.label_share)[cohort],
            )
        )
        check_solution(solution, cohort, capacity, experts)
        return solution

    def plan(cohort: np.ndarray, solution: Solution, arrival: Arrival | None = None) -> Plan:
        planned, assignment, tamper, noise = steps[cohort], solution.assignment, None, None
        if arrival is not None:
            planned = np.floor(arrival.work * planned + 1e-9).astype(np.int32)
            cohort, planned, assignment, tamper, noise = jax.tree.map(
                lambda x: x[arrival.reached],
                (cohort, planned, assignment, arrival.tamper, arrival.noise),
            )
        laid_out = make_plan(
            cohort,
            assignment,
            solution.load,
            steps=planned,
            slots=slots,
            clients=clients,
            block_size=resolve_block_size(block_size, rows or len(solution.assignment), mesh.size),
            devices=mesh.size,
            rows=rows or len(solution.assignment),
            tamper=tamper,
            noise=noise,
            secret=draw_secret() if secret else None,
        )
        # Solvers with a time limit need not end alike on every host: the first one's plan holds.
        if jax.process_count() > 1:
            laid_out = multihost_utils.broadcast_one_to_all(laid_out)
        return replicate(laid_out, mesh)

    def put_rows(tree: PyTree, rows: Array, new: PyTree) -> PyTree:
        return jax.tree.map(lambda old, row: old.at[rows].set(row, mode="drop"), tree, new)

    def by_expert(slots: Array, amount: Array) -> Array:
        return jnp.zeros(experts, jnp.float32).at[slots].add(amount, mode="drop")

    @partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def run_round(state: State, data: ClientData, plan: Plan) -> tuple[State, RoundReport]:
        key = jax.random.fold_in(state.key, state.round)
        state = state._replace(residual=move_residual(state.residual, state.slots, plan))
        result = train_cohort(
            partial(make_client, apply, local, slots=slots),
            local,
            data,
            state.shared,
            state.experts,
            state.gates,
            state.private,
            plan,
            state.round,
            key,
            resolve_block_size(block_size, plan.clients.shape[0], mesh.size),
            mesh,
            uplink,
            state.residual,
            norm_limits(state.norms, uplink.norm_factor) if uplink.compares else None,
            aggregator is not None,
        )
        result, norms, late = compare(uplink, result, state.norms)
        sums = add_up(result, aggregator, experts, everywhere)
        # The round's key as such, and with a client's id folded in, belongs to the training.
        sums = add_noise(uplink, sums, plan, jax.random.fold_in(key, clients + 2))
        aggregated = apply_sums(
            server,
            sums,
            state.shared,
            state.experts,
            state.shared_optimizer,
            state.expert_optimizer,
        )
        # What clients keep that are refused late is what they had.
        learners = jnp.where(late, clients, plan.clients)
        pairs, kept = (plan.clients[:, None], plan.slots), (learners[:, None], plan.slots)
        usage = state.usage.at[pairs].add(result.feedback.usage, mode="drop")
        given = by_expert(
            plan.slots, load_model.settle(plan.slots, result.examples, result.feedback.usage)
        )
        trained = (result.examples > 0).astype(jnp.int32)
        received = jnp.zeros((clients, experts), bool).at[pairs].set(True, mode="drop")
        took_part = jnp.zeros(clients, bool).at[plan.clients].set(True, mode="drop")
        following = State(
            key=state.key,
            round=state.round + 1,
            **aggregated._asdict(),
            gates=jax.tree.map(
                lambda gates, new: gates.at[kept].set(new, mode="drop"), state.gates, result.gates
            ),
            private=put_rows(state.private, learners, result.private),
            fitness=update_fitness(
                state.fitness,
                plan.clients,
                plan.slots,
                result.feedback,
                fitness.beta,
                fitness.score,
            ),
            slots=state.slots.at[plan.clients].set(plan.slots, mode="drop"),
            held_rounds=state.held_rounds.at[pairs].add(trained[:, None], mode="drop"),
            usage=usage,
            load=state.load + plan.load,
            # Shares are NumPy's doubles.
            deficit=update_deficit(state.deficit, given, share=share, decay=deficit_decay).astype(
                jnp.float32
            ),
            fresh=jnp.where(took_part[:, None], received, state.fresh) & (sums.expert_weight == 0),
            residual=put_rows(state.residual, learners, result.residual),
            norms=norms,
        )
        report = RoundReport(
            loss=result.loss,
            examples=result.examples,
            usage=by_expert(plan.slots, result.feedback.usage),
            quarantined=result.quarantined,
            void=late.all(),
            finite=all_finite((aggregated[:2], result.gates, result.private)),
        )
        return following, report

    return Algorithm(
        init=init,
        assign=assign,
        plan=plan,
        round=run_round,
        evaluate=jax.jit(partial(evaluate, features, classify, mesh), out_shardings=everywhere),
        setting=Setting(
            capacity,
            steps,
            fitness.optimism,
            block_size,
            mesh.size,
            load_model.equal,
            policy,
            bool(uplink.noise_multiplier and not uplink.simulated_noise),
        ),
    )


def compare(
    uplink: Uplink, result: CohortResult, norms: PyTree
) -> tuple[CohortResult, PyTree, Array]:
    """Learns how long a cohort's updates were, and refuses those that turn out to be too long.

    Where they have been summed already, all are refused.

    Args:
      uplink: how updates are judged.
      result: of the cohort.
      norms: what was known (see `quarantine`).

    Returns:
      What is left of the result, what is known now, and who was refused (P,) late.
    """
    if not uplink.compares:
        return result, norms, jnp.zeros_like(result.quarantined)
    new = result.norms.T
    late = too_late(norms, new, uplink.norm_factor) & ~result.quarantined
    norms = learn_norms(norms, new, ~(late | result.quarantined))
    if result.sums is not None:
        late = jnp.broadcast_to(late.any(), late.shape)
    return result.without(late), norms, late


def add_up(
    result: CohortResult, aggregator: Aggregator | None, experts: int, everywhere: NamedSharding
) -> Sums:
    """The sums of a cohort's updates, or those that an aggregator of all together makes."""
    if aggregator is None:
        assert result.sums is not None
        return result.sums
    updates = result.updates
    if everywhere.mesh.size > 1:
        # Gathered before the aggregator's loops: if devices exchange updates within them, XLA's CPU
        # devices can come to wait for each other in different exchanges, and never end.
        updates = lax.with_sharding_constraint(updates, everywhere)
    assert updates is not None
    return aggregator(updates, experts)


def add_noise(uplink: Uplink, sums: Sums, plan: Plan, own: Key) -> Sums:
    """The sums with the noise of differential privacy, if there is to be any."""
    if not uplink.noise_multiplier:
        return sums
    key = noise_key(plan, own, uplink.simulated_noise)
    return privatise(sums, plan, key, uplink.noise_multiplier * uplink.clip)
