"""How many clients there are, what goes wrong with them, and where they are computed."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options import option


@dataclass(frozen=True)
class ClientsOptions:
    """The clients."""

    count: int = option(20, "C", least=1, most=10_000_000)
    per_round: int = option(0, "P; 0 for all", least=0)
    sampling: str = option(
        "uniform",
        "of a round's cohort; examples: in proportion to what clients have",
        choices=("uniform", "examples"),
    )
    capacity: object = option(
        "1-4",
        "k_c: a number (2), a range (1-4) or a list ([1, 2, 4]), dealt out evenly, at random; or "
        "memory: as many as each client's device has room for (needs edge.mix)",
        kind=object,
    )
    newcomers: int = option(
        0, "clients kept out of training, and admitted after it (see eval/newcomer_*)", least=0
    )


@dataclass(frozen=True)
class FaultsOptions:
    """Clients whose every update is wrong."""

    share: float = option(0.0, "of the clients", least=0, most=1)
    kind: str = option(
        "nan",
        "nan | flip (turned around) | scale (1000 times too long) | noise (added, 10 times as long)",
        choices=("nan", "flip", "scale", "noise"),
    )


@dataclass(frozen=True)
class ExecutionOptions:
    """Devices and memory; nothing here changes results beyond rounding."""

    devices: int = option(0, "that share a round; 0 for all (on CPU: one a core)", least=0)
    client_block_size: int = option(
        0, "clients side by side on a device; 0 for automatic", least=0
    )
    data: str = option(
        "auto",
        "where training examples stay: device; host, from where a cohort's are sent while the round "
        "before it computes; or auto: device, unless they took more than half of its memory",
        choices=("auto", "device", "host"),
    )
    tile: int = option(0, "examples whose gradient is taken at once; 0 for automatic", least=0)


@dataclass(frozen=True)
class EvalOptions:
    """Evaluation."""

    every: int = option(1, "rounds; the last round is always evaluated", least=1)
    batch_size: int = option(500, "test examples at once", least=1)
    prior: bool = option(
        True,
        "whether a client adds the log of its label shares to its logits for personal figures",
    )
