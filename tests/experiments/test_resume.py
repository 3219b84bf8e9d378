"""A run resumes with the data it started with, wherever they are, and survives damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.build import inputs_of
from experiments.examples import load_examples, load_partitioned
from experiments.inputs import may_have_moved
from experiments.report import write_report
from experiments.train import train
from experiments.workdir import Workdir
from flexmoe_jax.errors import InputError
from tests.experiments.test_build import measurements
from tests.experiments.test_train import timeless

REST = {
    "train_images": lambda a: a[::-1],
    "train_labels": lambda a: np.where(np.arange(len(a)) == 7, (a + 1) % 3, a),
    "test_images": lambda a: a + (np.arange(a.size).reshape(a.shape) == 3),
    "test_labels": lambda a: a[:-1],
    "classes": lambda a: np.array(["low", "middle", "High"]),
    "train_clients": lambda a: np.where(a == 100, 105, a),
}


def change(
    path: Path, save: Callable[..., None] = np.savez, **changes: Callable[[Any], Any]
) -> None:
    """Writes the file anew, with some of its arrays changed."""
    with np.load(path) as file:
        arrays = {name: changes.get(name, lambda a: a)(file[name]) for name in file}
    if "test_labels" in changes:
        arrays["test_images"] = arrays["test_images"][: len(arrays["test_labels"])]
    save(path, **arrays)


def set_(config: ConfigDict, **fields: object) -> ConfigDict:
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return other


def go_on(config: ConfigDict, folder: Path) -> tuple[str, ...]:
    """Performs all checks before a run resumes, and writes the files that it writes then."""
    workdir = Workdir(folder)
    workdir.check(config)
    inputs = inputs_of(config, load_examples(config))
    said = workdir.check_inputs(config, inputs)
    workdir.open(config, inputs)
    return said


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def begun(tmp_path: Path) -> tuple[ConfigDict, Path]:
    """A run that has begun, beside its data in a/."""
    (tmp_path / "a").mkdir()
    config = measurements(tmp_path / "a" / "x.npz", owners=5)
    assert go_on(config, tmp_path / "a" / "run") == ()
    return config, tmp_path / "a"


def test_a_run_moved_together_with_its_file_goes_on(begun, tmp_path):
    config, home = begun
    moved = home.rename(tmp_path / "b")
    elsewhere = set_(config, data__name=str(moved / "x.npz"), rounds=9)
    assert go_on(elsewhere, moved / "run") == ()
    # From here on under its new name, which may be relative to data.dir.
    (moved / "x.npz").rename(moved / "renamed.npz")
    assert go_on(set_(config, data__name="renamed.npz", data__dir=str(moved)), moved / "run") == ()


def test_the_same_arrays_in_another_archive_are_the_same_data(begun):
    config, home = begun
    change(home / "x.npz", np.savez_compressed, train_labels=lambda a: a.astype(np.uint8))
    assert go_on(config, home / "run") == ()


@pytest.mark.parametrize("name", REST)
def test_other_data_in_their_place_are_refused_and_nothing_is_touched(begun, name):
    config, home = begun
    Workdir(home / "run").write_summary({"status": "finished", "rounds": 3})
    before = files(home / "run")
    change(home / "x.npz", **{name: REST[name]})
    with pytest.raises(InputError, match=rf"^data\.name=.*x\.npz: its .*{name}") as refusal:
        go_on(config, home / "run")
    assert f"the run in {home / 'run'} began with; put them back" in str(refusal.value)
    assert files(home / "run") == before
    # The way to override the check.
    (home / "run" / "inputs.json").unlink()
    assert go_on(config, home / "run") == ()


def test_limits_decide_what_a_run_reads(begun):
    """What a limit leaves out may change; another limit is another run."""
    config, home = begun
    limited = set_(config, data__test_limit=30)
    go_on(limited, home / "limited")
    kept = load_partitioned(limited)[0].test_images[:, 0]
    change(
        home / "x.npz",
        test_images=lambda a: np.where(np.isin(a[:, :1].astype(np.float32), kept), a, a + 1),
    )
    assert go_on(limited, home / "limited") == ()
    with pytest.raises(InputError, match="test_images"):
        go_on(config, home / "run")
    with pytest.raises(InputError, match=r"holds a run with data\.test_limit=0, not 30"):
        go_on(limited, home / "run")


def test_an_older_run_is_adopted_under_the_name_that_it_has(begun, tmp_path):
    config, home = begun
    (home / "run" / "inputs.json").unlink()
    shutil.copy(home / "x.npz", tmp_path / "y.npz")
    with pytest.raises(InputError, match=r"holds a run with data\.name=.*x\.npz, not .*y\.npz"):
        go_on(set_(config, data__name=str(tmp_path / "y.npz")), home / "run")
    assert go_on(config, home / "run") == ()
    change(home / "x.npz", train_labels=REST["train_labels"])
    with pytest.raises(InputError, match="train_labels"):
        go_on(config, home / "run")


def test_damage_to_the_hashes_is_not_taken_for_other_data(begun):
    config, home = begun
    path = home / "run" / "inputs.json"
    whole = path.read_bytes()
    for content in (whole.replace(b'": "', b'": "f', 1), whole[:-9], b"{}", b"[]", b"\xff"):
        path.write_bytes(content)
        (said,) = go_on(config, home / "run")
        assert said.startswith("inputs.json cannot be read (")
        assert path.read_bytes() == whole


def test_a_report_needs_no_data(begun):
    config, home = begun
    (home / "x.npz").unlink()
    assert write_report([home / "run"]).exists()
    with pytest.raises(InputError, match="there is no such file"):
        go_on(config, home / "run")


def test_files_of_devices_and_their_presence_are_inputs(begun, tmp_path):
    config, home = begun
    there, tiers = tmp_path / "there.csv", tmp_path / "tiers.toml"
    there.write_text("1,0,1,1,1\n")
    tier = "[car]\nmemory = 1e9\nspeed = 5\ndown = 1e6\nup = 1e6\navailability = 1\n"
    tiers.write_text(tier)
    fields = {"edge__availability": str(there), "edge__tiers": str(tiers), "edge__mix": "car"}
    config = set_(config, **fields)
    go_on(config, home / "edge")
    # Written otherwise, and moved.
    there.write_text("# mine\n1, 0.0, 1,1,1\n\n")
    tiers.write_text(tier.replace("1e9", "1_000_000_000"))
    away = {"edge__availability": str(there.rename(home / "t.csv"))}
    away["edge__tiers"] = str(tiers.rename(home / "t.toml"))
    config = set_(config, **away)
    assert go_on(config, home / "edge") == ()
    for field, path, text in (
        ("edge.availability", home / "t.csv", "1,1,1,1,1\n"),
        ("edge.tiers", home / "t.toml", tier.replace("speed = 5", "speed = 6")),
    ):
        before = path.read_text()
        path.write_text(text)
        line = rf"^{field}={path}: differs from what the run in .* began with"
        with pytest.raises(InputError, match=line):
            go_on(config, home / "edge")
        path.write_text(before)


@pytest.mark.parametrize(
    ("field", "one", "other", "moved"),
    [
        ("data.name", "a/x.npz", "b/y.npz", True),
        ("data.name", "a/x.npz", "digits", False),
        # A TFDS data set is known by its whole name.
        ("data.name", "emnist/digits", "digits", False),
        ("edge.availability", "a.csv", "b/a.csv", True),
        ("edge.availability", "markov", "./markov", False),
        ("edge.tiers", "", "t.toml", False),
        ("model.private", "a.npz", "b.npz", False),
        ("data.name", None, "b.npz", False),
    ],
)
def test_names_that_may_mean_one_file(field, one, other, moved):
    assert may_have_moved(field, one, other) == moved


FLOWING = {"rounds": 4, "checkpoint__every": 2, "eval__every": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[ConfigDict, Path]:
    """Four rounds, with checkpoints of the second and the last."""
    home = tmp_path_factory.mktemp("resume")
    config = set_(measurements(home / "x.npz", owners=5), **FLOWING)
    assert train(config, Workdir(home / "run")) == "finished"
    return config, home / "run"


def damaged(line: int) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        lines[line] = b"\xff" + lines[line][1:]
        return b"".join(lines)

    return damage


@pytest.mark.parametrize(
    ("damage", "rounds", "said"),
    [
        (damaged(0), [2, 3, 4, 5], "continuing after round 4 of 5"),
        (damaged(2), [1, 2, 4, 5], "continuing after round 4 of 5"),
        (lambda content: b"", [5], "continuing after round 4 of 5"),
        # Nothing that can be read comes after it: it is computed again.
        (damaged(3), [1, 2, 3, 4, 5], "continuing after round 2 of 5"),
    ],
)
def test_a_damaged_line_costs_no_checkpoint_and_no_other_line(
    finished, tmp_path, capsys, damage, rounds, said
):
    config, whole = finished
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(damage(content))
    assert train(set_(config, rounds=5), Workdir(run)) == "finished"
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in found] == rounds
    known = {row["round"]: row for row in timeless(whole)}
    assert [row for row in timeless(run) if row["round"] < 5] == [known[n] for n in rounds[:-1]]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 5
    assert summary.get("rounds_lost", 0) == 5 - len(rounds)
    assert ("total/comm/bytes_down" in summary) == (len(rounds) == 5)
    out = capsys.readouterr().out
    assert said in out
    lost = {4: "1 of the 4 rounds done are lost", 1: "4 of the 4 rounds done are lost", 5: ""}
    assert lost[len(rounds)] in out
    assert (run / "checkpoints-set-aside").exists() == (len(rounds) == 5)
    page = write_report([run]).read_text()
    assert ("metrics.jsonl lacks" in page) == (len(rounds) < 5)


def test_a_run_goes_on_with_its_data_alone(finished, tmp_path):
    config, whole = finished
    run, path = tmp_path / "run", tmp_path / "x.npz"
    shutil.copytree(whole, run)
    shutil.copy(config.data.name, path)
    moved = set_(config, rounds=5, data__name=str(path))
    assert train(moved, Workdir(run)) == "finished"
    assert json.loads((run / "config.json").read_text())["data"]["name"] == str(path)
    before = files(run)
    change(path, train_labels=REST["train_labels"])
    with pytest.raises(InputError, match=r"^data\.name=.*x\.npz: its train_labels differ"):
        train(set_(moved, rounds=6), Workdir(run))
    assert files(run) == before
