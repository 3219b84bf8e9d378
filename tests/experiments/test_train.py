"""The launcher, run as its users run it: as a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.configs import digits
from experiments.workdir import Workdir, as_json
from flexmoe_jax.errors import InputError
from tests.limits import HANGS

ROOT = Path(__file__).parents[2]
SMALL = (
    "--config.rounds=4",
    "--config.clients.count=8",
    "--config.clients.per_round=4",
    "--config.clients.capacity=1-3",
    "--config.model.backbone=mlp",
    "--config.model.experts=4",
    "--config.data.train_limit=300",
    "--config.data.test_limit=100",
    "--config.eval.every=2",
    "--config.checkpoint.every=1",
)
KEYS = {
    "round",
    "train/loss",
    "load/assigned_cv",
    "load/assigned_cv_cumulative",
    "load/usage_cv",
    "load/usage_cv_cumulative",
    "load/assigned",
    "load/usage",
    "assignment/gap",
    "assignment/solve_seconds",
    "assignment/status",
    "clients/asked",
    "clients/delivered",
    "clients/quarantined",
    "comm/bytes_cached",
    "comm/bytes_down",
    "comm/bytes_up",
    "time/round_seconds",
    "time/run_seconds",
    "time/train_examples_per_second",
}
EVALUATION = {
    "eval/global_accuracy",
    "eval/personal_accuracy",
    "eval/personal_clients",
    "eval/server_accuracy",
    "eval/clients",
    "eval/personal_accuracy_p10",
    "eval/personal_loss",
    "eval/global_loss",
    "eval/server_loss",
    "eval/assembled_accuracy",
    "eval/assembled_loss",
}


def command(
    *arguments: str, config: str = "experiments/configs/digits.py", report: bool = False
) -> list[str]:
    words = [sys.executable, "-m", "experiments.train", f"--config={config}", *arguments]
    return words if report else [*words, "--noreport"]


def launch(
    *arguments: str, env: Mapping[str, str] | None = None, **options
) -> subprocess.CompletedProcess[str]:
    words = command(*arguments, **options)
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANGS)


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(workdir: Path) -> list[dict]:
    """Returns the recorded rounds without measured times."""
    return [
        {key: value for key, value in row.items() if "time/" not in key and "seconds" not in key}
        for row in rows(workdir)
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    workdir = tmp_path_factory.mktemp("runs") / "small"
    return workdir, launch(f"--workdir={workdir}", *SMALL, report=True)


def test_a_run_leaves_what_it_promises(finished):
    workdir, process = finished
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert "finished" in process.stdout
    metrics = rows(workdir)
    assert [row["round"] for row in metrics] == [1, 2, 3, 4]
    for row in metrics:
        expected = KEYS | EVALUATION if row["round"] % 2 == 0 else KEYS
        assert row.keys() == expected
        assert sum(row["load/assigned"]) > 0
        assert len(row["load/usage"]) == 4
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["rounds"] == 4
    assert summary["final/train/loss"] == metrics[-1]["train/loss"]
    accuracies = [row["eval/server_accuracy"] for row in metrics if "eval/clients" in row]
    assert summary["best/eval/server_accuracy"] == max(accuracies)
    assert {"flexmoe_jax", "jax", "cvxpy"} <= summary["versions"].keys()
    assert json.loads((workdir / "config.json").read_text())["clients"]["capacity"] == "1-3"
    assert list((workdir / "checkpoints").iterdir())
    assert "<html" in (workdir / "report" / "index.html").read_text()


def test_the_arrays_agree_with_the_metrics(finished):
    workdir, _ = finished
    arrays = np.load(workdir / "arrays.npz")
    assert len(arrays["label_counts"]) == 8
    assert arrays["label_counts"].sum() == 300
    assert np.allclose(
        arrays["usage"].sum(axis=0), np.sum([r["load/usage"] for r in rows(workdir)], 0)
    )
    assert (arrays["held_rounds"].sum(axis=1) % arrays["capacity"] == 0).all()
    rounds = arrays["held_rounds"].sum(axis=1) / arrays["capacity"]
    assert rounds.sum() == sum(r["clients/delivered"] for r in rows(workdir))
    assert (arrays["holds"].sum(axis=1) <= arrays["capacity"]).all()
    assert sorted(arrays["capacity"]) == [1, 1, 1, 2, 2, 2, 3, 3]


def test_the_same_seed_gives_the_same_metrics_wherever_the_examples_stay(finished, tmp_path):
    workdir, _ = finished
    again = tmp_path / "again"
    other = ("--config.execution.data=host", "--config.tensorboard=true")
    assert launch(f"--workdir={again}", *SMALL, *other).returncode == 0
    assert timeless(again) == timeless(workdir)
    events = list((again / "tensorboard").iterdir())
    assert events[0].stat().st_size > 1000


def test_a_second_launch_finds_its_programs_and_gives_the_same_metrics(tmp_path):
    """With a folder of programs of its own, so that both cases occur."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    words = *SMALL, "--config.rounds=2", "--config.assignment.policy=random"
    for number in (1, 2):
        process = launch(f"--workdir={tmp_path / str(number)}", *words, env=environment)
        assert process.returncode == 0, process.stderr
        kept = {
            file.name.split("-")[0]: file.stat().st_mtime_ns
            for file in (tmp_path / "programs" / "launched").iterdir()
        }
        assert set(kept) == {"init", "round", "evaluate"}
        if number == 1:
            first = kept
    assert all(first[name] < kept[name] for name in kept)
    assert timeless(tmp_path / "1") == timeless(tmp_path / "2")


def test_ctrl_c_keeps_what_was_reached_and_a_restart_goes_on(finished, tmp_path):
    workdir, _ = finished
    stopped = tmp_path / "stopped"
    arguments = (f"--workdir={stopped}", *SMALL)
    # Its own group, so that the signal reaches it alone, as from a terminal.
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + HANGS
    metrics = stopped / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=HANGS)
    reached = len(rows(stopped))
    assert 1 <= reached <= 4
    status = json.loads((stopped / "summary.json").read_text())["status"]
    assert status == ("finished" if reached == 4 else "interrupted")
    assert process.returncode == (0 if reached == 4 else 128 + signal.SIGINT)
    assert status in output
    assert launch(*arguments).returncode == 0
    assert timeless(stopped) == timeless(workdir)
    assert json.loads((stopped / "summary.json").read_text())["status"] == "finished"


def test_a_diverging_run_names_round_and_learning_rate(tmp_path):
    workdir = tmp_path / "diverged"
    process = launch(f"--workdir={workdir}", *SMALL, "--config.local.learning_rate=1e30")
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "round 1: every update is not a number" in process.stdout
    assert "local.learning_rate=1e+30" in process.stdout
    assert json.loads((workdir / "summary.json").read_text())["status"] == "diverged"


BAD = {
    "--config.ronds=3": "config.ronds: no such field; did you mean config.rounds?",
    "--config.local.learning_rat=1": "did you mean config.local.learning_rate?",
    "--config.rounds=1.5": "config.rounds=1.5: give a whole number",
    "--config.data.download=maybe": "config.data.download=maybe: give true or false",
    "--config.data=3": "config.data=3: is a group of fields",
    "--rounds=3": "--rounds: no such flag; did you mean --config.rounds?",
    "--config.execution.data=disk": "execution.data=disk: choose one of auto, device, host",
    "--config.assignment.solver=paths": "assignment.solver=paths: takes no weights that differ",
    "--config.model.private=gate": "model.private=gate: is of a MoE layer",
    "--config.clients.capacity=9": "clients.capacity=9: choose 1 to model.experts=8",
    "--config.data.name=cifar10 --config.data.dir=/no/such/folder": "data.dir=/no/such/folder",
    "--config.data.name=missing.npz": "data.name=missing.npz: there is no such file\n",
    "--config.edge.mix=car --config.edge.tiers=no.toml": "edge.tiers=no.toml: give a TOML file",
    "stray": "argument=stray",
}


def test_bad_input_ends_in_one_line_and_exit_code_2(tmp_path):
    def refuse(item: tuple[str, str]) -> None:
        arguments, line = item
        workdir = tmp_path / "refused"
        process = launch(f"--workdir={workdir}", *arguments.split())
        assert process.returncode == 2, process.stderr
        assert process.stdout == ""
        assert len(process.stderr.splitlines()) == 1
        assert line in process.stderr
        assert not workdir.exists()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(refuse, BAD.items()))


def test_a_config_that_is_none_is_refused(tmp_path):
    for path, line in (
        ("no/such/file.py", "no such file"),
        ("experiments/fields.py", "does not define get_config()"),
    ):
        process = launch(f"--workdir={tmp_path / 'refused'}", config=path)
        assert process.returncode == 2
        assert process.stderr.startswith(f"--config={path}: {line}")
        assert len(process.stderr.splitlines()) == 1


def test_a_finished_run_is_not_done_twice(finished):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    process = launch(f"--workdir={workdir}", *SMALL)
    assert process.returncode == 0
    assert "all rounds are done" in process.stdout
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_finished_run_is_moved_and_goes_on_elsewhere_for_more_rounds(finished, tmp_path):
    workdir, _ = finished
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved)
    elsewhere = (
        "--config.rounds=6",
        "--config.data.dir=/elsewhere",
        "--config.execution.data=host",
        "--config.execution.devices=1",
        "--config.eval.batch_size=50",
        "--config.checkpoint.every=3",
        "--config.tensorboard=true",
    )
    process = launch(f"--workdir={moved}", *SMALL, *elsewhere)
    assert process.returncode == 0, process.stderr
    assert "continuing after round 4 of 6" in process.stdout
    assert [row["round"] for row in rows(moved)] == [1, 2, 3, 4, 5, 6]
    # Those that were there stay, down to their times.
    assert rows(moved)[:4] == rows(workdir)
    summary = json.loads((moved / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("finished", 6)
    config = json.loads((moved / "config.json").read_text())
    assert (config["rounds"], config["data"]["dir"]) == (6, "/elsewhere")


def make_workdir(path: Path, done: int, **changes: object) -> Workdir:
    """The folder of a run of 20 rounds."""
    workdir = Workdir(path)
    workdir.open(changed(rounds=20, **changes))
    for number in range(done):
        workdir.append({"round": number + 1})
    workdir.write_summary(
        {"status": "finished" if done == 20 else "interrupted", "rounds": done, "seconds": 7.0}
    )
    return workdir


def changed(**changes: object) -> ConfigDict:
    config = digits.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"rounds": 21}, ""),
        ({"rounds": 13}, ""),
        ({"rounds": 12}, "with rounds=20, not 12, and 12 are done; choose"),
        ({"rounds": 20, "local__epochs": 9}, "with local.epochs=.*, not 9; choose"),
        ({"rounds": 21, "data__name": "mnist"}, "with data.name=digits, not mnist; choose"),
        ({"rounds": 20, "execution__tile": 4, "checkpoint__keep": 9, "tensorboard": True}, ""),
        ({"rounds": 20, "data__dir": "/d", "data__download": True, "eval__batch_size": 9}, ""),
        ({"rounds": 20, "eval__every": 7}, "with eval.every=1, not 7; choose"),
    ],
)
def test_what_a_run_may_go_on_with(tmp_path, changes, refused):
    workdir = make_workdir(tmp_path / "run", done=12)
    if refused:
        with pytest.raises(InputError, match=refused):
            workdir.check(changed(**changes))
    else:
        workdir.check(changed(**changes))


def test_a_schedule_over_all_rounds_keeps_their_number(tmp_path):
    workdir = make_workdir(tmp_path / "run", done=12, local__decay="cosine")
    workdir.check(changed(rounds=20, local__decay="cosine", execution__tile=4))
    line = r"rounds=20, not 21, and its learning rate falls over them all \(local.decay=cosine\)"
    with pytest.raises(InputError, match=line):
        workdir.check(changed(rounds=21, local__decay="cosine"))


def test_a_config_without_a_newer_field_is_another_one(tmp_path):
    workdir = make_workdir(tmp_path / "run", done=12)
    older = as_json(changed(rounds=20))
    del older["execution"]["tile"]
    (workdir.path / "config.json").write_text(json.dumps(older))
    workdir.check(changed(rounds=20))
    del older["local"]["proximal"]
    (workdir.path / "config.json").write_text(json.dumps(older))
    with pytest.raises(InputError, match=r"with local.proximal=None, not 0.0"):
        workdir.check(changed(rounds=20))


def test_a_run_that_is_given_more_rounds_is_finished_no_more(tmp_path):
    workdir = make_workdir(tmp_path / "run", done=20)
    summary = workdir.path / "summary.json"
    workdir.open(changed(rounds=20, execution__tile=4))
    assert json.loads(summary.read_text())["status"] == "finished"
    workdir.open(changed(rounds=30))
    assert json.loads(summary.read_text()) == {"status": "unfinished", "seconds": 7.0}


def test_another_experiments_workdir_is_refused(finished, tmp_path):
    workdir, _ = finished
    before = timeless(workdir)
    process = launch(f"--workdir={workdir}", *SMALL, "--config.seed=1")
    assert process.returncode == 2
    assert f"workdir={workdir}: holds a run with seed=0, not 1" in process.stderr
    assert timeless(workdir) == before
    (tmp_path / "notes.txt").write_text("mine")
    process = launch(f"--workdir={tmp_path}", *SMALL)
    assert process.returncode == 2
    assert "holds files but no run" in process.stderr
