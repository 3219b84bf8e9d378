"""What the server lets in, how it aggregates, and how it learns the fitness."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe_jax.options import option

AGGREGATORS = ("mean", "median", "trimmed_mean", "geometric_median")


@dataclass(frozen=True)
class ServerOptions:
    """Admission, aggregation and privacy."""

    optimizer: str = option("sgd", "applied to the mean update", choices=("sgd", "adam"))
    learning_rate: float = option(1.0, "of the optimizer", above=0)
    momentum: float = option(0.0, "of sgd", least=0)
    aggregator: str = option(
        "mean", "how one update is made of many (docs/edge.md)", choices=AGGREGATORS
    )
    trim: float = option(
        0.1, "of trimmed_mean: part of the updates left out at either end", least=0, most=0.5
    )
    quarantine: bool = option(True, "whether updates are refused that are not numbers, or too long")
    norm_factor: float = option(
        10.0,
        "how many times as long as the median of lately an update may be, for its steps; 0 for any",
        least=0,
    )
    norm_limit: float = option(0.0, "greatest L2 norm of an update; 0 for no limit", least=0)
    clip: float = option(0.0, "L2 norm to which updates are cut; 0 for none", least=0)
    noise_multiplier: float = option(0.0, "of differential privacy; 0 for none", least=0)
    noise: str = option(
        "secret",
        "where that noise comes from: the system's entropy, kept nowhere, or the run's seed: the "
        "same every time, and private from nobody who knows the config",
        choices=("secret", "simulated"),
    )
    delta: float = option(1e-5, "δ of the guarantee that is reported", above=0, below=1)


@dataclass(frozen=True)
class FitnessOptions:
    """How the fitness is learnt."""

    score: str = option("accuracy", "of a pair, from its feedback", choices=("accuracy", "loss"))
    alpha: float = option(1.0, "α of the loss score exp(-α l)", above=0)
    beta: float = option(0.5, "β: weight of the newest score", above=0, most=1)
    initial: float = option(
        1.0, "start value of Q: at 1 no pair beats an untried one", least=-1e6, most=1e6
    )
    optimism: float = option(0.0, "bonus for pairs never tried", least=-1e6, most=1e6)
