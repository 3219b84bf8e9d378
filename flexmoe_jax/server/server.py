"""The server's part of a round: it sends parameters to clients, and closes the round.

Axis legend: `C` clients, `P` clients of the round's plan, `E` experts, `K` expert slots, `G` groups
of MoE layers that are assigned together, `L` MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

from flexmoe_jax.assignment import update_deficit
from flexmoe_jax.options.assignment import AssignmentOptions
from flexmoe_jax.options.server import Admission, FitnessOptions
from flexmoe_jax.server.admit import Verdict
from flexmoe_jax.server.affinity import learn_profile
from flexmoe_jax.server.aggregate import Aggregator, Due, Sums
from flexmoe_jax.server.fitness import update_fitness
from flexmoe_jax.server.load import LoadModel
from flexmoe_jax.server.privacy import noise_key
from flexmoe_jax.server.quarantine import init_norms, learn_norms, norm_limits, too_late
from flexmoe_jax.types import (
    Array,
    Download,
    Feedback,
    Key,
    Ledger,
    Plan,
    PyTree,
    RoundReport,
    Server,
)

# Constant that is folded into a round's key, for the random stream of the noise.
_NOISE = 0x5E12

Fetch = Callable[[PyTree, dict[str, Array]], PyTree]
"""(θ by MoE layer, leaves (E, ...); by layer numbers (K,)) -> θ of these experts, leaves (K, ...).

An empty slot (E) gets a copy of the last expert."""


class Desk(NamedTuple):
    """The settings that a server runs with.

    Attributes:
      experts: E.
      group: maps each MoE layer to its group; the layers of a group are assigned together.
      optimizer: optax transform of the mean update.
      admission: which updates the server accepts.
      fitness: how the server learns Q.
      load: the load model: load for the assignment, and load delivered.
      deficit_decay: factor on an expert's deficit from round to round, in [0, 1].
      share: (E,) share of the load that each expert should get; None for equal shares.
    """

    experts: int
    group: dict[str, int]
    optimizer: optax.GradientTransformation
    admission: Admission
    fitness: FitnessOptions
    load: LoadModel
    deficit_decay: float = AssignmentOptions.deficit_decay
    share: np.ndarray | None = None

    @property
    def groups(self) -> int:
        """G, the number of groups of MoE layers."""
        return max(self.group.values(), default=0) + 1

    def of_experts(
        self, slots: Int[Array, "P G K"], amount: Float[Array, "P G K"]
    ) -> Float[Array, "G E"]:
        """Sums amounts (P, G, K) per slot over clients, to totals (G, E) per expert."""
        none = jnp.zeros((self.groups, self.experts), amount.dtype)
        return none.at[np.arange(self.groups)[:, None], slots].add(amount, mode="drop")

    def by_group(self, of_layers: Float[Array, "*P L K"]) -> Float[Array, "*P G K"]:
        """Averages (..., L, K) over the layers of each group, to (..., G, K)."""
        rows = np.zeros((self.groups, len(self.group)), np.float32)
        rows[list(self.group.values()), np.arange(len(self.group))] = 1
        if self.groups == len(self.group):
            return of_layers
        rows /= np.maximum(rows.sum(axis=1, keepdims=True), 1)
        return jnp.einsum("gl,...lk->...gk", rows, of_layers)


def init(desk: Desk, key: Key, shared: PyTree, experts: PyTree, clients: int) -> Server:
    """Returns the initial state of the server, with empty records of C `clients`."""
    pairs = (desk.groups, clients, desk.experts)
    ledger = Ledger(
        fitness=jnp.full(pairs, desk.fitness.initial, jnp.float32),
        usage=jnp.zeros(pairs, jnp.float32),
        held_rounds=jnp.zeros(pairs, jnp.int32),
        current=jnp.zeros(pairs, bool),
        load=jnp.zeros((desk.groups, desk.experts), jnp.float32),
        deficit=jnp.zeros((desk.groups, desk.experts), jnp.float32),
        norms=init_norms() if desk.admission.compares else (),
        profile=(
            jnp.zeros((clients, desk.fitness.sketched), jnp.float32)
            if desk.fitness.sketched
            else ()
        ),
        alike=jnp.zeros((), bool) if desk.fitness.sketched else (),
    )
    optimizer = (
        desk.optimizer.init(shared),
        {layer: jax.vmap(desk.optimizer.init)(stack) for layer, stack in experts.items()},
    )
    return Server(key, jnp.zeros((), jnp.int32), shared, experts, optimizer, ledger)


def take(experts: PyTree, numbers: dict[str, Array]) -> PyTree:
    """Takes experts from stacks that are all here (see `Fetch`)."""
    return {
        layer: jax.tree.map(
            lambda leaf, n=numbers[layer]: jnp.take(leaf, n, axis=0, mode="clip"), stack
        )
        for layer, stack in experts.items()
    }


def send(
    desk: Desk,
    server: Server,
    slots: Int[Array, "G K"],
    steps: Int[Array, ""],
    fetch: Fetch = take,
    use: Float[Array, "G K"] | None = None,
) -> Download:
    """Returns the download of a client that trains the experts `slots` (G, K) for `steps` steps."""
    numbers = {layer: slots[desk.group[layer]] for layer in server.experts}
    stacks = fetch(server.experts, numbers)
    return Download(server.shared, stacks, slots, steps, server.round, use)


def limits(desk: Desk, begun: Server) -> Float[Array, " 2"] | None:
    """Returns the greatest allowed lengths (2,) of an answer's parts; None for no limits."""
    if not desk.admission.compares:
        return None
    return norm_limits(begun.ledger.norms, desk.admission.norm_factor)


def conclude(
    desk: Desk,
    aggregator: Aggregator,
    begun: Server,
    total: Any,
    verdicts: Verdict,
    plan: Plan,
    gather: Callable[[Any], Any] = lambda total: total,
) -> tuple[Server, Verdict, Bool[Array, " P"]]:
    """Closes a round after every answer was judged and added to the total, or was lost.

    Args:
      desk: the server's settings.
      aggregator: aggregates the updates.
      begun: the server at the start of the round.
      total: the aggregator's total of all accepted answers.
      verdicts: verdicts on the answers, leaves (P, ...).
      plan: the round's plan.
      gather: gathers the total from all devices before its mean is taken.

    Returns:
      The server after the round, the verdicts, and the clients that were refused late (P,): if no
      lengths were known before the round, the cohort is judged by its own lengths at the end.
    """
    norms, late = begun.ledger.norms, jnp.zeros(plan.clients.shape, bool)
    if desk.admission.compares:
        lengths = verdicts.lengths.T
        late = too_late(norms, lengths, desk.admission.norm_factor) & verdicts.accepted
        norms = learn_norms(norms, lengths, ~(late | verdicts.refused))
        total, late = aggregator.drop(total, late)
        verdicts = without(late, verdicts)
    sums = aggregator.mean(gather(total), due(desk, begun, plan))
    known_by_now = begun._replace(ledger=begun.ledger._replace(norms=norms))
    return close(desk, known_by_now, sums, verdicts, plan), verdicts, late


def report(
    desk: Desk, plan: Plan, verdicts: Verdict, late: Bool[Array, " P"], finite: Bool[Array, ""]
) -> RoundReport:
    """Makes the round's report from the verdicts of `conclude`; see `RoundReport` for `finite`."""
    return RoundReport(
        loss=verdicts.loss,
        units=verdicts.units,
        examples=verdicts.examples,
        usage=desk.of_experts(plan.slots, desk.by_group(verdicts.feedback.usage)),
        quarantined=verdicts.refused,
        void=late.all(),
        finite=finite,
    )


def due(desk: Desk, begun: Server, plan: Plan) -> Due:
    """Returns the deliveries that a plan expects; they do not depend on any client's data."""
    asked = (plan.steps > 0).astype(jnp.float32)
    holders = {
        layer: jnp.zeros(desk.experts, jnp.float32)
        .at[plan.slots[:, group]]
        .add(asked[:, None], mode="drop")
        for layer, group in desk.group.items()
    }
    drawn = jax.random.fold_in(begun.key, begun.round)
    if desk.admission.private:
        own = jax.random.fold_in(drawn, _NOISE)
        drawn = noise_key(plan, own, desk.admission.simulated_noise, begun.round)
    return Due(asked.sum(), holders, drawn)


def without(late: Bool[Array, " P"], verdicts: Verdict) -> Verdict:
    """Returns the verdicts as if the `late` updates (P,) bool had been refused."""

    def drop(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: jnp.where(late.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros_like(x), x), tree
        )

    refused = verdicts.refused | (late & verdicts.accepted)
    return drop(verdicts)._replace(refused=refused, lengths=verdicts.lengths)


def close(desk: Desk, server: Server, sums: Sums, verdicts: Verdict, plan: Plan) -> Server:
    """Updates the server's parameters and records after a round.

    Args:
      desk: the server's settings.
      server: the server before the round.
      sums: sums of all accepted updates.
      verdicts: verdicts on the answers, leaves (P, ...).
      plan: the round's plan.
    """
    shared, experts, optimizer = _move(desk.optimizer, server, sums)
    ledger = _keep_books(desk, server, sums, verdicts, plan)
    return Server(server.key, server.round + 1, shared, experts, optimizer, ledger)


def _move(
    optimizer: optax.GradientTransformation, server: Server, sums: Sums
) -> tuple[PyTree, PyTree, tuple[PyTree, PyTree]]:
    """Updates ψ and θ with the mean updates as pseudo-gradients (Reddi et al. 2021).

    With `optax.sgd(1.0)`: ψ ← ψ + Σ n_c Δψ_c / Σ n_c and θ_e ← θ_e + Σ u_ce Δθ_ce / Σ u_ce
    (FLEX-MoE). An expert that no client used keeps its value and its optimiser state bit for bit.
    """

    def move(total: PyTree, weight: Array, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        count = jnp.where(weight > 0, weight, 1.0)
        gradient = jax.tree.map(lambda t, p: (-t / count).astype(p.dtype), total, params)
        with jax.numpy_dtype_promotion("standard"):  # optax takes counts times floats
            updates, stepped = optimizer.update(gradient, state, params)
        moved = optax.apply_updates(params, updates), stepped
        return jax.tree.map(
            lambda new, old: jnp.where(weight > 0, new, old), moved, (params, state)
        )

    shared, of_shared = move(sums.shared, sums.shared_weight, server.shared, server.optimizer[0])
    moved = {
        layer: jax.vmap(move)(
            sums.experts[layer], sums.expert_weight[layer], stack, server.optimizer[1][layer]
        )
        for layer, stack in server.experts.items()
    }
    experts = {layer: stack for layer, (stack, _) in moved.items()}
    return shared, experts, (of_shared, {layer: state for layer, (_, state) in moved.items()})


def _keep_books(desk: Desk, server: Server, sums: Sums, verdicts: Verdict, plan: Plan) -> Ledger:
    """Updates the server's records about clients and experts after a round."""
    ledger = server.ledger
    feedback: Feedback = jax.tree.map(desk.by_group, verdicts.feedback)  # (P, G, K)
    trained = (verdicts.examples > 0).astype(jnp.int32)
    clients = ledger.fitness.shape[1]
    took_part = jnp.zeros(clients, bool).at[plan.clients].set(True, mode="drop")
    moved = {layer: weight > 0 for layer, weight in sums.expert_weight.items()}
    books = []
    for g in range(desk.groups):
        slots = plan.slots[:, g]
        pairs = plan.clients[:, None], slots
        of_group = jax.tree.map(lambda x, g=g: x[:, g], feedback)
        given = desk.load.measure(slots, verdicts.examples, of_group.usage)
        given = jnp.zeros(desk.experts, jnp.float32).at[slots].add(given, mode="drop")
        received = jnp.zeros((clients, desk.experts), bool).at[pairs].set(True, mode="drop")
        changed = [
            moved[layer] for layer, group in desk.group.items() if group == g and layer in moved
        ]
        stays = ~jnp.stack(changed).any(axis=0) if changed else jnp.ones(desk.experts, bool)
        current = jnp.where(took_part[:, None], received, ledger.current[g]) & stays[None]
        books.append(
            Ledger(
                fitness=update_fitness(
                    ledger.fitness[g], plan.clients, slots, of_group, desk.fitness
                ),
                usage=ledger.usage[g].at[pairs].add(of_group.usage, mode="drop"),
                held_rounds=ledger.held_rounds[g].at[pairs].add(trained[:, None], mode="drop"),
                current=current,
                load=ledger.load[g] + plan.load[g],
                deficit=update_deficit(
                    ledger.deficit[g], given, share=desk.share, decay=desk.deficit_decay
                ),
                norms=(),
                profile=(),
            )
        )
    stacked: Ledger = jax.tree.map(lambda *x: jnp.stack(x), *books)
    profile, alike = ledger.profile, ledger.alike
    if desk.fitness.sketched:
        heard = verdicts.sketch, verdicts.accepted
        profile = learn_profile(profile, plan.clients, *heard, server.round)
        alike = alike if plan.alike is None else plan.alike
    return stacked._replace(norms=ledger.norms, profile=profile, alike=alike)
