"""Names, units and number formats of everything a run records."""

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
      name: what people call it.
      format: value to text with its unit.
      better: `higher`, `lower`, or empty where neither side is better.
    """

    name: str
    format: Callable[[float], str]
    better: str = ""


class LossUnit(NamedTuple):
    """What losses are told in: its name, empty for none, and how many nats it is."""

    name: str
    nats: float

    def titled(self, words: str) -> str:
        """Words for a loss, with the unit behind them."""
        return f"{words}, {self.name}" if self.name else words


NATS = LossUnit("nats", 1.0)
UNNAMED = LossUnit("", 1.0)
LOSS_UNITS = {"classification": NATS, "next_token": LossUnit("bits a byte", math.log(2))}
"""By task; tokens are bytes. The numbers of all other tasks are their own."""


def percent(value: float) -> str:
    """Fraction as a percentage, one decimal."""
    return f"{100 * value:.1f}{NBSP}%"


def ratio(value: float) -> str:
    """Number without a unit, three significant digits, plain notation where it is readable."""
    if value and abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}{TIMES}10{_superscript(int(exponent))}"
    return f"{value:.3g}" if abs(value) < 1000 else count(value)


def count(value: float) -> str:
    """Whole number with thousands separators; what nobody would read out is rounded."""
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"


def counted(value: float, noun: str) -> str:
    """A number of things, the noun in the plural unless it is one."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def byte_unit(largest: float) -> tuple[float, str]:
    """Bytes in, and name of, the decimal unit in which `largest` reads best."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= factor:
            return factor, unit
    return 1.0, "B"


def time_unit(largest: float) -> tuple[float, str]:
    """Seconds in, and name of, the unit in which `largest` reads best."""
    for factor, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if largest >= 2 * factor:
            return factor, unit
    return 1.0, "seconds"


def power_of_ten(largest: float) -> tuple[float, str]:
    """A factor, and what to write behind a title, so that numbers up to `largest` can be read."""
    if largest >= 0.01 or not largest > 0:
        return 1.0, ""
    exponent = max(3 * math.floor(math.log10(largest) / 3), -300)
    return 10.0**-exponent, f", {TIMES}10{_superscript(exponent)}"


def size(value: float) -> str:
    """Bytes in decimal units."""
    factor, unit = byte_unit(value)
    return f"{value / factor:.3g}{NBSP}{unit}"


def duration(value: float) -> str:
    """Seconds as people say them."""
    if not math.isfinite(value):
        return _not_finite(value)
    if value < 1:
        return f"{1000 * value:.3g}{NBSP}ms"
    if value < 120:
        return f"{value:.3g}{NBSP}s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes}{NBSP}min {seconds}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def rate(value: float) -> str:
    """Examples per second."""
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
    """What people call the metric; its own key where it is not a known one."""
    return QUANTITIES[key].name if key in QUANTITIES else key


def better(key: str) -> str:
    """`higher`, `lower`, or empty where neither side is better or the metric is not known."""
    return QUANTITIES[key].better if key in QUANTITIES else ""


def is_loss(key: str) -> bool:
    """Whether the metric is a loss, recorded in nats, or what else the task counts in."""
    return key.endswith(("/loss", "_loss"))


def show(key: str, value: float | None, unit: LossUnit = UNNAMED) -> str:
    """The metric's value as text; a dash for None, `NaN` or `∞` for what is not finite.

    Args:
      key: of the metric.
      value: as recorded.
      unit: to tell losses in.
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


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "∞" if value > 0 else f"{MINUS}∞"


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
