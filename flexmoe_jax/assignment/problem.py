"""The assignment problem, and the quantities that follow from any assignment.

    maximise  Σ_ce Q_ce x_ce    over x ∈ {0,1}^(C×E)
    subject to  Σ_e x_ce = k_c   and   L_e^min ≤ Σ_c w_ce x_ce ≤ L_e^max,

The objective can also subtract `balance · Σ_e (load_e - target_e)²` and
`diversity · Σ_e Σ_f |Σ_c x_ce z_cf|`. Here `z` holds each client's deviation from the mean
descriptor.

Axis legend: `C` clients, `E` experts, `F` features in a client's descriptor, `G` layers.
Source of the problem: FLEX-MoE, arXiv 2512.23070.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexmoe_jax.assignment.tiles import gram
from flexmoe_jax.errors import InputError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Solvers are accurate to about 1e-9. A bound counts as met if it is missed by less than this,
# relative to the largest load or weight.
LOAD_TOLERANCE = 1e-6
TINY = 1e-12
# Sums of a problem's numbers must stay below this. It leaves room to subtract two such sums.
_LARGEST = float(np.finfo(np.float64).max) / 16


class SolverError(RuntimeError):
    """A solver failed or ran out of time, although the problem has solutions."""


@dataclass(frozen=True, eq=False)
class Problem:
    """An assignment problem: client capacities, the fitness of each pair, and load bounds.

    The fields accept anything array-like. They then hold NumPy arrays of the shapes below.

    Attributes:
      fitness: [C, E] value `Q` of client c holding expert e; finite, any sign.
      capacity: [C] number `k` of experts that each client holds, 0 ≤ k ≤ E.
      load_min: [E] minimum load of each expert, in units of `load_weight`; a scalar applies to all.
      load_max: [E] maximum load of each expert; may be infinite.
      load_weight: load that a client adds to an expert it holds, ≥ 0: a scalar, [C] or [C, E].
      violation_weight: [E] or scalar, > 0: weight of one unit by which an expert's bounds are
        violated, if not all bounds can be met. `paths` and `flow` distinguish weights up to 1024
        times the smallest one.
      holders_min: [E] or scalar, minimum number of clients that hold each expert; rounded up.
      target: [E] load that `balance` pulls each expert towards; default: equal shares of the total
        or, with `expert_size`, of the load if each client held an equal fraction of every expert.
      balance: μ ≥ 0, cost of one squared unit of load off target.
      descriptor: [C, F] features of each client (its label distribution, for example), or None.
      diversity: γ ≥ 0, cost of one unit by which the summed features of an expert's holders
        deviate from the mean descriptor.
      expert_size: [E] > 0 or None. If given, `capacity` limits the total size of a client's
        experts, in the same unit (bytes, for example), and a client need not use all of it.

    Raises:
      InputError: a field has the wrong shape, a value is not finite or out of range, or the numbers
        are so large that their sums are not finite.
    """

    fitness: FloatArray
    capacity: IntArray
    load_min: FloatArray
    load_max: FloatArray
    load_weight: float | FloatArray = 1.0
    violation_weight: float | FloatArray = 1.0
    holders_min: float | FloatArray = 0.0
    target: FloatArray | None = None
    balance: float = 0.0
    descriptor: FloatArray | None = None
    diversity: float = 0.0
    expert_size: FloatArray | None = None

    def __post_init__(self) -> None:
        """Validates every field and stores it as an array."""
        fitness = _fitness(self.fitness)
        clients, experts = fitness.shape
        load_min, load_max = _bounds(self.load_min, self.load_max, experts)
        load_weight = _floats("load_weight", self.load_weight)
        if load_weight.shape not in ((), (clients,), (clients, experts)):
            raise InputError(
                "load_weight",
                load_weight.shape,
                f"give a scalar, ({clients},) or ({clients}, {experts})",
            )
        _require_finite("load_weight", load_weight)
        _require("load_weight", load_weight, load_weight >= 0, "give numbers of at least 0")
        violation_weight = _per_expert("violation_weight", self.violation_weight, experts)
        _require_finite("violation_weight", violation_weight)
        _require("violation_weight", violation_weight, violation_weight > 0, "give numbers above 0")
        holders_min = _per_expert("holders_min", self.holders_min, experts)
        _require_finite("holders_min", holders_min)
        _require("holders_min", holders_min, holders_min >= 0, "give numbers of at least 0")
        # Holders are counted, so a fraction asks for one more, unless it is a rounding error.
        holders_min = np.maximum(np.ceil(holders_min - 1e-9), 0.0)
        for name, worth in (("balance", self.balance), ("diversity", self.diversity)):
            if not (np.isfinite(worth) and worth >= 0):
                raise InputError(name, worth, "give a number of at least 0")
        size = self.expert_size
        if size is not None:
            size = _per_expert("expert_size", size, experts)
            _require_finite("expert_size", size)
            _require("expert_size", size, size > 0, "give numbers above 0")
        target = self.target
        if target is not None:
            target = _per_expert("target", target, experts)
            _require_finite("target", target)
        descriptor = self.descriptor
        if descriptor is not None:
            descriptor = _floats("descriptor", descriptor)
            if descriptor.ndim != 2 or descriptor.shape[0] != clients:
                raise InputError("descriptor", descriptor.shape, f"give ({clients}, F) numbers")
            _require_finite("descriptor", descriptor)
        elif self.diversity:
            raise InputError("diversity", self.diversity, "give a descriptor (C, F) as well")
        for name, value in (
            ("fitness", fitness),
            ("capacity", _capacity(self.capacity, clients, experts, size is None)),
            ("load_min", load_min),
            ("load_max", load_max),
            ("load_weight", load_weight),
            ("violation_weight", violation_weight),
            ("holders_min", holders_min),
            ("target", target),
            ("descriptor", descriptor),
            ("expert_size", size),
        ):
            object.__setattr__(self, name, value)
        _require_finite_sums(self)

    @property
    def clients(self) -> int:
        """Number of clients, C."""
        return int(self.fitness.shape[0])

    @property
    def experts(self) -> int:
        """Number of experts, E."""
        return int(self.fitness.shape[1])

    @property
    def weights(self) -> FloatArray:
        """[C, E] read-only view of `load_weight`; it takes no extra memory."""
        weight = np.asarray(self.load_weight)
        if weight.ndim == 1:
            weight = weight[:, None]
        return np.broadcast_to(weight, self.fitness.shape)

    @property
    def unit(self) -> float | None:
        """The load weight shared by all pairs, or None if the weights differ.

        With a single weight, the constraint matrix is totally unimodular once the bounds are
        rounded to whole multiples of that weight (Hoffman and Kruskal 1956).
        """
        weight = np.asarray(self.load_weight)
        if weight.size == 0:
            return 1.0
        first = float(weight.flat[0])
        return first if bool((weight == first).all()) else None

    @property
    def deviation(self) -> FloatArray:
        """[C, F] deviations `z` from the mean descriptor; F = 0 if diversity is 0 or C is 0."""
        if self.descriptor is None or not self.diversity or not self.clients:
            return np.zeros((self.clients, 0))
        return self.descriptor - self.descriptor.mean(axis=0, keepdims=True)

    @property
    def load_target(self) -> FloatArray:
        """[E] the loads that `balance` pulls the experts towards."""
        if self.target is not None:
            return self.target
        held: IntArray | FloatArray = self.capacity
        if self.expert_size is not None:
            whole = self.expert_size.sum()
            held = self.experts * (np.minimum(self.capacity, whole) / whole)
        total = float(np.sum(self.weights.mean(axis=1) * held))
        return np.full(self.experts, total / self.experts)


def seconds_left(deadline: float) -> float:
    """Returns the seconds until a deadline on the `time.perf_counter` clock; infinity means none.

    Raises:
      SolverError: the deadline has passed.
    """
    left = deadline - time.perf_counter()
    if left <= 0:
        raise SolverError("time limit exceeded")
    return left


def expert_load(problem: Problem, assignment: BoolArray) -> FloatArray:
    """Computes the load `Σ_c w_ce x_ce` of each expert, [E], for an assignment [C, E]."""
    weight = np.asarray(problem.load_weight)
    if weight.ndim == 0:
        return assignment.sum(axis=0) * float(weight)
    if weight.ndim == 1:
        return np.einsum("c,ce->e", weight, assignment)
    return np.einsum("ce,ce->e", weight, assignment)


def load_violation(problem: Problem, load: FloatArray) -> FloatArray:
    """Computes how far each load is outside its bounds, [E]; 0 if below the solvers' precision."""
    distance = np.maximum(np.maximum(problem.load_min - load, load - problem.load_max), 0.0)
    precision = LOAD_TOLERANCE * max(largest(load), largest(problem.load_weight))
    if problem.unit:
        # Loads are then whole numbers of holders, however large, as in `effective_bounds`.
        precision = LOAD_TOLERANCE * problem.unit
    return np.where(distance > precision, distance, 0.0)


def objective(problem: Problem, assignment: BoolArray) -> float:
    """Computes the objective (to be maximised) of an assignment [C, E]."""
    value = float(problem.fitness[assignment].sum())
    if problem.balance:
        off = expert_load(problem, assignment) - problem.load_target
        value -= problem.balance * float(off @ off)
    if problem.diversity:
        mix = gram(assignment, problem.deviation)
        value -= problem.diversity * float(np.abs(mix).sum())
    return value


def missing_holders(problem: Problem, assignment: BoolArray) -> FloatArray:
    """Computes how many holders each expert lacks, [E]."""
    return np.maximum(problem.holders_min - assignment.sum(axis=0), 0.0)


def _floats(field: str, value: object) -> FloatArray:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(field, type(value).__name__, "give numbers") from None


def _require(field: str, value: FloatArray, valid: BoolArray, remedy: str) -> None:
    if not valid.all():
        raise InputError(field, float(value[~valid][0]), remedy)


def _require_finite(field: str, value: FloatArray) -> None:
    finite = np.isfinite(value)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InputError(field, value[where], f"every number must be finite; see index {where}")


def _require_finite_sums(problem: Problem) -> None:
    """Raises `InputError` if sums over pairs can overflow, whatever the order of summation."""
    pairs, experts = max(1, problem.fitness.size), problem.experts

    def require(field: str, given: float, most: float) -> None:
        if not most < _LARGEST:
            remedy = f"its sums over {problem.clients} x {experts} pairs overflow; make it smaller"
            raise InputError(field, given, remedy)

    worth, weight = largest(problem.fitness), largest(problem.load_weight)
    require("fitness", worth, worth * pairs)
    require("load_weight", weight, weight * pairs)
    if problem.balance:
        off, price = weight * pairs + largest(problem.load_target), float(problem.balance)
        require("target", off, off)
        require("balance", price, price * experts * off * off)
    if problem.descriptor is not None:
        feature = largest(problem.descriptor)
        spread = feature * problem.descriptor.size * experts
        require("descriptor", feature, spread)
        require("diversity", float(problem.diversity), float(problem.diversity) * spread)


def largest(values: float | FloatArray) -> float:
    """Returns the largest absolute value; 0 if there are none."""
    return max(float(np.max(values, initial=0.0)), -float(np.min(values, initial=0.0)))


def _bounds(least: object, most: object, experts: int) -> tuple[FloatArray, FloatArray]:
    """Validates the load bounds; returns the minimum [E] and the maximum [E] of each expert."""
    load_min = _per_expert("load_min", least, experts)
    load_max = _per_expert("load_max", most, experts)
    if np.isnan(load_min).any() or np.isposinf(load_min).any():
        raise InputError("load_min", load_min.max(), "give numbers below infinity")
    if np.isnan(load_max).any() or np.isneginf(load_max).any():
        raise InputError("load_max", load_max.min(), "give numbers above minus infinity")
    if (load_min > load_max).any():
        worst = int(np.argmax(load_min > load_max))
        pair = (float(load_min[worst]), float(load_max[worst]))
        raise InputError(
            "load_min, load_max", pair, f"expert {worst}: load_min must not exceed load_max"
        )
    return load_min, load_max


def _per_expert(field: str, value: object, experts: int) -> FloatArray:
    array = _floats(field, value)
    if array.shape not in ((), (experts,)):
        raise InputError(field, array.shape, f"give a scalar or ({experts},)")
    return np.broadcast_to(array, (experts,))


def _fitness(value: object) -> FloatArray:
    fitness = _floats("fitness", value)
    if fitness.ndim != 2 or fitness.shape[1] == 0:
        raise InputError("fitness", fitness.shape, "give a (C, E) array with at least 1 expert")
    _require_finite("fitness", fitness)
    return fitness


def _capacity(value: object, clients: int, experts: int, counted: bool) -> IntArray | FloatArray:
    array = _floats("capacity", value)
    if array.shape not in ((), (clients,)):
        raise InputError("capacity", array.shape, f"give a number or ({clients},)")
    _require_finite("capacity", array)
    if not counted:
        _require("capacity", array, array >= 0, "give numbers of at least 0")
        return np.array(np.broadcast_to(array, (clients,)))
    valid = (array == np.floor(array)) & (array >= 0) & (array <= experts)
    _require("capacity", array, valid, f"give whole numbers from 0 to {experts}")
    return np.broadcast_to(array, (clients,)).astype(np.int64)
