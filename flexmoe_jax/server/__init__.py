"""The server side: it assigns experts, admits and aggregates updates, and learns the fitness."""

from flexmoe_jax.options.assignment import LOAD_MODELS
from flexmoe_jax.options.server import Admission, FitnessOptions
from flexmoe_jax.server.admit import Verdict, admit
from flexmoe_jax.server.aggregate import (
    Aggregator,
    Arrived,
    Due,
    Sums,
    collect,
    geometric_median,
    mean,
    private,
    trimmed_mean,
)
from flexmoe_jax.server.assign import (
    Assign,
    check_solution,
    enrol,
    make_assign,
)
from flexmoe_jax.server.fitness import (
    accuracy_score,
    loss_score,
    make_score,
    update_fitness,
)
from flexmoe_jax.server.load import LoadModel, make_load_model
from flexmoe_jax.server.privacy import draw_secret, epsilon, noise_key
from flexmoe_jax.server.quarantine import learn_norms, norm_limits, too_late
from flexmoe_jax.server.server import Desk, close, conclude, init, limits, report, send, without
from flexmoe_jax.types import Feedback, Ledger, Server

__all__ = [
    "LOAD_MODELS",
    "Admission",
    "Aggregator",
    "Arrived",
    "Assign",
    "Desk",
    "Due",
    "Feedback",
    "FitnessOptions",
    "Ledger",
    "LoadModel",
    "Server",
    "Sums",
    "Verdict",
    "accuracy_score",
    "admit",
    "check_solution",
    "close",
    "collect",
    "conclude",
    "draw_secret",
    "enrol",
    "epsilon",
    "geometric_median",
    "init",
    "learn_norms",
    "limits",
    "loss_score",
    "make_assign",
    "make_load_model",
    "make_score",
    "mean",
    "noise_key",
    "norm_limits",
    "private",
    "report",
    "send",
    "too_late",
    "trimmed_mean",
    "update_fitness",
    "without",
]
