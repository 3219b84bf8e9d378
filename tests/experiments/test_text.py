"""Text data with the launcher, run as users run it, and the messages about its fields."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.build import build
from experiments.configs import languages, text
from experiments.examples import OWN_DOMAINS, load_examples
from flexmoe_jax.errors import InputError
from tests.data.conftest import write_texts
from tests.experiments.test_report import Page
from tests.experiments.test_train import launch, rows

WORDS = {"one": "the cat sat on the mat. ", "two": "ein Hund lief durch den Wald. "}


SMALL = {
    "data.length": 16,
    "clients.count": 4,
    "partition.domains_per_client": 1,
    "partition.bytes_per_client": 0,
    "model.widths": "(16,)",
    "model.depth": 1,
    "model.experts": 4,
    "model.hidden": 16,
    "rounds": 3,
    "local.learning_rate": 0.01,
    "eval.every": 1,
}


def launch_languages(workdir, fields):
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return launch(
        f"--workdir={workdir}", *flags, config="experiments/configs/languages.py", report=True
    )


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "texts"
    place.mkdir()
    for name, words in WORDS.items():
        (place / f"{name}.txt").write_text(words * 100)
    return place


def config_of(folder):
    config = languages.get_config()
    fields = {
        "data.dir": str(folder),
        "data.length": 16,
        "clients.count": 4,
        "partition.domains_per_client": 1,
        "partition.bytes_per_client": 0,
    }
    config.update_from_flattened_dict(fields)
    return config


def test_clients_learn_texts_of_their_own(folder, tmp_path):
    workdir = tmp_path / "run"
    process = launch_languages(workdir, SMALL | {"data.dir": folder})
    assert process.returncode == 0, process.stderr
    assert "all losses in bits a byte:" in process.stdout
    first, *_, last = rows(workdir)
    assert last["train/loss"] < first["train/loss"] < 1.5 * np.log(256)
    assert last["eval/personal_loss"] < first["eval/personal_loss"]
    shown = process.stdout.splitlines()[-2].split()
    assert shown[:3] == [
        "3",
        f"{last['train/loss'] / np.log(2):.3f}",
        f"{last['eval/personal_loss'] / np.log(2):.3f}",
    ]
    # Two clients have all 67 windows of 1,080 bytes in their steps, two have 10 steps of 8.
    assert sum(last["load/usage"]) == 2 * (67 + 80) * 16
    assert json.loads((workdir / "summary.json").read_text())["personal_measured_on"] == OWN_DOMAINS
    arrays = np.load(workdir / "arrays.npz")
    assert arrays["classes"].tolist() == ["one", "two"]
    assert (arrays["label_counts"] > 0).sum(axis=0).tolist() == [2, 2]
    page = Page(workdir / "report" / "index.html")
    assert f"personal figures on {OWN_DOMAINS}" in page.text
    assert "bits a byte" in page.text


def test_clients_learn_the_texts_of_a_prepared_data_set(tmp_path):
    def columns(tfds):
        return {"text": tfds.features.Text(), "author": tfds.features.Text()}

    texts = [{"text": words * 30, "author": author} for author, words in WORDS.items()] * 3
    prepared = write_texts(tmp_path / "tfds", "books", {"train": texts, "test": texts[:2]}, columns)
    workdir = tmp_path / "run"
    fields = SMALL | {"data.name": "books", "data.dir": prepared, "data.domain": "author"}
    process = launch_languages(workdir, fields)
    assert process.returncode == 0, process.stderr
    first, *_, last = rows(workdir)
    assert last["train/loss"] < first["train/loss"] < 1.5 * np.log(256)
    assert last["eval/personal_loss"] < first["eval/personal_loss"]
    assert np.load(workdir / "arrays.npz")["classes"].tolist() == ["one", "two"]


def test_hashes_are_of_what_is_read_and_not_of_how_it_is_dealt_out(folder):
    config = config_of(folder)
    first = load_examples(config).hashes
    config.seed = 1
    assert load_examples(config).hashes == first
    texts = {name: (folder / f"{name}.txt").read_text() for name in WORDS}
    moved = texts["one"][-1] + texts["two"]
    changes = (
        {"one": "x" + texts["one"][1:]},  # one byte
        {"one": texts["one"][:-1], "two": moved},  # the same bytes, cut elsewhere
    )
    for change in changes:
        for name, words in {**texts, **change}.items():
            (folder / f"{name}.txt").write_text(words)
        assert load_examples(config).hashes != first


def test_pythons_own_topics_are_dealt_out():
    config = text.get_config()
    examples = load_examples(config)
    assert len(examples.counts) == config.clients.count
    assert ((examples.counts > 0).sum(axis=1) == config.partition.domains_per_client).all()
    assert len(examples.test["tokens"]) == config.data.test_limit


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"data.dir": ""}, "data.dir=: name a folder of \\*.txt files"),
        ({"partition.name": "iid"}, "partition.name=iid: text is dealt out by domains"),
        ({"data.name": "digits"}, "task.name=next_token: is learnt from text: data.name=text"),
        ({"data.name": "digits", "task.name": "classification"}, "partition.name=domains: deals"),
        ({"task.name": "next_tokn"}, "task.name=next_tokn: did you mean next_token"),
        ({"task.name": "classification"}, "task.name=classification: text takes next_token"),
        ({"model.heads": 5}, "model.heads=5: choose a divisor of half of model.width=96"),
        ({"model.positions": "none"}, "model.positions=none: choose one of rotary, learnt"),
        ({"clients.count": 1}, "partition.domains_per_client=1: 1 clients leave some"),
        ({"data.length": 2_000}, "data.length=2000: one has 2160 bytes for 2 clients, not 2001"),
        (
            {"data.length": 1_000},
            "data.length=1000: the longest of the domains' test texts has 300 bytes",
        ),
    ],
)
def test_fields_that_do_not_fit_text_are_refused(folder, fields, line):
    config = config_of(folder)
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=f"^{line}"):
        build(config)
