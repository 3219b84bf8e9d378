"""What goes wrong because of what the user gave, and how it is said in one line."""

from __future__ import annotations

import importlib.util
import unicodedata
from typing import Any

# Control characters move a terminal's cursor or colour it; formats turn the direction of writing
# around; lone surrogates, as of file names that are no UTF-8, cannot be written at all.
_HIDDEN = ("Cc", "Cf", "Cs")


def require_package(module: str, extra: str, what: str) -> None:
    """Refuses to go on without an optional package.

    Args:
      module: by which it is imported.
      extra: of this package, which brings it.
      what: needs it.

    Raises:
      InputError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        remedy = f"{what}: pip install 'flexmoe_jax[{extra}]'"
        raise InputError(module, "not installed", remedy)


def printable(text: object, most: int = 1000) -> str:
    """One line of text that a terminal shows as it stands, whatever a file or a user gave.

    Args:
      text: anything.
      most: characters; what is longer is cut, and ends in an ellipsis.
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
    """A value that the user gave cannot be used.

    Prints as one line, `field=value: remedy`, which is all that the launcher shows.

    Attributes:
      field: dotted name of the config field, or the name of the argument.
      value: what was given.
      remedy: what to give instead.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        """Stores the three parts and composes the line."""
        self.field = field
        self.value = value
        self.remedy = remedy
        super().__init__(f"{printable(field)}={printable(value)}: {printable(remedy)}")


def check_range(field: str, values: Any, least: int, most: int, what: str) -> None:
    """Refuses an array with a number out of range.

    Args:
      field: what the user gave it as.
      values: an array of numbers; an empty one is in range.
      least: the smallest number that fits.
      most: the largest.
      what: they are, to end the sentence "give 0 to 9, ...".

    Raises:
      InputError: naming the number that is out of range.
    """
    if values.size and not least <= values.min() <= values.max() <= most:
        worst = values.min() if values.min() < least else values.max()
        raise InputError(field, worst, f"give {least} to {most}, {what}")
