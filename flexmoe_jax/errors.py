"""What goes wrong because of what the user gave."""

from __future__ import annotations


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
        # One line, whatever was given.
        shown = " ".join(str(value).splitlines())
        super().__init__(f"{field}={shown}: {remedy}")
