from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.bench import SUITES, main
from experiments.benchmarks import clients, evaluate, moe, scale, startup, timing
from experiments.benchmarks.workloads import WORKLOADS, Workload, classify, decode, training_flop
from flexmoe_jax import models
from tests.limits import HANGS

ROOT = Path(__file__).parents[2]
SMALL = classify(lambda conv: models.MLP((8,)))
PLAIN = Workload(SMALL, (4, 4, 1), clients=3, examples=4, batch=2)
MIXTURE = Workload(SMALL, (4, 4, 1), clients=8, examples=4, batch=2, experts=8, capacity=2)
TEXT = Workload(decode(1, 8, hidden=4), (6,), clients=2, examples=4, batch=2, experts=3)


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    """Keeps timings short: the tests check what is measured, not how fast it is."""
    monkeypatch.setattr(timing, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(clients, "make_products", partial(timing.make_products, side=16, count=2))


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)


def assert_positive(figures: dict, *names: str):
    json.dumps(figures)
    assert [name for name in names if not figures[name] > 0] == []


def test_a_case_prints_one_json_object():
    process = bench("assignment", "relaxation", "30", "4", "samples")
    assert process.returncode == 0, process.stderr
    [line] = process.stdout.splitlines()
    figures = json.loads(line)
    assert figures["clients"] == 30
    assert figures["experts"] == 4
    assert 0 <= figures["gap_worst"] < 1
    assert figures["peak_bytes"] > 0


def test_help_explains_every_suite(capsys):
    assert main(["clients", "--help"]) == 0
    told = capsys.readouterr().out
    assert [suite for suite in SUITES if f"- `{suite}`:" not in told] == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["assignmnt"],
            "suite=assignmnt: give one of assignment, clients, startup, moe, evaluate, scale",
        ),
        *(
            (
                ["assignment", *words],
                f"assignment={' '.join(words)}: give SOLVER CLIENTS EXPERTS LOAD, or none; "
                "LOAD is clients, samples, usage, equal",
            )
            for words in (
                ["flow"],
                ["flow", "many", "8", "clients"],
                ["flow", "100", "0", "clients"],
                ["flow", "100", "8", "clients,"],
            )
        ),
        (
            ["clients", "W5"],
            "workload=W5: choose of W1, W2, W3, W4, W4b64, M1, M2, T1, T1M, T2, alone",
        ),
        (["scale", "few"], "scale=few: give one cohort size, 1 to 100000"),
        (["scale", "²"], "scale=²: give one cohort size, 1 to 100000"),
        (["moe", "W1"], "moe=W1: this suite takes no further words"),
    ],
)
def test_unknown_words_are_refused_in_one_line(words, line, capsys):
    from experiments.bench import main

    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [line]


def test_the_arithmetic_of_a_round_is_counted_from_the_layers():
    # Logistic regression: forward and the kernel's gradient, 2500 examples.
    assert training_flop(WORKLOADS["W1"]) == 2500 * 2 * 2 * 7840
    layers = [32 * 32 * 27 * 32, 16 * 16 * 288 * 32, 16 * 16 * 288 * 64, 8 * 8 * 576 * 64, 640]
    plain = 512 * 2 * (3 * sum(layers) - layers[0])
    assert training_flop(WORKLOADS["W4"]) == plain
    gate_and_expert = 2 * 64 + 2 * 64 * 128
    assert training_flop(WORKLOADS["M1"]) == plain + 512 * 6 * gate_and_expert
    assert training_flop(WORKLOADS["W4b64"]) == 4 * plain
    # A block: q, k, v and out, the pairs of tokens twice, an MLP; then the head. 1,920 examples.
    block = 64 * (4 * 96 * 96 + 2 * 64 * 96 + 2 * 96 * 256)
    assert training_flop(WORKLOADS["T1"]) == 1920 * 6 * (2 * block + 64 * 96 * 256)


def test_slow_contestants_have_fewer_turns(monkeypatch):
    monkeypatch.setattr(timing, "_TURN_SECONDS", 0.2)
    durations = {"quick": 0.001, "slow": 3.0, "very slow": 11.0}
    calls = []
    monkeypatch.setattr(timing, "_seconds", lambda name: calls.append(name) or durations[name])
    taken = timing.interleave(list(durations))
    assert [len(seconds) for seconds in taken] == [50, 2, 1]
    assert [calls.count(name) for name in durations] == [52, 4, 1]


def test_clients_are_timed_against_the_naive_round():
    figures = clients.measure("tiny", PLAIN)
    assert_positive(figures, "seconds", "ratio", "examples_per_second", "share_of_peak")
    assert figures["seconds"] <= figures["seconds_median"]
    assert figures["gflop"] == 12 * 2 * (3 * (16 * 8 + 80) - 16 * 8) / 1e9


@pytest.mark.parametrize("workload", [MIXTURE, TEXT], ids=["pictures", "text"])
def test_a_mixture_is_timed_alone(workload):
    figures = clients.measure("tiny", workload, reference=False)
    assert_positive(figures, "seconds", "share_of_peak")
    assert "ratio" not in figures


def test_a_mixture_is_compared_with_its_backbone(monkeypatch):
    def make_rounds(workload, mesh):
        return partial(time.sleep, 0.06 if workload.experts else 0.02)

    monkeypatch.setattr(moe, "make_rounds", make_rounds)
    figures = moe.measure_client(WORKLOADS["M1"], WORKLOADS["W4"])
    assert_positive(figures, "seconds_per_example", "seconds_per_example_without_experts")
    assert figures["ratio"] > 1


def test_both_forms_of_the_expert_layer_agree():
    rng = np.random.default_rng(1)
    shapes = {"w_in": (3, 5, 4), "b_in": (3, 4), "w_out": (3, 4, 5), "b_out": (3, 5)}
    experts = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    x, probability = rng.standard_normal((6, 5), np.float32), rng.random(6, np.float32)
    chosen = rng.integers(0, 3, 6)
    both = [
        jax.jit(layer)(experts, x, chosen, probability)
        for layer in (moe.dense_layer, moe.ragged_layer)
    ]
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)
    assert_positive(moe.measure_layer(2, 4, repeats=2), "dense_seconds", "ragged_seconds", "ratio")


def test_evaluation_is_timed_against_whole_models():
    figures = evaluate.measure(8, tests=10, image=(4, 4, 1))
    assert_positive(figures, "seconds", "reference_seconds", "ratio")


def test_rounds_of_a_large_federation_are_timed():
    figures = scale.measure(clients=30, experts=4, per_round=4)
    assert_positive(figures, "seconds", "assign_seconds", "state_bytes", "peak_bytes")
    assert figures["assign_seconds"] < figures["seconds"]


def test_a_launch_is_timed(tmp_path, monkeypatch):
    launcher = tmp_path / "launcher"
    launcher.write_text(
        f"""#!{sys.executable}
import pathlib, os, sys, time
[workdir] = [word.split("=")[1] for word in sys.argv if word.startswith("--workdir=")]
pathlib.Path(workdir).mkdir()
(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "program").write_text("12345")
(pathlib.Path(workdir) / "metrics.jsonl").write_text("{{}}\\n")
time.sleep(0.3)
sys.exit("--fail" in sys.argv)
"""
    )
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    programs = tmp_path / "programs"
    programs.mkdir()
    figures = startup.measure(programs)
    assert figures["program_bytes"] == 5
    assert 0 < figures["seconds_to_first_round"] < figures["seconds"] - 0.1
    with pytest.raises(subprocess.CalledProcessError):
        startup.measure(programs, "--fail")
