"""The launchers of real clients as processes, over Flower on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "experiments" / "configs" / "digits.py"
SMALL = (
    *("data.train_limit=150", "data.test_limit=60", "model.backbone=mlp", "model.experts=4"),
    *("model.hidden=16", "clients.capacity=2", "local.max_steps=2", "rounds=2", "eval.every=2"),
)


def launch(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_server_and_clients_train_over_flower_and_leave_nothing_behind(tmp_path):
    fields = [f"--config.{field}" for field in SMALL]
    done = launch(
        *("experiments.deploy_local", f"--config={DIGITS}", "--clients=2", "--workdir=run"),
        *("--noreport", *fields),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["round"] for row in rows] == [1, 2]
    assert [row["clients/delivered"] for row in rows] == [2, 2]
    assert rows[-1]["eval/personal_clients"] == 2
    standing = json.loads((tmp_path / "run" / "clients.json").read_text())
    # Trained twice, judged once.
    assert {name: one["answered"] for name, one in standing.items()} == {
        "client_0": 3,
        "client_1": 3,
    }
    assert (tmp_path / "run-clients" / "client_0").is_dir()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in left


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["serve", f"--config={DIGITS}", "--workdir=run", "--host=0.0.0.0"],
            "--host=0.0.0.0: is reached from other machines: give --certificates=DIR and",
        ),
        (
            ["serve", f"--config={DIGITS}", "--workdir=run", "--config.edge.deadline=3.0"],
            "edge.deadline=3.0: is played in simulations alone",
        ),
        (
            ["serve", f"--config={DIGITS}", "--workdir=run", "--certificates=no"],
            "--certificates=no",
        ),
        (["join", "--server=127.0.0.1:1", "--data=x.npz"], "--name=None: is needed"),
        (["join", "--server=here", "--name=a", "--data=x.npz"], "--server=here: give HOST:PORT"),
        (["join", "--server=h:1", "--name=a", "--data=x.npz"], "--data=x.npz: cannot be read"),
        (["join", "--server=h:1", "--name=a/b", "--data=x.npz"], "--name=a/b: use letters"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(words, line, tmp_path):
    launcher, *flags = words
    done = launch(f"experiments.{launcher}", *flags, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert line in done.stderr
    assert not (tmp_path / "run").exists()
