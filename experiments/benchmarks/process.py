"""Cases in processes of their own, and what a process may need."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

from flexmoe_jax.errors import InputError

Figures = dict[str, Any]


def run_case(suite: str, *words: object, **environment: str) -> Figures:
    """Runs one case of a suite in a new process, so that its memory is its own.

    Args:
      suite: that has the case.
      *words: that name it.
      **environment: variables to set for the process.
    """
    command = [sys.executable, "-m", "experiments.bench", suite, *map(str, words)]
    ended = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    figures: Figures = json.loads(ended.stdout)
    return figures


def peak_bytes() -> int:
    """Most memory that this process, or one that it started, has had resident."""
    # Linux counts kilobytes, macOS bytes.
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return peak if sys.platform == "darwin" else 1024 * peak


def refuse_words(suite: str, words: list[str]) -> None:
    """Refuses words after the name of a suite that takes none.

    Raises:
      InputError: there are some.
    """
    if words:
        raise InputError(suite, " ".join(words), "this suite takes no further words")
