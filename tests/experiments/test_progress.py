"""What a run shows on the terminal."""

from __future__ import annotations

import math

import pytest

from experiments.progress import ProgressDisplay

ROUND = {
    "round": 1,
    "train/loss": 3 * math.log(2),
    "eval/clients": 4,
    "eval/personal_accuracy": 0.25,
    "eval/personal_loss": 2 * math.log(2),
    "load/assigned_cv_cumulative": 0.5,
    "time/round_seconds": 1.5,
}


def test_newcomers_have_a_column(capsys):
    with ProgressDisplay(2, 0, newcomers=True) as display:
        display.update({**ROUND, "eval/newcomer_accuracy": 0.125})
    heads, shown = capsys.readouterr().out.splitlines()
    assert heads.split()[4:6] == ["server", "newcomer"]
    assert " ".join(shown.split()) == "1 2.079 0.250 - - 0.125 0.500 - 1.50"


@pytest.mark.parametrize(
    ("task", "said", "row"),
    [
        ("classification", "", "1 2.079 0.250 - - 0.500 - 1.50"),
        ("next_token", "all losses in bits a byte:", "1 3.000 2.000 - - 0.500 - 1.50"),
        ("regression", "all losses: of training", "1 2.079 1.386 - - 0.500 - 1.50"),
    ],
)
def test_a_row_an_evaluation_in_what_the_task_is_told_in(capsys, task, said, row):
    with ProgressDisplay(2, 0, task=task) as display:
        display.update(ROUND)
        display.update({"round": 2})
    *before, heads, shown = capsys.readouterr().out.splitlines()
    assert heads.split()[:5] == ["round", "loss", "personal", "global", "server"]
    assert " ".join(shown.split()) == row
    assert len(before) == bool(said)
    assert said in "".join(before)
