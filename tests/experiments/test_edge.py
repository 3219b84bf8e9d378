"""Whole runs of the main job on unreliable clients and devices."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.build import build, make_aggregator, make_uplink
from experiments.configs import digits
from experiments.train import train
from experiments.workdir import Workdir
from flexmoe_jax.errors import InputError


def configure(**fields: object) -> ConfigDict:
    config = digits.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def run(config: ConfigDict, folder) -> tuple[str, list]:
    workdir = Workdir(folder)
    return train(config, workdir), workdir.read()


UNRELIABLE = {"rounds": 12, "edge__dropout_during": 0.3, "faults__share": 0.1}


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


def test_without_quarantine_one_of_them_is_the_end(tmp_path):
    config = configure(**UNRELIABLE, server__quarantine=False)
    status, rows = run(config, tmp_path / "run")
    assert status == "diverged"
    assert rows[-1]["eval/global_accuracy"] < 0.2


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


def test_compression_and_robust_means_reach_the_algorithm():
    fields = {"model__backbone": "mlp", "upload__compression": "int8", "server__clip": 5.0}
    plain = build(configure(model__backbone="mlp"))
    config = configure(**fields, server__aggregator="median")
    compressed = build(config)
    assert compressed.payload.shared_down == plain.payload.shared_down
    assert compressed.payload.shared_up < 0.26 * plain.payload.shared_up
    assert (make_uplink(config).clip, make_uplink(config).compressor.lossless) == (5.0, False)
    median = make_aggregator(config.server)
    assert isinstance(median, partial)
    assert median.keywords == {"trim": 0.5}


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
        ({"upload__compression": "gzip"}, "upload.compression=gzip"),
        ({"faults__kind": "lie"}, "faults.kind=lie"),
        ({"assignment__movement": -1.0}, "assignment.movement=-1.0"),
    ],
)
def test_bad_fields_are_refused(fields, line):
    with pytest.raises(InputError, match=line):
        build(configure(**fields))
