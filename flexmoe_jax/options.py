"""Options: each stands once, with its default, range and meaning, in the record of its room.

    @dataclass(frozen=True)
    class LocalOptions:
        epochs: int = option(1, "passes over the client's examples in a round", least=1)

A config section is made from a record (`defaults`), and a record from a section (`read`), which
refuses what does not fit in one line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from flexmoe_jax.errors import InputError

Record = TypeVar("Record")

# JAX counts in 32 bits.
_LARGEST = 2**31 - 1
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def option(
    default: Any,
    meaning: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    kind: type | None = None,
) -> Any:
    """A field of a record of options.

    Args:
      default: that works.
      meaning: of the field, with its unit.
      least: the field must be at least this.
      above: it must be greater than this.
      most: it must be at most this.
      below: it must be less than this.
      choices: it must be one of these texts.
      kind: of its values; None for that of the default, `object` for any.
    """
    metadata = {
        "meaning": meaning,
        "least": least,
        "above": above,
        "most": most,
        "below": below,
        "choices": tuple(choices),
        "kind": kind or type(default),
    }
    return dataclasses.field(default=default, metadata=metadata)


def defaults(record: type) -> dict[str, Any]:
    """The default of every field of a record, by its name."""
    return {field.name: field.default for field in dataclasses.fields(record)}


def read(record: type[Record], given: Mapping[str, Any], section: str) -> Record:
    """Makes a record of the fields of a config section.

    Args:
      record: class of the record.
      given: its fields.
      section: name of the section, for what is said of a field.

    Raises:
      InputError: a field that is unknown or missing, of another kind, or out of its range.
    """
    known = {field.name: field for field in dataclasses.fields(record)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            remedy = f"no such field; did you mean {section}.{near}?"
            raise InputError(f"{section}.{name}", given[name], remedy)
    for name, field in known.items():
        check(f"{section}.{name}", given.get(name), field.metadata)
    return record(**{name: given[name] for name in known})


def check(field: str, value: Any, rules: Mapping[str, Any]) -> None:
    """Refuses a value that does not fit its field.

    Args:
      field: dotted name.
      value: what was given.
      rules: as `option` keeps them.

    Raises:
      InputError: naming the field, the value and what fits.
    """
    kind = rules["kind"]
    if kind not in _KINDS:
        return
    right = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not right or isinstance(value, bool) != (kind is bool):
        raise InputError(field, value, f"give {_KINDS[kind]}")
    if kind is int and abs(value) > _LARGEST:
        raise InputError(field, value, f"choose at most {_LARGEST}")
    if rules["choices"] and value not in rules["choices"]:
        near = difflib.get_close_matches(value, rules["choices"], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(field, value, f"{hint}choose one of {', '.join(rules['choices'])}")
    if kind in (int, float) and not _inside(value, rules):
        raise InputError(field, value, _range(kind, rules))


def _inside(value: float, rules: Mapping[str, Any]) -> bool:
    return (
        math.isfinite(value)
        and (rules["least"] is None or value >= rules["least"])
        and (rules["above"] is None or value > rules["above"])
        and (rules["most"] is None or value <= rules["most"])
        and (rules["below"] is None or value < rules["below"])
    )


def _range(kind: type, rules: Mapping[str, Any]) -> str:
    """What fits, in words."""
    least, above, most, below = (rules[name] for name in ("least", "above", "most", "below"))
    low = f"[{least:g}" if least is not None else f"({above:g}" if above is not None else ""
    high = f"{most:g}]" if most is not None else f"{below:g})" if below is not None else ""
    if low and high:
        return f"choose a number in {low}, {high}"
    if least is not None:
        return f"choose {least:g} or more"
    if above is not None:
        return f"choose a number above {above:g}"
    if high:
        return f"choose a number {'up to' if most is not None else 'below'} {high[:-1]}"
    return "choose a whole number" if kind is int else "choose a finite number"


def describe(sections: Mapping[str, type]) -> list[tuple[str, Any, str]]:
    """Name, default and meaning of every option."""
    return [
        (f"{section}.{field.name}", field.default, field.metadata["meaning"])
        for section, record in sections.items()
        for field in dataclasses.fields(record)
    ]
