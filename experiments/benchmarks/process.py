"""Runs benchmark cases in separate processes, and measures memory."""

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
    """Runs one case of a suite in a new process, so that its memory is measured separately.

    Args:
      suite: name of the suite.
      *words: words that name the case.
      **environment: environment variables to set for the process.
    """
    command = [sys.executable, "-m", "experiments.bench", suite, *map(str, words)]
    ended = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    figures: Figures = json.loads(ended.stdout)
    return figures


def peak_bytes() -> int:
    """Returns the peak resident memory of this process, or of a child if that is larger."""
    # Linux reports kilobytes, macOS bytes.
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return peak if sys.platform == "darwin" else 1024 * peak


def refuse_words(suite: str, words: list[str]) -> None:
    """Rejects words after the name of a suite that takes none.

    Raises:
      InputError: words are given.
    """
    if words:
        raise InputError(suite, " ".join(words), "this suite takes no further words")
