"""Options of where rounds are computed, and of how often the models are evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options.record import Options, option


@dataclass(frozen=True)
class ExecutionOptions(Options, section="execution"):
    """Devices and memory; nothing here changes results beyond rounding."""

    devices: int = option(0, "that share a round; 0 for all (on CPU: one a core)", least=0)
    expert_devices: int = option(
        1,
        "that share one copy of the experts, if these do not fit on one; a divisor of the number "
        "of devices and of model.experts",
        least=1,
    )
    client_block_size: int = option(0, "clients side by side on a device; 0 for automatic", least=0)
    data: str = option(
        "auto",
        "where training examples stay: device; host, from where a cohort's are sent while the "
        "round before it computes; or auto: device, unless they took more than half of its memory",
        choices=("auto", "device", "host"),
    )
    tile: int = option(
        0,
        "examples whose gradient is taken at once, to stay in cache; 0 for automatic; the whole "
        "batch in any case with local.balance, which counts use over it",
        least=0,
    )


@dataclass(frozen=True)
class EvalOptions(Options, section="eval"):
    """Evaluation."""

    every: int = option(1, "rounds; the last round is always evaluated", least=1)
    batch_size: int = option(500, "test examples at once", least=1)
    prior: bool = option(
        True,
        "whether a client adds the log of its label shares to its logits: for personal figures, "
        "and no others",
    )
    fine_tune: bool = option(
        False,
        "whether personal figures are also taken after each client has trained for one more round, "
        "for itself alone, at the learning rate of the first",
    )
