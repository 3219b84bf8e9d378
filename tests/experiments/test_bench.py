from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_case_prints_one_json_object():
    process = bench("assignment", "relaxation", "30", "4", "samples")
    assert process.returncode == 0, process.stderr
    [line] = process.stdout.splitlines()
    figures = json.loads(line)
    assert figures["clients"] == 30
    assert figures["experts"] == 4
    assert 0 <= figures["gap_worst"] < 1
    assert figures["peak_bytes"] > 0


def test_an_unknown_suite_is_refused_in_one_line():
    process = bench("assignmnt")
    assert process.returncode == 2
    assert process.stderr.splitlines() == ["suite=assignmnt: give one of assignment"]
