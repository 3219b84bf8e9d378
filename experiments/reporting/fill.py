"""Fills the HTML templates in `templates/`. Every value is escaped and cannot be markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flexmoe_jax.errors import printable

# Most characters of a value; our own captions are the longest.
_MOST = 10_000


def _shown(value: object) -> object:
    """Returns a value as one printable line of text; what a template has made stays as it is."""
    return value if isinstance(value, Markup) else printable(value, _MOST)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def fill(template: str, **values: Any) -> str:
    """Returns a page: the template of this name, filled with values."""
    return TEMPLATES.get_template(template).render(values)
