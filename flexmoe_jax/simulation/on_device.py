"""Runs whole rounds on the device: cohort, assignment and training in one compiled program.

In the host path, the host draws a cohort and assigns experts before every round. Here both are
part of the program, and `dual_assign` makes the assignment. Many rounds are then one `lax.scan`,
and many seeds are one `vmap` over their states:

    run = run_on_device(simulation, rounds=20)
    state, reports = jax.jit(run, donate_argnums=0)(state, data)
    states, reports = jax.jit(jax.vmap(run, (0, None)), donate_argnums=0)(states, data)

The federation must have the load model `clients` (every holder has weight 1), one assignment for
all its MoE layers, and the policy `flex`. The slack and the exploration of `flex` apply here too;
its other terms are refused. Seeds differ in everything that depends on their `state.key`. The host
path (cohorts by `sample_cohort`, ties and exploration by `Request.seed`) makes different draws
from the same distributions.

Nothing stops a run that diverges: check `training.finite` of the reports, which says for every
round whether all parameters were still finite. Load bounds hold while fitness is finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flexmoe_jax.assignment import NamedPolicy, Policy, dual_assign
from flexmoe_jax.data import ClientData
from flexmoe_jax.errors import InputError
from flexmoe_jax.options.assignment import AssignmentOptions
from flexmoe_jax.simulation.blocks import resolve_block_size
from flexmoe_jax.simulation.plan import Floor
from flexmoe_jax.simulation.rounds import Simulation
from flexmoe_jax.types import Array, Key, Plan, RoundReport, State

# Identifies the random stream of cohorts and assignments; it is folded into a round's key.
_PLANNING = 0x91A7

# Scale of the noise that breaks ties: far below any relevant difference in fitness, but many steps
# of single precision near 1.
_TIE_NOISE = 1e-5
# Targets are sums over many rounds in single precision: a target that misses a whole load by less
# than this counts as that load.
_SLIP = 1e-3
# Bisection steps that exhaust single precision.
_HALVINGS = 32


class DeviceReport(NamedTuple):
    """The report of a round on the device; stacked over rounds, every array has a leading axis T.

    Attributes:
      training: the report of the training, as in the host path.
      plan: the cohort, the experts that each client held, and the assigned load (1, E), in clients.
      load_min: (E,) least load of this round.
      load_max: (E,) greatest load of this round.
      value: () value of the assignment, in terms of the fitness that the solver saw.
      bound: () upper bound on the value of any assignment within the load bounds.
    """

    training: RoundReport
    plan: Plan
    load_min: Array
    load_max: Array
    value: Array
    bound: Array


Rounds = Callable[[State, ClientData], tuple[State, DeviceReport]]
"""(State, ClientData) -> (State, DeviceReport); pure, to be jitted, scanned or vmapped."""


def run_on_device(simulation: Simulation, rounds: int, *, per_round: int = 0) -> Rounds:
    """Makes the function that runs many rounds without returning to the host.

    Args:
      simulation: from `simulate`. Its block size and mesh apply here too; a `vmap` over seeds needs
        a mesh of one device.
      rounds: T.
      per_round: P clients in a cohort; 0 for all.

    Returns:
      The function, with reports stacked over rounds (T, ...).

    Raises:
      InputError: a number out of range, or a federation whose rounds the device cannot plan.
    """
    if rounds < 1:
        raise InputError("rounds", rounds, "give a number of at least 1")
    run_round = round_on_device(simulation, per_round=per_round)

    def run(state: State, data: ClientData) -> tuple[State, DeviceReport]:
        return lax.scan(lambda state, _: run_round(state, data), state, length=rounds)

    return run


def round_on_device(simulation: Simulation, *, per_round: int = 0) -> Rounds:
    """Makes the function of one round, which `run_on_device` repeats; it has the same arguments."""
    setting, federation = simulation.setting, simulation.setting.federation
    clients = federation.clients
    if not 0 <= per_round <= clients:
        raise InputError("per_round", per_round, f"give 0 (all) to {clients}")
    if not federation.desk.load.equal:
        raise InputError("assignment.load", "weighted", "on the device give the load model clients")
    if federation.fitness.affinity:
        remedy = "not on the device: give 0"
        raise InputError("fitness.affinity", federation.fitness.affinity, remedy)
    if federation.fitness.probe == "all":
        remedy = "not on the device: give held"
        raise InputError("fitness.probe", federation.fitness.probe, remedy)
    if federation.groups > 1:
        raise InputError("assignment.layers", federation.layers, "on the device give same")
    if federation.admission.private and not federation.admission.simulated_noise:
        remedy = "on the device no secret can be drawn: give noise=simulated"
        raise InputError("server.noise_multiplier", federation.admission.noise_multiplier, remedy)
    options = _flex_options(federation.policy)
    slack, exploration, falls_in = options.slack, options.exploration, options.exploration_rounds
    size = per_round or clients
    block_size = resolve_block_size(setting.floor.block_size, size, setting.floor.devices)
    floor = setting.floor._replace(rows=size, block_size=block_size)

    def run_round(state: State, data: ClientData) -> tuple[State, DeviceReport]:
        ledger = jax.tree.map(
            lambda x: x[0], state.server.ledger._replace(norms=(), profile=(), alike=())
        )
        round_key = jax.random.fold_in(state.server.key, state.server.round)
        keys = jax.random.split(jax.random.fold_in(round_key, _PLANNING), 3)
        cohort = draw_cohort(keys[0], clients, size)
        capacity = jnp.asarray(setting.capacity)[cohort]
        low, high = device_load_bounds(capacity, ledger.deficit, slack)
        untried = (ledger.held_rounds == 0).astype(ledger.fitness.dtype)
        ties = jax.random.uniform(keys[1], ledger.fitness.shape, ledger.fitness.dtype)
        fitness = ledger.fitness + federation.fitness.optimism * untried + _TIE_NOISE * ties
        if exploration:
            noise = jax.random.uniform(keys[2], fitness.shape, fitness.dtype)
            fitness += exploration * _left(state.server.round, falls_in) * noise
        found = dual_assign(fitness[cohort], capacity, low, high, slots=floor.slots)
        steps = jnp.asarray(setting.steps)[cohort]
        plan = device_plan(cohort, found.assignment, found.load, steps, floor)
        state, training = simulation.round(state, data, plan)
        return state, DeviceReport(training, plan, low, high, found.value, found.bound)

    return run_round


def _left(round_index: Array, rounds: int) -> Array:
    """Remaining part of an exploration that falls to 0 within `rounds`; always 1 if that is 0."""
    if not rounds:
        return jnp.ones((), jnp.float32)
    return jnp.maximum(1.0 - round_index.astype(jnp.float32) / rounds, 0.0)


def _flex_options(policy: Policy) -> AssignmentOptions:
    name = policy.name if isinstance(policy, NamedPolicy) else "a function of the host"
    if not (isinstance(policy, NamedPolicy) and name == "flex"):
        raise InputError("assignment.policy", name, 'on the device give make_policy("flex", ...)')
    options: AssignmentOptions = policy.options["options"]
    terms = {name: getattr(options, name) for name in ("holders_min", "balance", "diversity")}
    terms |= {"movement": options.movement, "share": policy.options["share"]}
    for name, value in terms.items():
        if value is not None and np.any(value):
            raise InputError(f"assignment.{name}", value, "not on the device")
    return options


def draw_cohort(key: Key, clients: int, per_round: int) -> Array:
    """Draws (P,) ascending int32 ids of C clients, uniformly without replacement; all if P is C."""
    everyone = jnp.arange(clients, dtype=jnp.int32)
    if per_round == clients:
        return everyone
    return jnp.sort(jax.random.choice(key, everyone, (per_round,), replace=False))


def device_load_bounds(capacity: Array, deficit: Array, slack: float) -> tuple[Array, Array]:
    """Computes `load_bounds` on the device, for equal shares and holders that all have weight 1.

    Args:
      capacity: (P,) int experts that each client holds.
      deficit: (E,) load owed from earlier rounds.
      slack: δ ≥ 0, the part of its share by which an expert's load may miss its target.

    Returns:
      `load_min` and `load_max`, (E,) each: whole numbers that allow the whole numbers just below
      and above the target. A target within 0.001 of a whole number counts as that number.
    """
    reachable = (capacity > 0).sum().astype(deficit.dtype)
    total = capacity.sum().astype(deficit.dtype)
    fair = total / deficit.shape[0]
    target = _shift_into(fair + deficit, reachable, total)
    low, high = target - slack * fair, target + slack * fair
    low = jnp.minimum(jnp.ceil(low - _SLIP), jnp.floor(target + _SLIP))
    high = jnp.maximum(jnp.floor(high + _SLIP), jnp.ceil(target - _SLIP))
    return jnp.clip(low, 0.0, reachable), jnp.clip(high, 0.0, reachable)


def device_plan(cohort: Array, assignment: Array, load: Array, steps: Array, floor: Floor) -> Plan:
    """Does `make_plan` on the device, for a cohort (P,) in ascending order and one layer group."""
    size, experts = assignment.shape
    padding, dealt = floor.padded - size, floor.deal(size)
    order = jnp.argsort(-steps, stable=True)
    numbers = jnp.arange(experts, dtype=jnp.int32)[None]
    numbered = jnp.where(assignment[order], numbers, experts)
    held = jnp.sort(numbered, axis=1)[:, : floor.slots]
    slots = jnp.pad(held, ((0, padding), (0, 0)), constant_values=experts)[dealt]
    return Plan(
        clients=jnp.pad(cohort[order], (0, padding), constant_values=floor.clients)[dealt],
        slots=slots[:, None],
        load=load[None],
        steps=jnp.pad(steps[order].astype(jnp.int32), (0, padding))[dealt],
        tamper=jnp.ones(size + padding, jnp.float32),
    )


def _shift_into(target: Array, reachable: Array, total: Array) -> Array:
    """Clips targets to [0, reachable], with one common shift that keeps their sum at `total`."""

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        short = jnp.clip(target + middle, 0.0, reachable).sum() < total
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    ends = jnp.minimum(-target.max(), 0.0), jnp.maximum((reachable - target).max(), 0.0)
    _, shift = lax.fori_loop(0, _HALVINGS, halve, ends)
    inside = ((target >= 0) & (target <= reachable)).all()
    return jnp.where(inside, target, jnp.clip(target + shift, 0.0, reachable))
