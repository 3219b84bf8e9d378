"""Whole runs of the main job on unreliable clients and devices."""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.build import build, make_aggregator, make_codec
from experiments.configs import digits, emnist_digits
from experiments.edge import capacity_in_memory
from experiments.fields import read
from experiments.rounds import DivergedError, check_health
from experiments.train import train
from experiments.workdir import Workdir
from flexmoe_jax import models, server, simulation
from flexmoe_jax.edge import TIERS
from flexmoe_jax.errors import InputError
from flexmoe_jax.options import Aggregation, UploadOptions
from flexmoe_jax.simulation.network import instant_devices
from flexmoe_jax.types import RoundReport


def configure(**fields: object) -> ConfigDict:
    config = digits.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def run(config: ConfigDict, folder) -> tuple[str, list]:
    workdir = Workdir(folder)
    return train(config, workdir), workdir.read()


UNRELIABLE = {
    "rounds": 12,
    "eval__every": 12,
    "edge__dropout_during": 0.3,
    "faults__share": 0.1,
}


def test_rounds_without_any_update_are_told(tmp_path, capfd):
    fields = {"rounds": 2, "eval__every": 2, "edge__mix": "phone", "edge__deadline": 1e-9}
    status, rows = run(configure(**fields, data__train_limit=300), tmp_path / "run")
    assert status == "finished"
    assert [row["clients/delivered"] for row in rows] == [0, 0]
    line = "no update arrived in 2 of 2 rounds: nothing was learned"
    assert line in capfd.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert line in summary["notes"]


def test_dropouts_and_clients_that_send_no_numbers_do_not_stop_the_main_job(tmp_path):
    status, rows = run(configure(**UNRELIABLE), tmp_path / "run")
    assert status == "finished"
    assert rows[-1]["eval/global_accuracy"] >= 0.90
    assert all(row["clients/asked"] == 20 for row in rows)
    assert sum(row["clients/quarantined"] for row in rows) > 0
    # Two of 20 are faulty, and 30 % of the rest are lost on the way.
    delivered = np.mean([row["clients/delivered"] for row in rows]) / 20
    assert delivered == pytest.approx(0.7, abs=0.1)
    down, up = (sum(row[f"comm/bytes_{way}"] for row in rows) for way in ("down", "up"))
    assert up < 0.85 * down


SMALL = {
    "model__backbone": "mlp",
    "model__widths": (16,),
    "model__experts": 4,
    "model__hidden": 16,
    "data__train_limit": 400,
    "data__test_limit": 100,
    "clients__count": 10,
    "partition__min_per_client": 5,
    "eval__every": 100,
    "execution__devices": 1,
}


def test_without_quarantine_one_of_them_is_the_end(tmp_path, capsys):
    # Losses are those of the round before: the last round's model is looked at, too.
    config = configure(**SMALL, rounds=1, faults__share=0.1, server__quarantine=False)
    status, rows = run(config, tmp_path / "run")
    assert (status, rows) == ("diverged", [])
    output = capsys.readouterr().out
    assert output.count("round 1: the model is no longer a number, with local.learning_rate=") == 1
    assert "or set server.quarantine=True" in output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize(("kind", "factor"), [("scale", 1000.0), ("flip", -30.0), ("noise", 1.0)])
def test_updates_too_long_are_refused_by_default_and_said_so(
    tmp_path, capsys, monkeypatch, kind, factor
):
    # A flip alone changes no length; noise of 10 times the update's does.
    monkeypatch.setitem(simulation.FAULTS, kind, simulation.FAULTS[kind]._replace(factor=factor))
    fields = {"rounds": 6, "faults__share": 0.1, "faults__kind": kind}
    status, rows = run(configure(**SMALL, **fields), tmp_path / "run")
    assert status == "finished"
    assert [row["clients/quarantined"] for row in rows] == [10, 1, 1, 1, 1, 1]
    assert [row.get("clients/void_round", False) for row in rows] == [True, *[False] * 5]
    assert "train/loss" not in rows[0]
    assert "train/loss" in rows[1]
    output = capsys.readouterr().out
    assert output.count("round 1: all updates refused: some were too long") == 1


def test_of_honest_clients_none_is_refused(tmp_path):
    _, rows = run(configure(**SMALL, rounds=6), tmp_path / "run")
    assert sum(row["clients/quarantined"] for row in rows) == 0


def report(quarantined, examples, void=False, finite=True, loss=None) -> RoundReport:
    fields = loss or np.zeros(3), examples, examples, np.zeros((1, 1)), quarantined, void, finite
    return RoundReport(*map(np.asarray, fields))


def test_health_is_that_of_honest_clients_and_of_the_model():
    clients, faulty = np.array([2, 0, 5]), np.array([True, False, True, False, False])  # 5: padding
    check = partial(check_health, clients=clients, round_index=3, config=configure())
    fine = report([True, False, False], [0, 7, 0])
    check(fine, faulty=faulty)
    # A cohort of faulty clients alone says nothing of the run.
    nobody = report([True, True, False], [0, 0, 0])
    check(nobody, faulty=faulty)
    check(report([False] * 3, [0, 0, 0]), faulty=faulty)
    honest = faulty & (np.arange(5) != 0)
    check(report([True, True, False], [0, 0, 0], void=True), faulty=honest)
    for broken, who, line in (
        (
            nobody,
            honest,
            "round 4: every update is not a number, or too long for server.norm_factor",
        ),
        # At least one client must train.
        (nobody, np.ones(5, bool), "round 4: every update is not a number"),
        (report([False] * 3, [5, 7, 0], finite=False), faulty, "round 4: the model is no longer"),
        (fine._replace(loss=np.array([0, np.nan, 0])), faulty, "round 4: the loss of clients 0 is"),
    ):
        with pytest.raises(DivergedError, match=line) as end:
            check(broken, faulty=who)
        assert "local.learning_rate=0.1: lower it" in str(end.value)


def test_only_secret_noise_is_reported_as_privacy(tmp_path, capsys):
    private = {**SMALL, "rounds": 2, "server__clip": 1.0, "server__noise_multiplier": 20.0}
    private |= {"fitness__affinity": 0.0}
    losses = []
    for name, noise in (("a", "secret"), ("b", "secret"), ("c", "simulated"), ("d", "simulated")):
        status, rows = run(configure(**private, server__noise=noise), tmp_path / name)
        assert status == "finished"
        losses.append(rows[1]["train/loss"])
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        reported = {key for key in (*rows[-1], *summary) if "privacy" in key}
        key = "privacy/epsilon" if noise == "secret" else "privacy/epsilon_simulated"
        assert reported == {key, f"final/{key}", f"best/{key}"}
        # Two rounds of ρ = 1/800 each: 0.0025 + 2 √(0.0025 ln 10^5) = 0.342.
        assert rows[-1][key] == pytest.approx(0.342, abs=1e-3)
        said = "server.noise=simulated: whoever knows this config" in capsys.readouterr().out
        assert said == (noise == "simulated")
    assert losses[0] != losses[1]
    assert losses[2] == losses[3]


DEVICES = {
    "rounds": 3,
    "model__backbone": "mlp",
    "edge__mix": "sensor:2,phone:1,gateway:1",
    "edge__availability": "markov",
    "clients__per_round": 8,
    "clients__capacity": "memory",
    "model__hidden": 512,
    "local__optimizer": "adam",
    "local__learning_rate": 0.002,
    "eval__every": 3,
    "execution__devices": 1,
}


def test_devices_decide_capacity_cohort_and_time(tmp_path):
    config = configure(**DEVICES)
    experiment = build(config)
    devices = experiment.network.devices
    assert devices is not None
    assert sorted(set(devices.tiers)) == ["gateway", "phone", "sensor"]
    assert (devices.tiers == "sensor").sum() == 10
    status, rows = run(config, tmp_path / "run")
    assert status == "finished"
    for t, row in enumerate(rows):
        cohort = experiment.network.cohort(t)
        assert row["clients/asked"] == len(cohort) <= 8
        # A round is as long as its slowest client computes, at the least.
        slowest = (experiment.network.examples / devices.speed)[cohort].max()
        assert row["time/simulated_seconds"] > slowest
    assert "time/simulated_seconds" in rows[0]


def capacity_of(memory: int, images: np.ndarray, config: ConfigDict) -> list[int]:
    """k_c of one device, for ten classes of images."""
    device = instant_devices(1)._replace(memory=np.array([float(memory)]))
    module = models.MoEClassifier(
        models.make_backbone(config.model.backbone, widths=config.model.widths or ()),
        classes=10,
        experts=config.model.experts,
        hidden=config.model.hidden,
    )
    model = models.classifier(module).after(lambda x: x.astype(jnp.float32) / 255)
    ownership = models.Ownership(shared_gate=config.model.gate == "shared")
    return capacity_in_memory(model, {"images": images}, device, config, ownership).tolist()


def test_capacity_in_memory_by_hand():
    config = configure(model__backbone="mlp", model__widths=(16,), model__hidden=8)
    images = np.zeros((2, 8, 8, 1), np.uint8)
    # In numbers: backbone 64·16 + 16, head 16·10 + 10; an expert 16·8 + 8 + 8·16 + 16, and its row
    # of the gate, 16 + 1, which travels with it.
    shared, expert = 1210, 297
    # Outputs for each of 10 examples: Dense and backbone 16 each, gate 1, expert and layer 16 each,
    # head 10.
    activations = 10 * 75
    needed = [4 * (activations + 2 * (shared + k * expert)) for k in (1, 2, 3)]
    assert [capacity_of(memory, images, config) for memory in needed] == [[1], [2], [3]]
    assert capacity_of(needed[2] - 1, images, config) == [2]
    # Adam keeps two more numbers of every parameter.
    config.local.optimizer = "adam"
    adam = 4 * (activations + 4 * (shared + expert))
    assert capacity_of(adam, images, config) == [1]
    with pytest.raises(InputError, match=rf"^edge\.memory={adam - 1}: .*needs {adam} bytes"):
        capacity_of(adam - 1, images, config)


def test_a_sensor_trains_half_of_the_experts_of_the_study():
    # The windows in which convolutions are laid out here would not fit in eight megabytes.
    config = emnist_digits.get_config()
    images = np.zeros((2, 28, 28, 1), np.uint8)
    assert capacity_of(TIERS["sensor"].memory, images, config) == [4]


def test_compression_and_robust_means_reach_the_algorithm():
    fields = {"model__backbone": "mlp", "upload__compression": "int8", "server__clip": 5.0}
    plain = build(configure(model__backbone="mlp"))
    config = configure(**fields, server__aggregator="median")
    compressed = build(config)
    assert compressed.payload[0].shared_down == plain.payload[0].shared_down
    assert compressed.payload[0].shared_up < 0.26 * plain.payload[0].shared_up
    assert compressed.payload[0].expert_up < 0.26 * plain.payload[0].expert_up
    assert read(server.Admission, config).clip == 5.0
    assert not make_codec(read(UploadOptions, config)).compressor.lossless


@pytest.mark.parametrize(
    ("name", "centre"),
    # Of ten numbers the mean is 13, the median 2, without one at either end the mean 25/8; more
    # than half of them are 2.
    [("mean", 13), ("median", 2), ("trimmed_mean", 3.125), ("geometric_median", 2)],
)
def test_the_aggregator_is_the_one_that_is_named(name, centre):
    options = Aggregation(aggregator=name, trim=0.1)
    aggregator = make_aggregator(options) or server.mean()
    values = jnp.array([1.0, 1, 2, 2, 2, 2, 2, 2, 12, 104])
    arrived = server.Arrived({"w": values}, {}, {}, jnp.ones(10), {})
    total = aggregator.add(aggregator.zero({"w": jnp.zeros(())}, {}, 10, 1), arrived)
    sums = aggregator.mean(total, server.Due(jnp.array(10.0), {}, jax.random.key(0)))
    assert float(sums.shared["w"] / sums.shared_weight) == pytest.approx(centre, abs=0.1)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"clients__capacity": "memory"}, "clients.capacity=memory: .*edge.mix"),
        ({"edge__deadline": 3.0}, "edge.deadline=3.0: .*edge.mix"),
        ({"edge__availability": "markov"}, "edge.availability=markov: .*edge.mix"),
        ({"edge__late": "wait"}, "edge.late=wait: choose one of drop, partial"),
        ({"edge__over_select": 0.5}, "edge.over_select=0.5: choose a number of at least 1"),
        ({"edge__dropout_during": 1.5}, "edge.dropout_during=1.5"),
        ({"edge__mix": "sensr:1"}, "edge.mix=sensr: .*sensor"),
        ({"clients__sampling": "size"}, "clients.sampling=size: choose one of"),
        ({"server__noise_multiplier": 1.0}, "server.noise_multiplier=1.0: .*server.clip"),
        ({"server__aggregator": "meen"}, "server.aggregator=meen: did you mean mean"),
        ({"server__trim": 0.7}, "server.trim=0.7"),
        ({"server__delta": 0.0}, "server.delta=0.0"),
        ({"server__norm_factor": 0.5}, "server.norm_factor=0.5: choose 0 for none, or 1 or more"),
        ({"server__noise": "none"}, "server.noise=none: choose one of secret, simulated"),
        ({"upload__compression": "gzip"}, "upload.compression=gzip"),
        ({"faults__kind": "lie"}, "faults.kind=lie"),
        ({"assignment__movement": -1.0}, "assignment.movement=-1.0"),
    ],
)
def test_bad_fields_are_refused(fields, line):
    with pytest.raises(InputError, match=line):
        build(configure(**fields))
