"""Escapes text from files and users, with one function per output format (HTML: `reporting.fill`).

Names and values come from config.json, study.json and folders. They may contain anything: code that
a browser would run, a formula for a spreadsheet, or control sequences for a terminal.
"""

from __future__ import annotations

import html
import re

from flexmoe_jax.errors import printable

# Most characters of a text; our own captions are the longest.
_MOST = 10_000
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    # After `\\`, LaTeX would read both as arguments of it.
    "[": "{[}",
    "*": "{*}",
    "\N{MINUS SIGN}": r"$-$",
    "\N{EN DASH}": "--",
    "·": r"$\cdot$",
    "\N{NO-BREAK SPACE}": "~",
}
# Characters that open a tag, an entity, a link, code or emphasis, or that end a cell.
_MARKDOWN = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)|[\\`|\[\]*]")
# The start of a cell, also if cells were split at another separator, before a character that starts
# a formula in a spreadsheet, full-width forms included (OWASP, "CSV injection").
_FORMULA = re.compile(r"(^|[;,|\t])(\s*)(?=[=+\-@\uFF1D\uFF0B\uFF0D\uFF20])")


def markdown_text(text: object) -> str:
    """Escapes text for Markdown, on a separate line or in a table cell."""
    return _MARKDOWN.sub(_quoted, printable(text, _MOST))


def _quoted(match: re.Match[str]) -> str:
    return html.escape(match[0]) if match[0] in "<&" else f"\\{match[0]}"


def latex_text(text: object) -> str:
    """Escapes text for LaTeX."""
    return "".join(_LATEX.get(character, character) for character in printable(text, _MOST))


def csv_text(text: object) -> str:
    """Escapes a CSV cell so that a spreadsheet does not evaluate it; numbers stay numbers."""
    shown = printable(text, _MOST)
    try:
        float(shown)
    except ValueError:
        return _FORMULA.sub(r"\1\2'", shown)
    return shown
