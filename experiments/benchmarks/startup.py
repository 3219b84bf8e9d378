"""Suite `startup`: time from launch to the first round of the main example, configs/digits.py.

One line per launch, each in its own process and with one round: seconds until the first line of
metrics.jsonl, seconds until the process ends, and bytes of compiled programs on disk afterwards.
The first launch finds no compiled programs; the others find those of the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.benchmarks.process import Figures, refuse_words

_LAUNCHES = 3
_POLL_SECONDS = 0.02


def run(words: list[str]) -> Iterator[Figures]:
    """Yields the figures of each launch.

    Raises:
      InputError: words are given.
    """
    refuse_words("startup", words)
    with tempfile.TemporaryDirectory() as programs:
        for launch in range(_LAUNCHES):
            yield measure(Path(programs)) | {"launch": launch + 1}


def measure(programs: Path, *overrides: str) -> Figures:
    """Trains for one round, as a user would.

    Args:
      programs: folder of compiled programs; it is read and filled.
      overrides: overrides of the config, as on the command line.
    """
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [
            *(sys.executable, "-m", "experiments.train"),
            *("--config=experiments/configs/digits.py", f"--workdir={workdir}"),
            *("--config.rounds=1", *overrides),
        ]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(programs)}
        begin = time.monotonic()
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            while not _has_line(workdir / "metrics.jsonl") and process.poll() is None:
                time.sleep(_POLL_SECONDS)
            first = time.monotonic() - begin
            code = process.wait()
            ended = time.monotonic() - begin
    if code:
        raise subprocess.CalledProcessError(code, command)
    return {
        "suite": "startup",
        "seconds_to_first_round": first,
        "seconds": ended,
        "program_bytes": sum(file.stat().st_size for file in programs.rglob("*")),
    }


def _has_line(path: Path) -> bool:
    return path.exists() and b"\n" in path.read_bytes()
