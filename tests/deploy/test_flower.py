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
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from experiments import deploy_local
from experiments.deploying.certificates import make_certificates
from experiments.deploying.credentials import (
    read_private_key,
    read_public_keys,
    read_root,
    read_tls,
)
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
    # Models are exported as those of a simulation, with the label shares that clients have told.
    notes = export(tmp_path / "run", "client:client_1", tmp_path / "exported")
    assert not any("eval.prior" in note for note in notes)
    described = json.loads((tmp_path / "exported" / "model.json").read_text())
    assert described["round"] == 2
    with np.load(tmp_path / "run-clients" / "client_1.npz") as own:
        found, counts = np.unique(own["train_labels"], return_counts=True)
    shares = np.exp(described["prior"]["log_label_share"])[[int(name) for name in found]]
    np.testing.assert_allclose(shares, counts / counts.sum(), atol=0.01)  # They are smoothed.


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
    assert deploy_local._run(server, lambda process: {"anna": client}, tmp_path) == code
    said = capsys.readouterr().err
    assert said.count("anna: killed by signal 9; started again") == again
    assert ("anna: ended before the server" in said) == (code == 1)


def test_only_its_owner_may_read_a_private_key_which_nothing_overwrites(tmp_path):
    make_certificates(tmp_path, "127.0.0.1")
    key = tmp_path / "server.key"
    content = key.read_text()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert content.startswith("-----BEGIN PRIVATE KEY-----")
    with pytest.raises(InputError, match=r"ca.crt: is there already"):
        make_certificates(tmp_path, "127.0.0.1")
    assert key.read_text() == content


def test_certificates_are_refused_where_clients_would_refuse_them(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    make_certificates(one, "fed.example.org")
    make_certificates(other, "192.0.2.7")
    for host in ("fed.example.org", "localhost", "127.0.0.1"):
        assert read_tls(one, host).key == one / "server.key"
    with pytest.raises(InputError, match=r"server.pem: .*refuse 192.0.2.8 by it: IP address mism"):
        read_tls(other, "192.0.2.8")
    (one / "ca.crt").write_bytes((other / "ca.crt").read_bytes())
    with pytest.raises(InputError, match=r"server.pem: clients that trust ca.crt refuse.*by it"):
        read_tls(one, "localhost")
    (one / "server.key").write_bytes((other / "server.key").read_bytes())
    with pytest.raises(InputError, match=r"server.pem: does not go with server.key.*mismatch"):
        read_tls(one, "localhost")
    (one / "ca.crt").write_text("no certificate")
    with pytest.raises(InputError, match=r"--certificate=.*ca.crt: is no certificate"):
        read_root(one / "ca.crt")


@pytest.mark.parametrize("host", ["", "a b", "bücher.example", "-a.example", "a" * 64, "x/y"])
def test_a_host_that_can_have_no_certificate_is_refused(host, tmp_path):
    with pytest.raises(InputError, match=r"--host=.*give a host's name"):
        make_certificates(tmp_path / "keys", host)
    assert not (tmp_path / "keys").exists()


def test_only_keys_that_flower_takes_are_accepted(tmp_path):
    for name, key in (
        ("good", ec.generate_private_key(ec.SECP384R1())),
        ("bad", ed25519.Ed25519PrivateKey.generate()),
    ):
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        (tmp_path / name).write_bytes(private)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (tmp_path / f"{name}.pub").write_bytes(public)
    assert read_private_key(tmp_path / "good") == tmp_path / "good"
    for name, why in (("bad", "is not of type ecdsa"), ("good.pub", "is no such key")):
        with pytest.raises(InputError, match=f"--key=.*{name}: {why}.*ssh-keygen"):
            read_private_key(tmp_path / name)
    with pytest.raises(InputError, match=r"--client_keys=.*bad.pub: is not of type ecdsa"):
        read_public_keys(tmp_path)
    (tmp_path / "bad.pub").unlink()
    assert read_public_keys(tmp_path) == [tmp_path / "good.pub"]


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
        (
            ["deploy_local", f"--config={DIGITS}", "--workdir=run", "--config.model.top_k=9"],
            "model.top_k=9",
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
    assert not any(tmp_path.iterdir())
