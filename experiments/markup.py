"""Text from files and users as each format shows it: one function a format, for every text.

Names and values come from config.json, study.json and folders, so they may hold anything: what a
browser would run, a spreadsheet would reckon, or a terminal would obey.
"""

from __future__ import annotations

import html
import re

from flexmoe_jax.errors import printable

# Characters of a text; captions of ours are the longest.
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
    # After `\\` both would be read as its arguments.
    "[": "{[}",
    "*": "{*}",
    "\N{MINUS SIGN}": r"$-$",
    "\N{EN DASH}": "--",
    "·": r"$\cdot$",
    "\N{NO-BREAK SPACE}": "~",
}
# What opens a tag, an entity, a link, code or emphasis, or ends a cell.
_MARKDOWN = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)|[\\`|\[\]*]")
# Where a cell begins, and where one would that is split at another separator: what a spreadsheet
# takes for a formula there, in wide letters, too (OWASP, "CSV injection").
_FORMULA = re.compile(r"(^|[;,|\t])(\s*)(?=[=+\-@\uFF1D\uFF0B\uFF0D\uFF20])")


def html_text(text: object) -> str:
    """Text, or an attribute's value, that a browser shows as it stands."""
    return html.escape(printable(text, _MOST))


def markdown_text(text: object) -> str:
    """Text that Markdown shows as it stands, in a line of its own or in a table's cell."""
    return _MARKDOWN.sub(_quoted, printable(text, _MOST))


def _quoted(match: re.Match[str]) -> str:
    return html.escape(match[0]) if match[0] in "<&" else f"\\{match[0]}"


def latex_text(text: object) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(character, character) for character in printable(text, _MOST))


def csv_text(text: object) -> str:
    """A cell that a spreadsheet shows and does not reckon; numbers stay numbers."""
    shown = printable(text, _MOST)
    try:
        float(shown)
    except ValueError:
        return _FORMULA.sub(r"\1\2'", shown)
    return shown
