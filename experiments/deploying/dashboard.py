"""Writes the clients' status to a web page and a JSON file, updated while a run goes on."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.markup import html_text as escape
from experiments.workdir import write_atomically
from flexmoe_jax.deploy import Facts, Post

_LOG = logging.getLogger(__name__)
FILE, PAGE = "clients.json", "clients.html"
# Seconds between two updates, here and in a browser.
_EVERY = 2
_STYLE_SHEET = Path(__file__).parents[1] / "reporting" / "page.css"
_STATES = {
    "asked": "was asked, and has not answered yet",
    "ready": "waits to be asked",
    "joining": "is there, and is being told about the federation",
    "away": "is not there",
    "out": "cannot take part as it is",
}
_COLUMNS = ("client", "state", "examples", "asked", "answered", "late", "refused", "seconds")


class Board:
    """Writes the page and the file every two seconds if they change, and once more when closed.

    Args:
      folder: folder of the run.
      post: knows the status of the clients.
      facts: what each client reported about itself.
    """

    def __init__(self, folder: Path, post: Post, facts: Sequence[Facts]) -> None:
        """Starts to write at once."""
        self._folder, self._post = folder, post
        self._examples = {one.name: one.examples for one in facts}
        self._over = threading.Event()
        self._last = ""
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops, and writes the final status."""
        self._over.set()
        self._thread.join()
        self._write(live=False)

    def _watch(self) -> None:
        while not self._over.wait(_EVERY):
            self._write(live=True)

    def _write(self, *, live: bool) -> None:
        known = {
            name: {"examples": self._examples.get(name, 0), **shown}
            for name, shown in self._post.shown().items()
        }
        page = render(known, self._folder.resolve().name, live=live)
        if page != self._last:
            self._last = page
            try:
                write_atomically(self._folder / FILE, json.dumps(known, indent=2) + "\n")
                write_atomically(self._folder / PAGE, page)
            except OSError as error:  # A failing page must not stop the run.
                _LOG.warning("%s: cannot be written: %s", PAGE, error.strerror or error)


def render(known: Mapping[str, Mapping[str, object]], run: str, *, live: bool) -> str:
    """Returns the page as HTML.

    Args:
      known: the status of each client, by the client's name.
      run: name of the run.
      live: whether the run goes on; the page then makes a browser reload it.
    """
    head = "".join(f"<th{_alignment(column)}>{column}</th>" for column in _COLUMNS)
    rows = "\n".join(_row(name, shown) for name, shown in known.items())
    states = {str(shown["state"]) for shown in known.values()}
    legend = "; ".join(f"<b>{s}</b>: {why}" for s, why in _STATES.items() if s in states)
    again = f'<meta http-equiv="refresh" content="{_EVERY}">\n' if live else ""
    chip = '<span class="chip">running</span>' if live else '<span class="chip">ended</span>'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Clients of {escape(run)} · flexmoe_jax</title>\n"
        f"<style>\n{_STYLE_SHEET.read_text('utf-8')}</style>\n</head>\n<body>\n<main>\n"
        f'<p class="eyebrow">Real clients</p><h1>{escape(run)}{chip}</h1>\n'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>'
        f'</table></div>\n<p class="lead">{legend}. What a client is <b>asked</b> for is the '
        "training of a round, or figures of its model; <b>late</b>: how often a round went on "
        "without its answer, to either; <b>refused</b>: answers that cannot be, with the latest "
        "reason; <b>seconds</b>: from asking to its latest answer. All counts are since the server "
        "was last started.</p>\n</main>\n</body>\n</html>\n"
    )


def _row(name: str, shown: Mapping[str, object]) -> str:
    cells = "".join(
        f"<td{_alignment(column)}>{_cell(column, shown[column])}</td>" for column in _COLUMNS[1:]
    )
    why = f"<br><small>{escape(shown['why'])}</small>" if shown["why"] else ""
    return f"<tr><th>{escape(name)}{why}</th>{cells}</tr>"


def _cell(column: str, value: object) -> str:
    return f"{value:.1f}" if column == "seconds" and value else escape(value or "\N{EN DASH}")


def _alignment(column: str) -> str:
    return "" if column in ("client", "state") else ' class="n"'
