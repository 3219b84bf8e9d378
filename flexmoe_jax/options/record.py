"""Defines options: fields of a frozen record, each with its default, its range and its meaning.

    @dataclass(frozen=True)
    class FitnessOptions(Options, section="fitness"):
        beta: float = option(0.5, "β: weight of the newest score", above=0, most=1)

A record refuses values that do not fit, with a message of one line, wherever it is created: in a
user's program, or from a section of a config.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, Self

from flexmoe_jax.errors import InputError

# JAX's integers have 32 bits.
_LARGEST = 2**31 - 1

KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: 'a tuple, as "(32, 64)"',
}
"""What an option expects, by its type."""


class Rule(NamedTuple):
    """The definition of an option.

    Attributes:
      default: its value if none is given; None for an option that may stay unset.
      meaning: what it does, with its unit.
      kind: the type of its values, a key of `KINDS`; `object` if the code that uses it checks it.
      least: the smallest number allowed.
      above: a number must be greater than this.
      most: the greatest number allowed.
      below: a number must be less than this.
      choices: the texts allowed.
      own: whether the caller may give a function instead of a text.
      where: another option of the record and its value; the range counts only if it has that value.
    """

    default: Any
    meaning: str
    kind: type
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    own: bool = False
    where: tuple[str, object] | None = None

    @property
    def range(self) -> str:
        """The allowed values in words; empty if every value of the kind is allowed."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is int and self.most is not None:
            return f"{self.least} to {self.most}"
        if self.kind is int:
            return f"{self.least} or more"
        if self.least is not None and self.least == -(self.most or 0) != 0:
            return f"a number of at most {self.most:g}, either side of 0"
        low = f"[{self.least:g}" if self.least is not None else f"({self.above or 0:g}"
        high = f"{self.most:g}]" if self.most is not None else f"{self.below or 0:g})"
        if self.most is not None or self.below is not None:
            return f"a number in {low}, {high}"
        if self.least is not None:
            return f"a number of at least {self.least:g}"
        if self.above is not None:
            return f"a number above {self.above:g}"
        return "a finite number" if self.kind is float else ""

    def check(self, field: str, value: Any, counts: bool = True) -> None:
        """Refuses a value that does not fit.

        Args:
          field: dotted name of the option.
          value: what was given.
          counts: whether the range is checked too.

        Raises:
          InputError: naming the field, the value, and the allowed values.
        """
        optional = self.default is None and value is None
        if self.kind not in KINDS or optional or (self.own and callable(value)):
            return
        if not self._is_of_kind(value):
            raise InputError(field, value, f"give {KINDS[self.kind]}")
        most = _LARGEST if self.most is None else self.most
        if self.kind is int and value > most:
            raise InputError(field, value, f"choose at most {most}")
        if counts and self.choices and value not in self.choices:
            near = difflib.get_close_matches(value, self.choices, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(field, value, f"{hint}choose {self.range}")
        if counts and self.kind in (int, float) and not self._holds(value):
            fits = f"{self.least} or more" if self.kind is int else self.range
            raise InputError(field, value, f"choose {fits}")

    def _is_of_kind(self, value: Any) -> bool:
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        kinds: dict[type, Any] = {int: Integral, float: Real, str: str, tuple: tuple | list}
        return isinstance(value, kinds[self.kind])

    def _holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def option(default: Any, meaning: str, *, kind: type | None = None, **limits: Any) -> Any:
    """Defines a field of a record.

    Args:
      default: a value that works.
      meaning: what it does, with its unit.
      kind: the type of its values; the type of the default if None.
      **limits: the other fields of a `Rule`.
    """
    rule = Rule(default, meaning, kind or type(default), **limits)
    return dataclasses.field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class Options:
    """A record of options; a field without `option` is not an option.

    Attributes:
      section: the section of a config that has these fields; empty for the outermost level.
    """

    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str | None = None, **others: Any) -> None:
        """Sets the section; a subclass without its own section inherits its parent's."""
        super().__init_subclass__(**others)
        if section is not None:
            cls.section = section

    def __post_init__(self) -> None:
        """Refuses values that do not fit."""
        for name, rule in self.rules().items():
            counts = rule.where is None or getattr(self, rule.where[0]) == rule.where[1]
            rule.check(self.field(name), getattr(self, name), counts)

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        """Returns the options by name."""
        fields = dataclasses.fields(cls)
        return {field.name: field.metadata["rule"] for field in fields if "rule" in field.metadata}

    @classmethod
    def field(cls, name: str) -> str:
        """Returns the dotted name of an option."""
        return f"{cls.section}.{name}" if cls.section else name

    @classmethod
    def check(cls, **values: Any) -> None:
        """Refuses values of some options that do not fit, for functions that take no whole record.

        Raises:
          InputError: naming the option, its value and the allowed values.
        """
        rules = cls.rules()
        for name, value in values.items():
            rules[name].check(cls.field(name), value)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """Creates the record that a config describes.

        Args:
          given: values by dotted name; they may include values of other records.

        Raises:
          InputError: for the first value that does not fit or is missing.
        """
        return cls(**{name: given.get(cls.field(name)) for name in cls.rules()})
