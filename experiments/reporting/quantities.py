"""Names, units and number formats of all metrics that a run records."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

NBSP = "\N{NO-BREAK SPACE}"
NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Quantity:
    """How a recorded metric is shown.

    Attributes:
      name: name for readers.
      format: value to text with its unit.
      better: `higher`, `lower`, or empty if neither is better.
    """

    name: str
    format: Callable[[float], str]
    better: str = ""


class LossUnit(NamedTuple):
    """Unit in which losses are shown: its name, which may be empty, and its size in nats."""

    name: str
    nats: float

    def titled(self, words: str) -> str:
        """Returns a title of a loss with the unit appended."""
        return f"{words}, {self.name}" if self.name else words


NATS = LossUnit("nats", 1.0)
UNNAMED = LossUnit("", 1.0)
LOSS_UNITS = {"classification": NATS, "next_token": LossUnit("bits a byte", math.log(2))}
"""Task to the unit of its losses; tokens are bytes. Other tasks have units of their own."""


def percent(value: float) -> str:
    """Formats a fraction as a percentage with one decimal."""
    return f"{100 * value:.1f}{NBSP}%"


def ratio(value: float) -> str:
    """Formats a number without unit to three significant digits; tiny ones with a power of ten."""
    if value and abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}{TIMES}10{_superscript(int(exponent))}"
    return f"{value:.3g}" if abs(_rounded(value)) < 1000 else count(value)


def count(value: float) -> str:
    """Formats a whole number with thousands separators; from 1e15 on, in scientific notation."""
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"


def counted(value: float, noun: str) -> str:
    """Formats a count with its noun, in the plural unless the count is one."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def byte_unit(largest: float) -> tuple[float, str]:
    """Returns the size in bytes and the name of the decimal unit that suits `largest` best."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= factor:
            return factor, unit
    return 1.0, "B"


def time_unit(largest: float) -> tuple[float, str]:
    """Returns the length in seconds and the name of the time unit that suits `largest` best."""
    for factor, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if largest >= 2 * factor:
            return factor, unit
    return 1.0, "seconds"


def power_of_ten(largest: float) -> tuple[float, str]:
    """Returns a factor that makes numbers up to `largest` readable, and its suffix for a title."""
    if largest >= 0.01 or not largest > 0:
        return 1.0, ""
    exponent = max(3 * math.floor(math.log10(largest) / 3), -300)
    return 10.0**-exponent, f", {TIMES}10{_superscript(exponent)}"


def size(value: float) -> str:
    """Formats a number of bytes in decimal units."""
    factor, unit = byte_unit(_rounded(value))
    return f"{ratio(value / factor)}{NBSP}{unit}"


def duration(value: float) -> str:
    """Formats a number of seconds in milliseconds, seconds, minutes or hours."""
    if not math.isfinite(value):
        return _not_finite(value)
    if _rounded(value) < 1:
        return f"{1000 * value:.3g}{NBSP}ms"
    if _rounded(value) < 120:
        return f"{value:.3g}{NBSP}s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes}{NBSP}min {seconds}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def rate(value: float) -> str:
    """Formats a rate in examples per second."""
    return f"{count(value)}{NBSP}/s"


QUANTITIES = {
    "eval/personal_accuracy": Quantity("Personal accuracy", percent, "higher"),
    "eval/personal_accuracy_p10": Quantity(
        "Personal accuracy, tenth percentile of clients", percent, "higher"
    ),
    "eval/global_accuracy": Quantity("Global accuracy", percent, "higher"),
    "eval/server_accuracy": Quantity("Server accuracy", percent, "higher"),
    "eval/assembled_accuracy": Quantity("Accuracy of all experts in one model", percent, "higher"),
    "eval/personal_loss": Quantity("Personal loss", ratio, "lower"),
    "eval/global_loss": Quantity("Global loss", ratio, "lower"),
    "eval/server_loss": Quantity("Server loss", ratio, "lower"),
    "eval/assembled_loss": Quantity("Loss of all experts in one model", ratio, "lower"),
    "eval/tuned_accuracy": Quantity("Accuracy once fine-tuned", percent, "higher"),
    "eval/tuned_loss": Quantity("Loss once fine-tuned", ratio, "lower"),
    "eval/newcomer_accuracy": Quantity("Newcomers' accuracy", percent, "higher"),
    "eval/newcomer_loss": Quantity("Newcomers' loss", ratio, "lower"),
    "eval/clients": Quantity("Clients evaluated", count),
    "eval/personal_clients": Quantity("Clients with personal figures", count),
    "eval/newcomer_clients": Quantity("Newcomers evaluated", count),
    "train/loss": Quantity("Training loss", ratio, "lower"),
    "load/assigned_cv": Quantity("Assigned load CV, per round", ratio, "lower"),
    "load/assigned_cv_cumulative": Quantity("Assigned load CV, cumulative", ratio, "lower"),
    "load/usage_cv": Quantity("Used load CV, per round", ratio, "lower"),
    "load/usage_cv_cumulative": Quantity("Used load CV, cumulative", ratio, "lower"),
    "assignment/gap": Quantity("Assignment gap", ratio, "lower"),
    "assignment/solve_seconds": Quantity("Assignment solve time", duration),
    "comm/bytes_down": Quantity("Sent to clients, per round", size),
    "comm/bytes_up": Quantity("Sent to server, per round", size),
    "comm/bytes_cached": Quantity("Not sent again, per round", size),
    "comm/newcomer_bytes_down": Quantity("Sent to newcomers, to probe them", size),
    "comm/newcomer_bytes_up": Quantity("Sent back by newcomers", size),
    "clients/asked": Quantity("Clients asked, per round", count),
    "clients/delivered": Quantity("Clients that delivered, per round", count),
    "clients/quarantined": Quantity("Updates refused, per round", count),
    "privacy/epsilon": Quantity("Privacy loss \N{GREEK SMALL LETTER EPSILON}", ratio, "lower"),
    "privacy/epsilon_simulated": Quantity(
        "Privacy loss \N{GREEK SMALL LETTER EPSILON}, were the noise secret", ratio, "lower"
    ),
    "time/simulated_seconds": Quantity("Simulated time, per round", duration),
    "time/round_seconds": Quantity("Round time", duration),
    "time/train_examples_per_second": Quantity("Training speed", rate),
}


def name(key: str) -> str:
    """Returns the metric's name for readers; its key if the metric is not known."""
    return QUANTITIES[key].name if key in QUANTITIES else key


def better(key: str) -> str:
    """Returns `higher` or `lower`; empty if neither is better or the metric is not known."""
    return QUANTITIES[key].better if key in QUANTITIES else ""


def is_loss(key: str) -> bool:
    """Whether the metric is a loss, recorded in nats or in the task's own unit."""
    return key.endswith(("/loss", "_loss"))


def show(key: str, value: float | None, unit: LossUnit = UNNAMED) -> str:
    """Formats a metric's value; None becomes a dash, other values that are not finite `NaN` or `∞`.

    Args:
      key: key of the metric.
      value: value as recorded.
      unit: unit in which losses are shown.
    """
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return _not_finite(value)
    if is_loss(key):
        text = f"{ratio(value / unit.nats)}{NBSP * bool(unit.name)}{unit.name}"
    else:
        text = QUANTITIES[key].format(value) if key in QUANTITIES else f"{value:,.6g}"
    return text.replace("-", MINUS)


def _rounded(value: float) -> float:
    """Rounds to three significant digits: 999.6 is shown as 1,000, in the unit of 1,000."""
    return float(f"{value:.3g}")


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "∞" if value > 0 else f"{MINUS}∞"


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
