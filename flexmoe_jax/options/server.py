"""Options of the server: admission and aggregation of updates, and how it learns the fitness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexmoe_jax.errors import InputError
from flexmoe_jax.options.record import Options, option


@dataclass(frozen=True)
class Aggregation(Options, section="server"):
    """The aggregation of updates, and how the aggregate is applied."""

    optimizer: str = option("sgd", "applied to the mean update", choices=("sgd", "adam"))
    learning_rate: float = option(1.0, "of that optimizer", above=0)
    momentum: float = option(0.0, "of sgd", least=0)
    aggregator: str = option(
        "mean",
        "of updates; trimmed_mean and median by coordinate (docs/edge.md)",
        choices=("mean", "median", "trimmed_mean", "geometric_median"),
    )
    trim: float = option(
        0.1, "of trimmed_mean: part of the updates left out at either end", least=0, most=0.5
    )


@dataclass(frozen=True)
class Admission(Options, section="server"):
    """Which updates the server accepts, and how they count.

    An update with NaN or infinity can neither be cut to `clip` nor be compared with `norm_limit`:
    with either it is refused, with or without quarantine. Under `noise_multiplier` every client has
    the same weight, and `norm_factor` is ignored, because a limit learnt from clients would reveal
    information about them.
    """

    quarantine: bool = option(
        True, "whether updates are refused that are not all numbers, or too long"
    )
    norm_factor: float = option(
        10.0,
        "how many times as long as the median of lately an update may be, for its steps; 0 for "
        "any length",
        least=0,
    )
    norm_limit: float = option(0.0, "greatest L2 norm of an update; 0 for no limit", least=0)
    clip: float = option(0.0, "L2 norm to which updates are cut; 0 for none", least=0)
    noise_multiplier: float = option(
        0.0, "of differential privacy: deviation of the noise over clip; 0 for none", least=0
    )
    noise: str = option(
        "secret",
        "where that noise comes from: the system's entropy, kept nowhere, or (simulated) the run's "
        "seed: the same every time, and private from nobody who knows the config",
        choices=("secret", "simulated"),
    )
    delta: float = option(1e-5, "δ of the guarantee that is reported", above=0, below=1)

    def __post_init__(self) -> None:
        """Refuses values that do not fit, and noise on updates without a limit on their length."""
        super().__post_init__()
        if 0 < self.norm_factor < 1:
            remedy = "choose 0 for none, or 1 or more"
            raise InputError("server.norm_factor", self.norm_factor, remedy)
        if self.noise_multiplier and not self.clip:
            remedy = "cut the updates too: without server.clip no noise makes them private"
            raise InputError("server.noise_multiplier", self.noise_multiplier, remedy)

    @property
    def compares(self) -> bool:
        """Whether updates are judged by comparison with other updates."""
        return bool(self.quarantine and self.norm_factor and not self.noise_multiplier)

    @property
    def private(self) -> bool:
        """Whether noise makes the sums private, so that all clients have the same weight."""
        return bool(self.noise_multiplier)

    @property
    def simulated_noise(self) -> bool:
        """Whether that noise comes from the run's key instead of a secret."""
        return self.noise == "simulated"


@dataclass(frozen=True)
class FitnessOptions(Options, section="fitness"):
    """How the fitness is learnt; the start value and the optimism are ours, not the paper's.

    A score of your own is a pure function of `server.Feedback`, arrays (P, K), one number for each
    client and held expert, to scores (P, K). Larger is better; it is never NaN, also where `usage`
    is 0. It runs inside the compiled round.
    """

    score: str | Callable[..., Any] = option(
        "accuracy",
        "of a pair, from its feedback; in the library also a function of your own, see "
        "`server.FitnessOptions`",
        choices=("accuracy", "loss"),
        own=True,
    )
    alpha: float = option(1.0, "α of the loss score exp(-α l)", above=0)
    beta: float = option(0.5, "β: weight of the newest score", above=0, most=1)
    # Q is kept in single precision, and scores are at most 1.
    initial: float = option(
        1.0, "start value of Q: at 1 no tried pair beats an untried one", least=-1e30, most=1e30
    )
    optimism: float = option(
        0.0,
        "added to Q, for the assignment alone, for pairs that were never tried",
        least=-1e30,
        most=1e30,
    )
    probe: str = option(
        "held",
        "which experts a client scores: those that it holds, while it trains; or all, before a "
        "round, on a few batches, for which it downloads every one (β and optimism do not count)",
        choices=("held", "all"),
    )
    affinity: float = option(
        0.0,
        "worth of an expert that serves clients whose updates are like the client's own, which "
        "tells sooner than any score who should share an expert; with it, the server also says "
        "how much a client should use each of its experts; 0 for none",
        least=0,
        most=1e30,
    )
    profile: str = option(
        "beyond_labels",
        "what tells who is alike: clients' updates; what label shares, where there are labels, do "
        "not explain of them (beyond_labels), for which the server sees these shares (real clients "
        "tell them if they agree); or what is known of clients beforehand (given), which no server "
        "knows: domains or rules, or else label shares",
        choices=("updates", "beyond_labels", "given"),
    )
    evidence: float = option(
        0.25,
        "part of the differences between clients' updates that a few principal components must "
        "explain, beyond label shares and chance, before affinity counts; it then takes the place "
        "of exploration, for as long as there is half of it. 0: both count from the start",
        least=0,
        most=1,
    )
    sketch: int = option(
        512, "numbers kept of each client's updates to tell that", least=16, most=2**16
    )

    @property
    def sketched(self) -> int:
        """F, the count of numbers kept of each update; 0 if they are not used."""
        return self.sketch if self.affinity and self.profile != "given" else 0

    @property
    def beyond_labels(self) -> bool:
        """Whether the server needs the label shares of clients."""
        return bool(self.sketched) and self.profile == "beyond_labels"
