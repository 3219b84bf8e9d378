"""Writes the clients' status to a web page and a JSON file, updated while a run goes on."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.reporting.fill import fill
from experiments.workdir import write_atomically
from flexmoe_jax.deploy import Facts, Post

_LOG = logging.getLogger(__name__)
FILE, PAGE = "clients.json", "clients.html"
# Seconds between two updates, here and in a browser.
_EVERY = 2
_STATES = {
    "asked": "was asked, and has not answered yet",
    "ready": "waits to be asked",
    "joining": "is there, and is being told about the federation",
    "away": "is not there",
    "out": "cannot take part as it is",
}


class Dashboard:
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
    there = {shown["state"] for shown in known.values()}
    return fill(
        "clients.html",
        title=f"Clients of {run}",
        run=run,
        clients=known,
        states={state: meaning for state, meaning in _STATES.items() if state in there},
        seconds=_EVERY if live else 0,
    )
