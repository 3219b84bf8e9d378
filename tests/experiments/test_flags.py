"""Command lines, in every form that flags may have: they work, or are refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.cli import _last_of_each
from experiments.user_files import call_in_file
from flexmoe_jax.errors import InputError
from tests.experiments.test_train import ROOT, SMALL, rows
from tests.limits import HANGS

DIGITS = "experiments/configs/digits.py"
WHOLE = f"--config={DIGITS}"
STUDY = "--study=experiments/studies/digits_smoke.py"

REFUSED = {
    f"train --config {DIGITS} --config.rounds=x": "config.rounds=x: give a whole number",
    f"train -config {DIGITS} -config.rounds x": "config.rounds=x: give a whole number",
    f"train -config={DIGITS} --config.roundz=1": "config.roundz: no such field; did you mean",
    f"train {WHOLE} --config.rounds": "Missing value for flag --config.rounds",
    f"train {WHOLE} --config.rounds.x=1": "config.rounds.x: no such field; did you mean",
    f"train {WHOLE} --config.update=1": "config.update: no such field; did you mean",
    f"train {WHOLE} --config.data={{}}": f"--config={DIGITS}: has no field data.dir; begin with",
    f"train {WHOLE} --noconfig.rounds": "--noconfig.rounds: no such flag",
    f"train {WHOLE} --noconfig.edge.cache=1": "does not take an argument",
    f"train {WHOLE} -- --config.rounds=1": "argument=--config.rounds=1: give flags alone",
    f"train --config.rounds=1 {WHOLE}": "--config.rounds=1 in argv before a value for --config",
    "train --config.rounds=1": "--config.rounds: stands before, or without, --config=FILE",
    "train": "--config=None: name a file",
    "train --config": "Missing value for flag --config",
    "train --config=": "--config=: name a file",
    "train --config=experiments": "--config=experiments: is a folder",
    "train --config=~/no/such.py": "/no/such.py: no such file",
    "train --config=~nobody-of-this-name/x.py": "has no such home folder",
    "train --flagfile=no/such": "Unable to open flagfile",
    f"train {WHOLE} --undefok=config.roundz --config.roundz=1": "config.roundz: no such field",
    f"train {WHOLE} --workdir=": "--workdir=: name a folder",
    f"train {WHOLE} --workdir=~nobody-of-this-name/x": "has no such home folder",
    f"train {WHOLE} --distributed=auto --join_seconds=0": "flag --join_seconds=0",
    "sweep": "--study=None: name a file",
    f"sweep {STUDY}": "--workdir=None: name a folder",
    f"sweep {STUDY} --workdir=x --count=0": "--count=0: choose 1 or more",
    f"sweep {STUDY} --workdir=x --indx=1": "--indx: no such flag; did you mean --index?",
    f"sweep {STUDY} --workdir=x stray": "argument=stray: give flags alone",
    "sweep --study=~/no/such.py --workdir=x": "/no/such.py: no such file",
    "table ~/no/such": "/no/such: holds no study.json",
    "table x --target=high": "flag --target=high",
    "report ~/no/such": "/no/such: no such folder",
    "report x --uot=y": "--uot: no such flag; did you mean --out?",
    "bench": "suite=: give one of",
}


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{words[0]}", *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        env=os.environ | environment,
    )


def test_of_a_field_given_twice_the_last_counts():
    words = ["--config=x.py", "--config.model.widths=(8,)", "--data", "-config.model.widths=(9,)"]
    words += ["--config.rounds", "3", "--config.model.widths=(8,)", "--workdir=a", "--workdir=b"]
    assert _last_of_each(words) == [words[0], "--data", *words[4:]]
    apart = ["--config", "x.py", "--config.rounds", "-3", "--config.model.widths", "(8,)"]
    again = "--config.rounds=4"
    assert _last_of_each([*apart, again]) == [*apart[:2], *apart[4:], again]


def test_what_cannot_be_is_one_line(tmp_path):
    def refuse(item: tuple[str, str]) -> None:
        words, line = item
        launcher, *rest = words.split()
        folder = tmp_path / "refused"
        first = [f"--workdir={folder}"] if launcher == "train" else []
        process = run(launcher, *first, *rest)
        assert (process.returncode, process.stdout) == (2, ""), (words, process.stderr)
        assert line in process.stderr, words
        assert process.stderr.count("\n") == 1, (words, process.stderr)
        assert not folder.exists()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(refuse, REFUSED.items()))


OF_A_USER = """
from __future__ import annotations
from dataclasses import dataclass
from experiments.configs import digits

@dataclass
class Mine:
    rounds: int = 1

def get_config(which):
    config = digits.get_config()
    config.edge.cache = which == "cached"
    config.rounds = Mine().rounds
    return config
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_every_permitted_form_works_wherever_it_is_started(tmp_path):
    """Also: a shell inside an allocation, a home folder, output on a full disk."""
    (tmp_path / "mine.py").write_text(OF_A_USER)
    rest = [word for word in SMALL if "rounds" not in word]
    (tmp_path / "more.flags").write_text("\n".join(["# a comment", *rest]))
    words = [sys.executable, "-m", "experiments.train", "-config", "~/mine.py:cached"]
    words += ["--noconfig.edge.cache", "--workdir", "~/run", f"--flagfile={tmp_path}/more.flags"]
    words += ["--undefok=mine", "--mine=1", "--config.model.widths=8", "--"]
    inside = {"SLURM_NTASKS": "4x", "SLURM_JOB_ID": "7", "OMPI_COMM_WORLD_SIZE": "2"}
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            words,
            cwd=ROOT,
            stdout=full,
            stderr=full,
            timeout=HANGS,
            env=os.environ | inside | {"HOME": str(tmp_path)},
        )
    assert process.returncode == 0
    assert len(rows(tmp_path / "run")) == 1
    config = (tmp_path / "run" / "config.json").read_text()
    assert '"cache": false' in config
    assert '"experts": 4' in config
    assert (tmp_path / "run" / "report" / "index.html").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def get_config(:", "line 1: SyntaxError: invalid syntax"),
        ("\n\nimport no_such_module", "line 3: ModuleNotFoundError: No module named"),
        ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)", "line 2: SystemExit: 3"),
        ("def get_config():\n    return get_config()", "RecursionError"),
        ("def get_config(which):\n    pass", "missing 1 required positional argument"),
        ("get_config = 3", "does not define get_config(); experiments/configs/ holds examples"),
        ("x = '\0'", "SyntaxError"),
    ],
)
def test_a_file_that_fails_is_refused_with_its_line(tmp_path, text, line):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError) as refusal:
        call_in_file("--config", path, "get_config", examples="configs")
    assert str(refusal.value).startswith(f"--config={path}: ")
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_configs_that_are_none(tmp_path: Path):
    head = "from experiments.configs import base\ndef get_config():\n    c = base.get_config()\n"
    cases = {
        "return {'rounds': 1}": "get_config() returns a dict, not a ConfigDict",
        "return None": "get_config() returns a NoneType, not a ConfigDict",
        "del c.execution.devices; return c": "has no field execution.devices; begin with base",
        "c.mine = 1; return c": "mine=1: no such field; did you mean",
        "c.execution.devices = None; return c": "execution.devices=None: give a whole number",
    }

    def refuse(item: tuple[int, tuple[str, str]]) -> None:
        number, (text, line) = item
        path = tmp_path / f"mine{number}.py"
        path.write_text(f"{head}    {text}\n")
        process = run("train", f"--config={path}", f"--workdir={tmp_path / 'refused'}")
        assert process.returncode == 2, (text, process.stderr)
        assert line in process.stderr
        assert process.stderr.count("\n") == 1, (text, process.stderr)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(refuse, enumerate(cases.items())))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "JAX_PLATFORM_NAME"])
def test_a_platform_that_is_not_there_is_one_line(name, tmp_path):
    # The other variable, which the tests set, would be asked first.
    unset = {"JAX_PLATFORMS": "", "JAX_PLATFORM_NAME": ""}
    folder = tmp_path / "refused"
    process = run("train", WHOLE, f"--workdir={folder}", **(unset | {name: "nonsense"}))
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(f"{name}=nonsense: JAX finds no such device here (")
    assert process.stderr.count("\n") == 1
    assert not folder.exists()
