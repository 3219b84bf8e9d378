"""Suite `clients`: a round of local training and aggregation, by workload.

One line per workload: seconds of a round (best and median); training examples per second; seconds
of the naive round (all clients under one `vmap`, XLA's own convolution, one device) and its ratio
to our round; the round's floating-point operations, the machine's best rate (1024×1024 float32
products on every device at once) and the share of it that the round reaches. All are measured in
turn in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from experiments.benchmarks.process import Figures
from experiments.benchmarks.timing import interleave, make_products, set_up
from experiments.benchmarks.workloads import (
    WORKLOADS,
    Workload,
    make_naive_rounds,
    make_rounds,
    training_flop,
)
from flexmoe_jax.errors import InputError
from flexmoe_jax.simulation import client_mesh

_ALONE = "alone"


def run(words: list[str]) -> Iterator[Figures]:
    """Yields the figures of all or of the named workloads; `alone` leaves out the naive round.

    Raises:
      InputError: a word is neither a workload nor `alone`.
    """
    names = [word for word in words if word != _ALONE]
    for name in names:
        if name not in WORKLOADS:
            raise InputError("workload", name, f"choose of {', '.join(WORKLOADS)}, {_ALONE}")
    set_up()
    for name in names or WORKLOADS:
        yield measure(name, WORKLOADS[name], reference=_ALONE not in words)


def measure(name: str, workload: Workload, reference: bool = True) -> Figures:
    """Times rounds of a workload, the naive rounds if requested, and the machine's best rate."""
    mesh = client_mesh()
    products, flop = make_products(mesh)
    contestants: list[Callable[[], object]] = [make_rounds(workload, mesh), products]
    if reference:
        contestants.append(make_naive_rounds(workload))
    ours, peak, *naive = interleave(contestants)
    seconds, peak_rate = min(ours), flop / min(peak)
    gflop = training_flop(workload) / 1e9
    compared: Figures = {}
    if naive:
        compared = {"reference_seconds": min(naive[0]), "ratio": min(naive[0]) / seconds}
    return {
        "suite": "clients",
        "workload": name,
        "seconds": seconds,
        "seconds_median": median(ours),
        "examples_per_second": workload.clients * workload.examples / seconds,
        **compared,
        "gflop": gflop,
        "gflop_per_second": gflop / seconds,
        "peak_gflop_per_second": peak_rate / 1e9,
        "share_of_peak": 1e9 * gflop / seconds / peak_rate,
        "devices": mesh.size,
    }
