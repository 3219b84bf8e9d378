"""Sweeps, run as their users run them wherever a process matters."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from experiments.cli import flat_fields
from experiments.configs import digits
from experiments.locks import lock
from experiments.studying import local, slurm
from experiments.studying.launch import command
from experiments.studying.local import Sweep, log_of
from experiments.studying.status import OTHER, UNKNOWN, cost, read_status, write_record
from experiments.studying.study import Study, Trial, read_study
from experiments.table import write_tables
from experiments.workdir import Workdir, as_json
from flexmoe_jax.errors import InputError
from tests.experiments.test_program import STEP
from tests.experiments.test_train import ROOT, timeless
from tests.limits import HANGS

STUDIES = sorted(
    path
    for path in (ROOT / "experiments" / "studies").glob("*.py")
    if "def get_study" in path.read_text()
)
# `broken` is a config that the sweep cannot know to be wrong, and a run refuses at once.
TINY = """
from experiments.configs import digits
from experiments.locks import lock
from experiments.studying.study import Study

def get_study():
    tiny = {"rounds": 16, "assignment.diversity": 0.0, "clients.count": 6, "clients.capacity": 2,
            "model.backbone": "mlp", "model.experts": 4, "data.train_limit": 300,
            "data.test_limit": 100, "eval.every": 4, "checkpoint.every": 4}
    return Study(
        name="tiny",
        config=digits.get_config,
        methods={"flex": {}, "broken": {"clients.capacity": 9}},
        datasets={"digits": tiny},
        partitions={"iid": {"partition.name": "iid"}},
        seeds=(0,),
    )
"""


def make_study(**changes: object) -> Study:
    return Study(
        **{
            "name": "small",
            "config": digits.get_config,
            "methods": {"flex": {}, "random": {"assignment.policy": "random"}},
            "datasets": {"digits": {"data.name": "digits"}},
            "partitions": {"k_class_4": {"partition.name": "k_class"}},
            "seeds": (0, 1),
            **changes,
        }
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def finish(folder: Path, config: ConfigDict, status: str = "finished") -> None:
    """Writes those files of a finished run that a sweep reads."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(as_json(config)))
    row = {"round": 1, "eval/global_accuracy": 0.5, "comm/bytes_up": 1, "comm/bytes_down": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "summary.json").write_text(json.dumps({"status": status, "seconds": 20.0}))


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Waits until the file is not empty."""
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_run_is_named_by_what_it_is():
    study = make_study(variants={"capacity": {"1-4": {"clients.capacity": "1-4"}}})
    first, *_, last = study.trials()
    assert first.name == "digits/k_class_4/capacity_1-4/flex/seed_0"
    assert last.name == "digits/k_class_4/capacity_1-4/random/seed_1"
    assert len({trial.name for trial in study.trials()}) == 4
    # The first seed of everything comes before the second of anything.
    assert [trial.seed for trial in study.trials()] == [0, 0, 1, 1]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_command_gives_the_config_that_the_study_asks_for(path, monkeypatch):
    study = read_study(path)
    trials = study.trials()
    # All methods once, and the last of everything.
    every = trials[: len(study.methods)] if path.stem == "paper_small" else trials[:1]
    for trial in [*every, trials[-1]]:
        words = command(study, trial, Path("runs"))[3:]
        monkeypatch.setattr(sys, "argv", ["train", *words])
        known = flags.FlagValues()
        flags.DEFINE_string("workdir", None, "", flag_values=known)
        config_flags.DEFINE_config_file("config", flag_values=known)
        known(sys.argv)
        assert as_json(known.config) == as_json(study.config_of(trial))
        assert known.workdir == f"runs/{trial.name}"
        # What the study says of a run is what the run's config.json will say.
        assert flat_fields(ConfigDict(as_json(known.config))) == study.fields_of(trial)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"methods": {}}, "methods={}: give at least one"),
        ({"datasets": {"a/b": {}}}, "datasets=a/b: names folders"),
        ({"variants": {"..": {"1": {}}}}, "variants=..: names folders"),
        ({"seeds": (0, 0)}, "seeds=.*: name each once"),
        ({"reference": "fedavg"}, "reference=fedavg: choose one of flex, random"),
    ],
)
def test_a_study_that_gives_no_folders_is_refused(changes, line):
    with pytest.raises(InputError, match=line):
        make_study(**changes)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ({"assignment.polisy": "flex"}, "no such field; did you mean assignment.policy"),
        ({"rounds": "many"}, "rounds=many: does not fit this field, which is of type int"),
        ({"local": 3}, "local=3: no such field"),
    ],
)
def test_overrides_that_cannot_work_are_refused(override, line):
    study = make_study(methods={"flex": override})
    with pytest.raises(InputError, match=line):
        study.config_of(study.trials()[0])


def test_files_that_hold_no_study_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_study(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="does not define get_study"):
        read_study(tmp_path / "empty.py")


@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from(["*", "*/flex/*"]))
def test_shares_are_disjoint_and_complete(count, seeds, only):
    trials = make_study(seeds=range(seeds)).trials()
    shares = [local.share(trials, only, index, count) for index in range(count)]
    names = sorted(trial.name for share in shares for trial in share)
    assert names == sorted(t.name for t in trials if only == "*" or t.method == "flex")
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"index": 2, "count": 2}, "--index=2: give 0 to 1"),
        ({"count": 0}, "--count=0: choose 1 or more"),
        ({"only": "*/fedavg/*"}, "matches no run; one is digits/iid/flex/seed_0"),
        ({"workdir": ""}, "--workdir=: name a folder"),
    ],
)
def test_shares_that_cannot_be(tiny, changes, line):
    with pytest.raises(InputError, match=line):
        Sweep(**{"study": str(tiny), "workdir": "runs", **changes}).load()


def test_what_is_left_is_reckoned_from_what_was_done():
    left = [Trial(data, "iid", (), "flex", 0) for data in ("digits", "digits", "cifar10")]
    assert cost(left, {"digits": [10.0, 30.0]}) == (40.0, 1)
    assert cost(left, {}) == (0.0, 3)


def test_a_dry_run_lists_and_touches_nothing(tiny, tmp_path, capsys):
    more = '"flex": {}, "more": {"local.epochs": 3}'
    tiny.write_text(tiny.read_text().replace('"flex": {}', more))
    study = read_study(tiny)
    runs = tmp_path / "runs"
    flex, more, broken = study.trials()
    finish(runs / flex.name, study.config_of(flex))
    assert local.dry_run(Sweep(str(tiny), str(runs), data_dir="/some where")) == 2
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first == f"finished: {flex.name}"
    words = shlex.split(second.removeprefix("new: "))
    assert words[:3] == ["python", "-m", "experiments.train"]
    assert f"--workdir={runs / more.name}" in words
    assert "--config.data.dir=/some where" in words
    line = "clients.capacity=9: choose 1 to model.experts=4"
    assert third == f"refused: {broken.name}: {line}"
    assert last == "1 run done, 2 left, about 40\N{NO-BREAK SPACE}s"
    assert not (runs / "study.json").exists()


def test_a_run_and_a_study_share_no_folder(tiny, tmp_path):
    study = read_study(tiny)
    config = study.config_of(study.trials()[0])
    finish(tmp_path / "run", config)
    (tmp_path / "run" / "report").mkdir()
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(InputError, match=r"--workdir=.*run: holds a run \(config.json\)"):
        local.run(Sweep(str(tiny), str(tmp_path / "run")))
    assert sorted((tmp_path / "run").rglob("*")) == before
    write_record(study, tmp_path / "study")
    with pytest.raises(InputError, match=r"workdir=.*study: holds a study \(study.json\)"):
        Workdir(tmp_path / "study").check(config)


def test_a_value_out_of_range_is_refused_before_any_run(tiny, tmp_path):
    tiny.write_text(tiny.read_text().replace('"clients.capacity": 9', '"model.experts": 0'))
    line = r"model\.experts=0: choose 1 or more \(run digits/iid/broken/seed_0\)"
    sweep = Sweep(str(tiny), str(tmp_path / "runs"))
    for act in (local.dry_run, local.run):
        with pytest.raises(InputError, match=line):
            act(sweep)
    assert not (tmp_path / "runs").exists()


def test_what_is_done_is_skipped_and_what_another_sweep_is_at_is_left_to_it(tiny, tmp_path, capsys):
    study = read_study(tiny)
    runs = tmp_path / "runs"
    flex, broken = study.trials()
    finish(runs / flex.name, study.config_of(flex))
    with lock(log_of(runs / broken.name)) as held:
        assert held is not None
        assert local.run(Sweep(str(tiny), str(runs))) == 0
    out = capsys.readouterr().out
    assert "1 run not done yet: another sweep is at work there" in out
    assert not (runs / broken.name).exists()
    assert (runs / "table.md").exists()
    assert "tiny" in (runs / "report" / "index.html").read_text()


def test_a_folder_of_another_config_or_a_run_that_diverged_fails_in_one_line(
    tiny, tmp_path, capsys
):
    study = read_study(tiny)
    runs = tmp_path / "runs"
    flex, broken = study.trials()
    other = study.config_of(flex)
    other.local.epochs = 7
    finish(runs / flex.name, other)
    finish(runs / broken.name, study.config_of(broken), status="diverged")
    assert local.run(Sweep(str(tiny), str(runs))) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
    assert len(failed) == 2
    assert "holds a run with local.epochs=7, not 2" in failed[0]
    assert "diverged, see" in failed[1]


def test_an_edited_study_does_not_take_old_runs_for_its_own(tiny, tmp_path, capsys):
    runs = tmp_path / "runs"
    study = read_study(tiny)
    for trial in study.trials():
        finish(runs / trial.name, study.config_of(trial))
    # Where a run's data lie, and on what it ran, is no part of what the study asks for.
    assert local.run(Sweep(str(tiny), str(runs), data_dir="/elsewhere")) == 0
    assert "2 runs done, 0 left" in capsys.readouterr().out
    assert "All 2 runs are finished." in (runs / "table.md").read_text()

    tiny.write_text(TINY.replace('"eval.every": 4', '"eval.every": 8'))
    local.dry_run(Sweep(str(tiny), str(runs)))
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("other config: python -m experiments.train ")
    assert last == "0 runs done, 2 left, time unknown"
    assert local.run(Sweep(str(tiny), str(runs))) == 1
    out = capsys.readouterr().out
    assert "tiny: 0 runs done, 2 left" in out
    assert out.count("holds a run with eval.every=4, not 8") == 2
    # From the folder alone, too.
    for _ in range(2):
        text = (runs / "table.md").read_text()
        assert "2 of 2 runs are not finished" in text
        assert "- digits/iid/flex/seed_0: other config\n" in text
        assert "0 of 2 runs finished" in (runs / "report" / "index.html").read_text()
        write_tables(runs)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "finished"),
        ({"execution.devices": 1, "data.dir": "/elsewhere"}, "finished"),
        ({"rounds": 17}, OTHER),
        ({"seed": 3}, OTHER),
    ],
)
def test_how_far_a_run_is_depends_on_what_is_asked_for(tiny, tmp_path, changes, status):
    study = read_study(tiny)
    trial = study.trials()[0]
    finish(tmp_path / "run", study.config_of(trial))
    asked = study.fields_of(trial) | changes
    assert read_status(tmp_path / "run", asked).status == status
    assert read_status(tmp_path / "run", {}).status == "finished"
    assert read_status(tmp_path / "none", asked).status == "new"
    (tmp_path / "run" / "config.json").write_text("{")
    assert read_status(tmp_path / "run", asked).status == UNKNOWN


def test_a_folder_of_another_study_is_refused(tiny, tmp_path):
    write_record(make_study(), tmp_path / "runs")
    with pytest.raises(InputError, match="holds the study small, not tiny"):
        local.run(Sweep(str(tiny), str(tmp_path / "runs")))


def test_a_killed_sweep_goes_on_and_ends_in_the_same_table(tiny, tmp_path):
    runs, straight = tmp_path / "runs", tmp_path / "straight"
    study = read_study(tiny)
    flex, broken = study.trials()
    words = [sys.executable, "-m", "experiments.sweep", f"--study={tiny}", f"--workdir={runs}"]
    sweep = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(runs / flex.name / "metrics.jsonl", sweep)
    sweep.send_signal(signal.SIGTERM)
    said, _ = sweep.communicate(timeout=HANGS)
    assert sweep.returncode == 128 + signal.SIGTERM
    assert "interrupted; the same command goes on from here" in said
    # The run was asked, not killed: it saved where it was. The next one was not begun.
    assert (runs / flex.name / "summary.json").exists()
    assert not log_of(runs / broken.name).exists()

    # Of a sweep that cannot ask any more, the run ends as if it had; the next sweep waits for it.
    sweep = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    start = log_of(runs / flex.name).stat().st_size
    while not Workdir(runs / flex.name).busy():
        assert sweep.poll() is None
        time.sleep(0.02)
    sweep.kill()
    sweep.wait()
    # Tasks of a step each take their share: what they start is no part of one program.
    again = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=HANGS, env=os.environ | STEP
    )
    assert again.returncode == 1, again.stderr
    assert "left to another" not in again.stdout
    assert b"interrupted" in log_of(runs / flex.name).read_bytes()[start:]
    assert (
        f"failed: {broken.name}: exit code 2: clients.capacity=9: choose 1 to model.experts=4"
        in again.stdout
    )
    assert f"{flex.name}: " in again.stdout

    subprocess.run(
        command(study, flex, straight), cwd=ROOT, check=True, timeout=HANGS, capture_output=True
    )
    write_record(study, straight)
    assert timeless(runs / flex.name) == timeless(straight / flex.name)
    write_tables(straight)
    texts = [(at / "table.csv").read_text().splitlines() for at in (runs, straight)]
    tables = [list(csv.DictReader(text)) for text in texts]
    untimed = [[row for row in rows if row["quantity"] != "wall/seconds"] for rows in tables]
    assert untimed[0] == untimed[1]
    assert len(untimed[0]) > 10


def test_a_queue_takes_the_shares(tiny, tmp_path):
    pytest.importorskip("submitit")
    study = read_study(tiny)
    runs = tmp_path / "runs"
    for trial in study.trials():
        finish(runs / trial.name, study.config_of(trial))
    sweep = Sweep(str(tiny), str(runs))
    (job,) = slurm.submit(sweep, slurm.Queue(), str(tmp_path / "jobs"), 1, cluster="local")
    assert job.result() == 0, job.stderr()
    assert "2 runs done, 0 left" in job.stdout()
    assert (runs / "table.md").exists()
