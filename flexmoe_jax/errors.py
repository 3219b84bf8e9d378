"""Errors in the user's input, reported in one line."""

from __future__ import annotations

import importlib.util
import unicodedata
from typing import Any

# Control characters move a terminal's cursor or change its colour. Format characters reverse the
# writing direction. Lone surrogates, from file names that are not UTF-8, cannot be encoded at all.
_HIDDEN = ("Cc", "Cf", "Cs")


def require_package(module: str, extra: str, what: str) -> None:
    """Checks that an optional package is installed.

    Args:
      module: name by which the package is imported.
      extra: the extra of flexmoe_jax that installs the package.
      what: what needs the package, to begin the error message.

    Raises:
      InputError: the package is not installed.
    """
    if importlib.util.find_spec(module) is None:
        remedy = f"{what}: pip install 'flexmoe_jax[{extra}]'"
        raise InputError(module, "not installed", remedy)


def printable(text: object, most: int = 1000) -> str:
    """Turns any text from a file or a user into one line that a terminal shows unchanged.

    Args:
      text: any object.
      most: maximum number of characters; longer text is cut and ends in an ellipsis.
    """
    given = str(text)
    line = " ".join(given[: most + 1].splitlines()).replace("\t", " ")
    if not line.isprintable():
        line = "".join(_visible(character) for character in line)
    return line if len(given) <= most else line[: most - 1] + "…"


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode("ascii")


class InputError(ValueError):
    """Raised for a value from the user that cannot be used.

    Prints as one line, `field=value: remedy`. The launcher shows only this line.

    Attributes:
      field: dotted name of the config field, or the name of the argument.
      value: the given value.
      remedy: what to give instead.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        """Stores the three parts and composes the line."""
        self.field = field
        self.value = value
        self.remedy = remedy
        super().__init__(f"{printable(field)}={printable(value)}: {printable(remedy)}")


class StoppedError(Exception):
    """Raised by a function that waits, once its caller wants to wait no longer."""


def check_range(field: str, values: Any, least: int, most: int, what: str) -> None:
    """Checks that all numbers of an array are in a range.

    Args:
      field: name of the config field or argument.
      values: an array of numbers; an empty array is in range.
      least: the smallest allowed number.
      most: the largest allowed number.
      what: meaning of the numbers, to end the sentence "give 0 to 9, ...".

    Raises:
      InputError: a number is out of range; the error names it.
    """
    if values.size and not least <= values.min() <= values.max() <= most:
        worst = values.min() if values.min() < least else values.max()
        raise InputError(field, worst, f"give {least} to {most}, {what}")
