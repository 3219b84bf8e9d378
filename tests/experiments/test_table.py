"""Tables of studies whose numbers are worked out by hand."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from scipy.stats import t, ttest_rel

from experiments.configs import digits
from experiments.report import write_report
from experiments.reporting.curves import pens
from experiments.reporting.quantities import MINUS, NATS, NOTHING
from experiments.reporting.runs import read_run
from experiments.reporting.tables import Table
from experiments.studying.formats import latex, latex_text, markdown
from experiments.studying.pictures import LABEL, axis_places, place_labels, trade_off
from experiments.studying.results import figures, read_results
from experiments.studying.rows import Row
from experiments.studying.sheets import sheets
from experiments.studying.statistics import estimate, holm, paired_difference
from experiments.studying.status import write_record
from experiments.studying.study import Study
from experiments.table import write_tables
from experiments.workdir import as_json
from flexmoe_jax.errors import InputError
from tests.experiments.test_report import Page
from tests.limits import HANGS

# Student's t, 97.5 %, for two and for three seeds: from any printed table.
T_OF_2, T_OF_3 = 12.7062, 4.3027


def make_study(**changes: Any) -> Study:
    return Study(
        **{
            "name": "by_hand",
            "config": digits.get_config,
            "methods": {"flex": {}, "greedy_50_x": {}},
            "datasets": {"digits": {}},
            "partitions": {"iid": {}},
            "seeds": (0, 1, 2),
            **changes,
        }
    )


def next_token_config() -> ConfigDict:
    config = digits.get_config()
    config.task.name = "next_token"
    return config


def write_run(
    folder: Path,
    globals_: list[float],
    personal: float = 0.9,
    status: str = "finished",
    task: str = "classification",
    **extra: float,
) -> None:
    """A run with an evaluation every second round, and 10 bytes down and 5 up in each."""
    folder.mkdir(parents=True)
    config = digits.get_config()
    config.task.name = task
    if folder.name.startswith("seed_"):
        config.seed = int(folder.name.removeprefix("seed_"))
    (folder / "config.json").write_text(json.dumps(as_json(config)))
    rows: list[dict[str, Any]] = []
    for number in range(1, 2 * len(globals_) + 1):
        row: dict[str, Any] = {
            "round": number,
            "load/assigned_cv": 0.1 * number,
            "load/usage_cv": 0.2,
            "load/assigned_cv_cumulative": 0.5 / number,
            "load/usage_cv_cumulative": 0.4,
            "comm/bytes_down": 10,
            "comm/bytes_up": 5,
            **extra,
        }
        if number % 2 == 0:
            row["eval/global_accuracy"] = globals_[number // 2 - 1]
            row["eval/personal_accuracy"] = personal
            row["eval/server_accuracy"] = 0.6
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"status": status, "seconds": 30.0}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two methods, three seeds; `greedy_50_x` reaches 0.6 with two seeds of three."""
    write_record(make_study(), tmp_path)
    for seed, accuracy in enumerate((0.70, 0.72, 0.74)):
        write_run(tmp_path / f"digits/iid/flex/seed_{seed}", [0.5, 0.65, accuracy])
    for seed, accuracy in enumerate((0.66, 0.70, 0.59)):
        write_run(tmp_path / f"digits/iid/greedy_50_x/seed_{seed}", [0.3, 0.55, accuracy])
    return tmp_path


def table(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "table.csv").open(newline="") as file:
        return {(row["method"], row["quantity"]): row for row in csv.DictReader(file)}


def test_numbers_worked_out_by_hand(folder):
    write_tables(folder)
    rows = table(folder)
    flex = rows["flex", "global/final"]
    # 0.70, 0.72, 0.74: deviation 0.02.
    assert float(flex["mean"]) == pytest.approx(0.72)
    assert float(flex["margin_95"]) == pytest.approx(T_OF_3 * 0.02 / math.sqrt(3), rel=1e-4)
    assert flex["n"] == "3"
    assert float(rows["flex", "mean/final"]["mean"]) == pytest.approx((0.9 + 0.72 + 0.6) / 3)
    # Six rounds with 0.1 to 0.6, then 0.5 / 6.
    assert float(rows["flex", "assigned/round"]["mean"]) == pytest.approx(0.35)
    assert float(rows["flex", "assigned/cumulative"]["mean"]) == pytest.approx(0.5 / 6)
    # Six rounds, 10 bytes down and 5 up in each.
    assert float(rows["flex", "down/bytes"]["mean"]) == 60
    assert float(rows["flex", "up/bytes"]["mean"]) == 30
    # 0.65 in round 4: four rounds of 15 bytes.
    assert float(rows["flex", "target/rounds"]["mean"]) == 4
    assert float(rows["flex", "target/bytes"]["mean"]) == 60
    # Seeds 0 and 1 reach 0.6 in round 6, seed 2 never does.
    greedy = rows["greedy_50_x", "target/rounds"]
    assert (greedy["n"], float(greedy["mean"])) == ("2", 6)
    # Differences -0.04, -0.02, -0.15.
    difference = rows["greedy_50_x", "global/final"]
    assert float(difference["difference"]) == pytest.approx(-0.07)
    assert float(difference["p_value"]) == pytest.approx(
        ttest_rel([0.66, 0.70, 0.59], [0.70, 0.72, 0.74]).pvalue
    )
    assert (difference["pairs"], difference["pairs_above"]) == ("3", "0")
    assert rows["flex", "global/final"]["reference"] == ""
    assert difference["by_seed"] == "0=0.66 1=0.7 2=0.59"
    assert greedy["by_seed"] == "0=6 1=6"


def test_there_is_no_mean_of_three_where_clients_have_rules_of_their_own(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.6])
    run = read_run(tmp_path / "run")
    assert figures(run, 0.6)["mean/final"] == pytest.approx((0.9 + 0.6 + 0.6) / 3)
    of_rules = replace(run, config={**run.config, "partition.rule": "relabelled"})
    assert "mean/final" not in figures(of_rules, 0.6)


def test_a_single_expert_has_no_balance(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.6])
    run = read_run(tmp_path / "run")
    alone = replace(run, config={**run.config, "model.experts": 1})
    lost = figures(run, 0.6).keys() - figures(alone, 0.6).keys()
    loads, sums = ("assigned", "usage"), ("round", "cumulative")
    assert lost == {f"{load}/{summed}" for load in loads for summed in sums}


def test_the_best_is_not_the_last(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.8, 0.7])
    run = read_run(tmp_path / "run")
    assert figures(run, 0.6)["global/final"] == 0.7
    assert figures(run, 0.6)["global/best"] == 0.8
    assert figures(run, 0.8)["target/rounds"] == 4
    assert "target/rounds" not in figures(run, 0.81)
    assert "target/seconds" not in figures(run, 0.6)


def test_simulated_seconds_add_up_to_the_target(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.8], **{"time/simulated_seconds": 2.5})
    assert figures(read_run(tmp_path / "run"), 0.6)["target/seconds"] == 10.0


def test_what_people_read(folder):
    text = write_tables(folder)[0].read_text()
    assert "All 6 runs are finished." in text
    assert "| flex | 3 | 90.0 ± 0.0 | 90.0 ± 0.0 | 72.0 ± 5.0 |" in text
    assert "rounds to 60 %" in text
    # Two seeds, both in round 6 at 90 bytes.
    assert "| 6.0 ± 0.0 (2 of 3) | 90.0 ± 0.0 (2 of 3) | 30.0 ± 0.0 |" in text
    assert f"{MINUS}7.0 ± 17.4" in text
    assert "simulated" not in text
    assert "newcomers" not in text
    unreached = write_tables(folder, target=0.9)[0].read_text()
    assert f"| {NOTHING} (0 of 3) |" in unreached
    assert "rounds to 90 %" in unreached


def test_newcomers_have_a_column_where_a_run_has_them(folder):
    extra = {"eval/newcomer_accuracy": 0.5, "eval/newcomer_loss": 2.0}
    shutil.rmtree(folder / "digits/iid/flex/seed_0")
    write_run(folder / "digits/iid/flex/seed_0", [0.5, 0.65, 0.7], **extra)
    text = write_tables(folder)[0].read_text()
    assert "newcomers: clients that took no part in training" in text
    assert float(table(folder)["flex", "newcomer/final"]["mean"]) == 0.5
    assert float(table(folder)["flex", "newcomer_loss/final"]["mean"]) == 2.0


def test_an_unfinished_study_says_what_is_missing(tmp_path):
    write_record(make_study(), tmp_path)
    write_run(tmp_path / "digits/iid/flex/seed_0", [0.5, 0.7])
    write_run(tmp_path / "digits/iid/flex/seed_1", [0.5, 0.7], status="interrupted")
    write_run(tmp_path / "digits/iid/greedy_50_x/seed_1", [0.5, 0.7], status="diverged")
    text = write_tables(tmp_path)[0].read_text()
    assert "5 of 6 runs are not finished" in text
    assert "- digits/iid/flex/seed_1: interrupted\n" in text
    assert "- digits/iid/greedy_50_x/seed_1: diverged\n" in text
    assert "- digits/iid/greedy_50_x/seed_2: new\n" in text
    # One seed: a mean, but no interval; no seed: nothing.
    assert "| flex | 1 of 3 | 90.0 | 90.0 | 70.0 |" in text
    assert f"| greedy_50_x | 0 of 3 | {NOTHING} |" in text


def test_the_same_runs_give_the_same_bytes(folder):
    first = [path.read_bytes() for path in write_tables(folder)]
    assert [path.read_bytes() for path in write_tables(folder)] == first


@pytest.mark.parametrize(
    ("chosen", "given", "expected"),
    [("", "", "full"), ("static", "", "static"), ("static", "random", "random")],
)
def test_all_methods_are_compared_with_one_even_where_none_is_flex(
    tmp_path, chosen, given, expected
):
    methods = {"full": {}, "random": {}, "static": {}}
    study = make_study(methods=methods, reference=chosen, seeds=(0, 1))
    write_record(study, tmp_path)
    for trial in study.trials():
        write_run(tmp_path / trial.name, [0.5 + 0.1 * trial.seed])
    text = write_tables(tmp_path, reference=given)[0].read_text()
    assert f"### digits · iid: difference from {expected}\n" in text
    compared = {method for (method, _), row in table(tmp_path).items() if row["reference"]}
    assert compared == methods.keys() - {expected}
    if not given:
        assert f"Difference from {expected}" in write_report([tmp_path]).read_text()


def test_a_record_that_says_neither_config_nor_reference_is_read(folder):
    path = folder / "study.json"
    record = json.loads(path.read_text())
    runs = [{k: v for k, v in run.items() if k != "overrides"} for run in record["runs"]]
    before = [written.read_bytes() for written in write_tables(folder)]
    path.write_text(json.dumps({"name": record["name"], "runs": runs}))
    assert [written.read_bytes() for written in write_tables(folder)] == before


def test_a_further_axis_has_a_column_and_pairs_within_it(tmp_path):
    study = make_study(
        methods={"flex": {}, "random": {}},
        variants={"capacity": {"1": {}, "1-4": {}}},
        seeds=(0, 1),
    )
    write_record(study, tmp_path)
    for trial in study.trials():
        better = 0.1 if trial.variant == (("capacity", "1"),) else 0.2
        accuracy = 0.5 + 0.01 * trial.seed + better * (trial.method == "random")
        write_run(tmp_path / trial.name, [accuracy])
    results = read_results(tmp_path)
    accuracy_sheet, _, differences = sheets(results)
    assert accuracy_sheet.heads[:3] == ("capacity", "method", "seeds")
    assert [row[:2] for row in differences.rows] == [("1", "random"), ("1-4", "random")]
    assert [row[5] for row in differences.rows] == ["+10.0 ± 0.0", "+20.0 ± 0.0"]


def test_losses_of_text_are_told_and_compared_in_bits_a_byte(tmp_path):
    study = make_study(config=next_token_config, seeds=(0, 1))
    write_record(study, tmp_path)
    nat = math.log(2)
    for trial in study.trials():
        loss = (2 + 0.25 * trial.seed + (trial.method != "flex") * (1 + 0.5 * trial.seed)) * nat
        extra = {"eval/personal_loss": loss, "eval/personal_accuracy_p10": 0.25}
        write_run(tmp_path / trial.name, [0.5], task="next_token", **extra)
    accuracy, losses, _, _, apart = sheets(read_results(tmp_path))
    assert accuracy.heads[-1] == "personal, tenth percentile"
    assert [row[-1] for row in accuracy.rows] == ["25.0 ± 0.0"] * 2
    assert losses.title == "digits · iid: loss, bits a byte"
    # 2 and 2.25, then 3 and 3.75: half the distance times t of two seeds.
    assert losses.heads == ("method", "seeds", "personal")
    assert losses.rows == (
        ("flex", "2", f"2.125 ± {T_OF_2 / 8:.3f}"),
        ("greedy_50_x", "2", f"3.375 ± {T_OF_2 * 3 / 8:.3f}"),
    )
    # 1 and 1.5.
    assert apart.rows[0][:3] == ("greedy_50_x", "2", f"+1.250 ± {T_OF_2 / 4:.3f}")
    assert apart.note.startswith("Loss, bits a byte, method minus flex")
    write_tables(tmp_path)
    # Raw as recorded.
    assert float(table(tmp_path)["flex", "personal_loss/final"]["mean"]) == pytest.approx(
        2.125 * nat
    )
    page = Page(write_report([tmp_path]))
    assert "task-1-loss" in page.ids
    assert "Loss, bits a byte" in page.text


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(0.1, 10))
def test_intervals_and_tests_are_those_of_scipy(values, scale):
    n = len(values)
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.margin == pytest.approx(
        t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n), abs=1e-9
    )
    other = [scale * ((i * 7) % 5) for i in range(n)]
    compared = paired_difference(values, other)
    if not math.isnan(compared.p):
        expected = ttest_rel(values, other)
        assert compared.p == pytest.approx(expected.pvalue)
        low, high = expected.confidence_interval(0.95)
        assert compared.mean - compared.margin == pytest.approx(low)
        assert compared.mean + compared.margin == pytest.approx(high)


def test_many_comparisons_are_corrected_by_hand():
    # In ascending order 3 × 0.01, 2 × 0.03 and 1 × 0.04, which may not be less than 2 × 0.03.
    assert holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx(
        [0.03, 0.06, math.nan, 0.06], nan_ok=True
    )
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_values_are_corrected_for_the_comparisons_of_their_task(tmp_path):
    methods = {"flex": {}, "near": {}, "far": {}}
    study = make_study(methods=methods, partitions={"iid": {}, "k_class": {}})
    write_record(study, tmp_path)
    worse = {"flex": (0.0, 0.0, 0.0), "near": (0.01, 0.03, 0.02), "far": (0.1, 0.11, 0.13)}
    for trial in study.trials():
        accuracy = 0.7 + 0.05 * trial.seed - worse[trial.method][trial.seed]
        write_run(tmp_path / trial.name, [accuracy])
    text = write_tables(tmp_path)[0].read_text()
    near, far = (ttest_rel(worse[name], worse["flex"]).pvalue for name in ("near", "far"))
    assert far < near / 2
    assert f" | {far:.3f} ({2 * far:.3f}) | " in text
    assert f" | {near:.3f} ({near:.3f}) | " in text
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == "global/final"]
    assert [row["pairs_above"] for row in rows] == ["", "0", "0"] * 2
    corrected = [(row["method"], float(row["p_holm"])) for row in rows if row["p_holm"]]
    assert corrected == [(n, pytest.approx(p)) for n, p in [("near", near), ("far", 2 * far)] * 2]


def test_few_seeds_claim_nothing():
    assert estimate([]).n == 0
    assert math.isnan(estimate([]).mean)
    one = estimate([0.5])
    assert (one.n, one.mean) == (1, 0.5)
    assert math.isnan(one.margin)
    assert estimate([0.5, 0.6]).margin == pytest.approx(T_OF_2 * 0.05, rel=1e-4)
    # Rounding aside, both seeds differ by the same: no spread to test against.
    assert math.isnan(paired_difference([0.3, 0.5], [0.2, 0.4]).p)


def test_text_that_means_something_to_latex_or_markdown():
    assert latex_text(r"50 % of a_b & {c} \d") == r"50 \% of a\_b \& \{c\} \textbackslash{}d"
    sheet = Table(("method", "p"), [("x|y", "< 0.001")], "a_b: accuracy", "5 %")
    assert r"| x\|y | < 0.001 |" in markdown(sheet)
    text = latex(sheet)
    assert r"x|y & $<$ 0.001 \\" in text
    assert r"\caption{a\_b: accuracy. 5 \%}" in text
    assert r"\label{tab:a-b-accuracy}" in text
    assert r"\begin{tabular}{lr}" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"target": 60.0}, "--target=60.0: give an accuracy above 0 and up to 1"),
        ({"reference": "fedavg"}, "--reference=fedavg: choose one of flex, greedy_50_x"),
    ],
)
def test_flags_that_cannot_work(folder, changes, line):
    with pytest.raises(InputError, match=line):
        write_tables(folder, **changes)


def test_a_folder_without_a_study(tmp_path):
    with pytest.raises(InputError, match="holds no study"):
        write_tables(tmp_path)
    (tmp_path / "study.json").write_text('{"name": 1')
    with pytest.raises(InputError, match="cannot be read"):
        write_tables(tmp_path)


@pytest.mark.parametrize("axis", [{}, {"capacity": {"1": {}, "1-4": {}}}])
def test_the_page_of_a_study_has_every_picture(tmp_path, axis):
    study = make_study(methods={"flex": {}} if axis else {"FedAvg": {}, "full": {}}, variants=axis)
    write_record(study, tmp_path)
    for trial in study.trials()[:-1]:
        write_run(tmp_path / trial.name, [0.5, 0.6 + 0.01 * trial.seed])
    page = Page(write_report([tmp_path]))
    assert page.source.count("<figure") == (1 + 2 * 3 if axis else 4)
    assert {"task-1-0-accuracy", "task-1-along-capacity"} <= set(page.ids) or not axis
    assert f"{len(study.trials()) - 1} of {len(study.trials())} runs finished" in page.text
    assert "Not finished: " + study.trials()[-1].name in page.text
    assert "± 95 % interval" in page.text
    assert "<h3>Difference from FedAvg</h3>" in page.source or axis
    assert all(image["alt"] for image in page.images)
    assert write_report([tmp_path]).read_text() == page.source


def test_a_seed_without_one_of_two_quantities_is_no_point():
    personal, global_ = "personal/final", "global/final"
    seeds = {0: {personal: 0.1}, 1: {global_: 0.2}, 2: {personal: 0.3, global_: 0.4}, 3: {}}
    rows = [
        Row(("digits", "iid"), (), "flex", len(some), some, NATS)
        for some in (seeds, seeds | {3: seeds[0]}, {seed: seeds[seed] for seed in (0, 1)})
    ]
    assert [row.points(personal, global_) for row in rows] == [[(0.3, 0.4)], [(0.3, 0.4)], []]
    assert rows[0].values(personal) == [0.1, 0.3]
    one, other, nothing = (trade_off([row], {"flex": pens(1)[0]}) for row in rows)
    assert one is not None
    assert other is not None
    assert one.source == other.source
    assert nothing is None


def test_a_line_along_an_axis_joins_only_numbers():
    assert axis_places(["1", "2.5", "4"]).tolist() == [0, 1, 2]
    assert axis_places(["1", "2", "all", "4", "8"]).tolist() == [0, 1, 1.5, 2, 2.5, 3, 4]
    assert axis_places(["1", "1-4"]).tolist() == [0, 0.5, 1]


@given(st.lists(st.tuples(st.floats(0.2, 3.8), st.floats(0.2, 2.3)), min_size=1, max_size=5))
def test_letters_in_a_scatter_plot_do_not_touch(points):
    placed = place_labels(np.array(points), (4.0, 2.5))
    apart = np.linalg.norm(placed[:, None] - placed[None], axis=2) + np.eye(len(points))
    assert apart.min() >= LABEL
    assert (placed >= 0).all()
    assert (placed <= (4.0, 2.5)).all()


def test_a_table_that_cannot_be_written_is_one_line(folder):
    (folder / "table.md").mkdir()
    process = subprocess.run(
        [sys.executable, "-m", "experiments.table", str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert process.returncode == 2
    line = f"DIR={folder}: {folder / 'table.md'} cannot be written (Is a directory); "
    assert process.stderr.startswith(line)
    assert len(process.stderr.splitlines()) == 1
