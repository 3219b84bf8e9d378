"""The launchers of real clients as processes, over Flower on loopback."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import deploy_local
from experiments.deploying.certificates import make_certificates
from experiments.deploying.flower import require_free
from experiments.export import export
from flexmoe_jax.errors import InputError

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


def processes(folder: Path) -> list[tuple[int, str]]:
    """Returns the id and the words of each process that names a folder."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True
    )
    found = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
    return [(int(pid), words) for pid, words in found if str(folder) in words]


def test_a_server_and_clients_train_over_flower_and_leave_nothing_behind(tmp_path):
    """The flags are given in every form; the server gets all of them."""
    (tmp_path / "run").mkdir()
    fields = tmp_path / "fields.txt"
    fields.write_text("".join(f"--config.{field}\n" for field in SMALL))
    done = launch(
        *("experiments.deploy_local", "--config", str(DIGITS), "--clients", "2", "--workdir=."),
        *("--noreport", f"--flagfile={fields}", "--noconfig.edge.cache"),
        cwd=tmp_path / "run",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["edge"]["cache"], config["model"]["experts"]) == (False, 4)
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
    with np.load(tmp_path / "run" / "arrays.npz") as arrays:
        assert arrays["ids"].tolist() == ["client_0", "client_1"]
    assert processes(tmp_path) == []
    # Models are exported as those of a simulation, but a real client knows its label shares itself.
    for what in ("assembled", "client:1"):
        notes = export(tmp_path / "run", what, tmp_path / what)
        assert any("eval.prior" in note for note in notes) == (what == "client:1")
        described = json.loads((tmp_path / what / "model.json").read_text())
        assert described["round"] == 2
        assert "prior" not in described


CLIENT = """
import os, pathlib, signal, sys
starts = pathlib.Path(sys.argv[1])
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if len(starts.read_text()) <= int(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.read()
"""
SERVER = """
import pathlib, select, sys
starts = pathlib.Path(sys.argv[1])
while not (starts.exists() and len(starts.read_text()) > int(sys.argv[2])):
    if select.select([sys.stdin], [], [], 0.05)[0]:
        sys.exit(1)
"""


@pytest.mark.parametrize(("kills", "again", "code"), [(2, 2, 0), (3, 2, 1)])
def test_a_client_that_a_signal_kills_is_started_again(
    kills, again, code, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(deploy_local, "_STARTS_AGAIN", again)
    (tmp_path / "client.py").write_text(CLIENT)
    (tmp_path / "server.py").write_text(SERVER)
    starts = str(tmp_path / "starts")
    server, client = ["server", starts, str(kills)], ["client", starts, str(kills)]
    assert deploy_local._run(server, {"anna": client}, tmp_path) == code
    said = capsys.readouterr().err
    assert said.count("anna: killed by signal 9; started again") == again
    assert ("anna: ended before the server" in said) == (code == 1)


def test_only_its_owner_may_read_a_new_private_key(tmp_path):
    key = tmp_path / "server.key"
    key.write_text("of last year")
    key.chmod(0o644)
    make_certificates(tmp_path, "127.0.0.1")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text().startswith("-----BEGIN PRIVATE KEY-----")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_is_free_until_it_is_used(host, monkeypatch):
    monkeypatch.setattr("experiments.deploying.flower._PORT_PATIENCE", 0.0)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as other:
        try:
            other.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        port = other.getsockname()[1]
        other.listen()
        with pytest.raises(InputError, match=f"--port={port}: cannot be had at {host}"):
            require_free(host, port)
    require_free(host, port)


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
