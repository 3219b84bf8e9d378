from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.build import build, local_optimizer, notes_on_devices
from experiments.cli import flat_fields
from experiments.configs import base, digits, emnist_digits, text
from experiments.examples import load_partitioned, split_clients
from experiments.model import check_model, finished, model_maker
from experiments.report import write_report
from experiments.rounds import existing, imbalance, run_rounds
from experiments.studies.methods import METHODS, choose
from experiments.train import train
from experiments.workdir import Workdir
from flexmoe_jax import models
from flexmoe_jax.errors import InputError
from flexmoe_jax.options import LocalSteps
from flexmoe_jax.tasks import classification
from flexmoe_jax.types import Array, Params


def measurements(path, owners: int) -> ConfigDict:
    """Writes data of 8 features, 3 of which give the class, and of owners; returns the config."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    features = rng.normal(size=(400, 8)) + 4 * np.eye(3, 8)[labels]
    np.savez(
        path,
        train_images=features[:300],
        train_labels=labels[:300],
        test_images=features[300:],
        test_labels=labels[300:],
        classes=["low", "middle", "high"],
        train_clients=100 + np.arange(300) % owners,
    )
    config = base.get_config()
    fields = {
        "rounds": 3,
        "data.name": str(path),
        "partition.name": "natural",
        "clients.count": 5,
        "model.backbone": "mlp",
        "model.widths": (16,),
        "model.experts": 4,
        "model.hidden": 16,
        "local.epochs": 4,
    }
    config.update_from_flattened_dict(fields)
    return config


def test_a_shortlist_of_all_experts_costs_newcomers_as_much_as_none(tmp_path):
    config = measurements(tmp_path / "mine.npz", owners=5)
    fields = {"rounds": 1, "clients.newcomers": 2, "clients.capacity": 2, "model.router": True}
    config.update_from_flattened_dict(fields)
    sent = []
    for shortlist in (0, config.model.experts, 2):
        config.clients.shortlist = shortlist
        workdir = Workdir(tmp_path / str(shortlist))
        assert train(config, workdir) == "finished"
        (row,) = workdir.read()
        sent.append([row[f"comm/newcomer_bytes_{way}"] for way in ("down", "up")])
    assert sent[0] == sent[1]
    assert all(np.less(sent[2], sent[0]))
    with np.load(tmp_path / "0" / "arrays.npz") as arrays:
        trained, _ = split_clients(config)
        assert arrays["ids"].tolist() == (100 + trained).tolist()


def test_ones_own_features_and_clients_are_trained_on(tmp_path):
    config = measurements(tmp_path / "mine.npz", owners=5)
    assert train(config, Workdir(tmp_path / "run")) == "finished"
    rows = Workdir(tmp_path / "run").read()
    assert rows[-1]["eval/server_accuracy"] > 0.9
    dataset, parts = load_partitioned(config)
    assert dataset.classes == ("low", "middle", "high")
    for client, part in enumerate(parts):
        assert part.tolist() == list(range(client, 300, 5))


def with_arrays(path, **changes) -> None:
    """Adds arrays to a file."""
    with np.load(path) as file:
        np.savez(path, **{**file, **changes})


def test_natural_clients_are_measured_on_their_own_test_examples(tmp_path):
    """Five hospitals, one without test examples; an unknown array stays in the report."""
    config = measurements(tmp_path / "mine.npz", owners=5)
    owner = np.array(["b", "a", "e", "d"])[np.arange(100) % 4]  # c has none
    named = np.array(list("abcde"))[np.arange(300) % 5]
    with_arrays(tmp_path / "mine.npz", train_clients=named, test_clients=owner, val_images=[1])
    assert train(config, Workdir(tmp_path / "run")) == "finished"
    row = Workdir(tmp_path / "run").read()[-1]
    assert (row["eval/clients"], row["eval/personal_clients"]) == (5, 4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["personal_measured_on"] == "clients' own test examples"
    with np.load(tmp_path / "run" / "arrays.npz") as arrays:
        assert arrays["ids"].tolist() == list("abcde")
    (note,) = summary["notes"]
    assert note.endswith("mine.npz holds arrays that are not used: val_images")
    page = (write_report([tmp_path / "run"])).read_text()
    assert "personal figures on clients&#39; own test examples" in page
    assert "arrays that are not used: val_images" in page


def test_what_figures_cannot_tell_stays_in_the_summary(tmp_path):
    config = measurements(tmp_path / "mine.npz", owners=5)
    experiment = build(config)
    assert experiment.personal == "common test set, weighted to each client's label shares"
    (note,) = experiment.notes
    assert note.startswith("natural clients without test examples of their own (test_clients)")
    config.partition.name = "iid"
    (note,) = build(config).notes
    assert note.startswith("train_clients are not used: partition.name=iid deals the examples")
    config.execution.expert_devices = 2
    (note,) = notes_on_devices(config, experiment.simulation.setting.federation)
    assert note.endswith("the model of all experts is not evaluated")


def test_test_examples_of_strangers_are_refused(tmp_path):
    config = measurements(tmp_path / "mine.npz", owners=5)
    with_arrays(tmp_path / "mine.npz", test_clients=100 + np.arange(100) % 7)
    with pytest.raises(InputError, match=r"test_clients=105: is one of 2 owners without a"):
        build(config)


def test_another_number_of_clients_than_own_the_data_is_refused(tmp_path):
    config = measurements(tmp_path / "mine.npz", owners=6)
    with pytest.raises(InputError, match=r"^clients\.count=5: .* 6 owners; set it to 6$"):
        build(config)


def test_features_do_not_fit_a_backbone_of_images(tmp_path):
    config = measurements(tmp_path / "mine.npz", owners=5)
    config.model.backbone = "convnet"
    with pytest.raises(InputError, match=r"^model\.backbone=convnet: .*\(8,\).* choose mlp$"):
        build(config)


def test_features_are_not_mirrored(tmp_path):
    config = measurements(tmp_path / "mine.npz", owners=5)
    config.local.augment = "flip"
    with pytest.raises(InputError, match=r"^local\.augment=flip: .* not images .* say none$"):
        build(config)
    config.local.augment = "flips"
    with pytest.raises(InputError, match=r"^local\.augment=flips: .* none, flip, crop, crop_flip$"):
        build(config)


class BatchNormed(nn.Module):
    running: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.BatchNorm(use_running_average=self.running)(x).mean(axis=(1, 2))


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dropout(0.5, deterministic=False)(x).mean(axis=(1, 2))


class Shaped(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(8)(x.reshape(self.shape))


def checked(backbone: nn.Module, images: np.ndarray) -> None:
    module = models.MoEClassifier(backbone=backbone, classes=3, experts=2, hidden=4)
    model = models.classifier(module).after(lambda x: x.astype(jnp.float32))
    check_model(model, classification(), {"images": images}, type(backbone).__name__)


@pytest.mark.parametrize(
    ("backbone", "line"),
    [
        (BatchNormed(running=True), "BatchNormed: .*with batch_stats"),
        (BatchNormed(running=False), "BatchNormed: .*with batch_stats"),
        (Dropping(), 'Dropping: .*PRNG for "dropout"'),
        (Shaped((-1, 4, 4, 1)), r"Shaped: it turns images \(2, 4, 4, 1\) into \(2, 4, 4, 8\)"),
        (Shaped((1, -1)), r"Shaped: it turns images \(2, 4, 4, 1\) into \(1, 8\)"),
        (Shaped((-1, 5)), "Shaped: .*reshape"),
        (models.PersonalMixture(models.make_backbone("mlp"), Dropping()), "PersonalMixture: "),
    ],
)
def test_a_backbone_that_does_not_fit_is_one_line(backbone: nn.Module, line: str):
    with pytest.raises(InputError, match=rf"^model\.backbone={line}.*\(B, D\)") as caught:
        checked(backbone, np.zeros((2, 4, 4, 1), np.uint8))
    assert "\n" not in str(caught.value)


def test_a_backbones_own_refusal_is_kept():
    with pytest.raises(InputError, match=r"^model\.widths="):
        checked(models.make_backbone("cnn"), np.zeros((2, 3, 3, 1), np.uint8))


def test_the_default_is_flex_as_studies_have_it():
    for config in (digits, emnist_digits):
        fields = flat_fields(config.get_config())
        assert {field: fields[field] for field in METHODS["flex"]} == METHODS["flex"]


def test_a_studys_config_as_it_stands_is_no_method_of_the_shipped_studies():
    assert choose("random", "config") == {"random": METHODS["random"], "config": {}}
    assert "config" not in METHODS


def test_experts_step_further_than_the_rest():
    options = LocalSteps(expert_rate=4.0)
    part = {"w": jnp.zeros(1)}
    params = Params(shared=part, experts=part, gate=part, private=part)
    transform = local_optimizer(options)
    gradient = jax.tree.map(jnp.ones_like, params)
    steps, _ = transform.update(gradient, transform.init(params), params)
    far, near = -4 * options.learning_rate, -options.learning_rate
    for found, expected in zip(steps, (near, far, far, near), strict=True):
        assert np.allclose(found["w"], expected)


def test_clients_with_rules_are_measured_by_their_own(tmp_path):
    config = base.get_config()
    fields = {
        "rounds": 4,
        "data.train_limit": 400,
        "data.test_limit": 120,
        "partition.name": "iid",
        "partition.rule": "relabelled",
        "clients.count": 8,
        "clients.capacity": 1,
        "model.backbone": "mlp",
        "model.experts": 4,
        "model.hidden": 32,
        "local.epochs": 4,
        "assignment.exploration": 0.0,
        "fitness.affinity": 1.0,
        "fitness.profile": "given",
        "eval.prior": False,
    }
    config.update_from_flattened_dict(fields)
    assert train(config, Workdir(tmp_path / "run")) == "finished"
    run = Workdir(tmp_path / "run")
    last, summary = run.read()[-1], json.loads((tmp_path / "run" / "summary.json").read_text())
    # Each client has an expert for its labels; a model's answer is right for a quarter of the rest.
    assert last["eval/personal_accuracy"] > 0.6
    assert last["eval/global_accuracy"] < 0.35
    assert any("at most 25.0 % of the common test set" in note for note in summary["notes"])
    experiment = build(config)
    assert experiment.personal == "test examples of each client's own rules and classes"
    owns = np.asarray(experiment.about.owns)
    assert owns.shape == (8, 40)
    assert (owns.reshape(8, 4, 10).any(axis=2).sum(axis=1) == 1).all()


def test_text_has_no_rules():
    config = base.get_config()
    config.update_from_flattened_dict(
        {"data.name": "python_topics", "task.name": "next_token", "partition.rule": "turned"}
    )
    config.partition.name = "domains"
    config.model.backbone = "transformer"
    with pytest.raises(InputError, match=r"partition\.rule=turned: rules are of labelled"):
        build(config)


def test_whole_models_are_sent_to_all_who_are_asked_about_them():
    config = digits.get_config()
    config.update_from_flattened_dict(
        {
            "rounds": 1,
            "data.train_limit": 200,
            "data.test_limit": 50,
            "clients.count": 4,
            "clients.per_round": 3,
            "clients.capacity": 1,
            "model.backbone": "mlp",
            "model.widths": (8,),
            "model.experts": 3,
            "model.hidden": 8,
            "model.whole_experts": True,
            "assignment.policy": "greedy",
            "fitness.score": "loss",
            "fitness.probe": "all",
            "fitness.affinity": 0.0,
        }
    )
    before = config.to_json()
    experiment = build(config)
    assert config.to_json() == before
    state = experiment.simulation.init(jax.random.key(0))
    state, metrics = next(run_rounds(config, experiment, state))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.server.experts))
    assert not jax.tree.leaves(state.server.shared)
    # Every expert there, 4 bytes a number; one back, and what is said of all of them.
    assert metrics["comm/bytes_down"] == 3 * 4 * parameters
    assert metrics["comm/bytes_up"] == 3 * (4 * parameters // 3 + 12 + 3 * 12)
    config.model.router = True
    with pytest.raises(InputError, match=r"model\.router=True: whole models have no gate"):
        build(config)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"model.local_backbone": True}, r"model\.local_backbone=True: transformer has none"),
        ({"model.moe_stages": "1,2"}, r"model\.moe_stages=1,2: transformer has none"),
        ({"model.widths": (16, 64)}, r"model\.widths=\(16, 64\): transformer has one width"),
        ({"assignment.diversity": 1.0}, r"assignment\.diversity=1\.0: text has no labels"),
        ({"local.prior": 1.0}, r"local\.prior=1\.0: the task's outputs have no classes"),
        ({"clients.shortlist": 3}, r"clients\.shortlist=3: there are no newcomers"),
    ],
)
def test_what_text_or_a_decoder_has_no_use_for_is_refused(fields, line):
    config = text.get_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=line):
        build(config)


def test_whole_models_compute_in_the_precision_that_is_asked_for():
    config = text.get_config()
    config.update_from_flattened_dict(
        {"model.whole_experts": True, "model.router": False, "model.dtype": "bfloat16"}
    )
    model = finished(model_maker(config), config, 256, lambda inputs: inputs)
    tokens = jnp.zeros((2, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    program = jax.make_jaxpr(lambda p, x: model.apply(p, x, {})[0])(params, tokens)
    assert "bf16" in str(program)


def test_balance_is_that_of_several_experts() -> None:
    assert imbalance(np.array([[1.0, 3.0], [2.0, 2.0]])) == 0.25
    figures = {"load/assigned_cv": imbalance(np.array([[5.0]])), "train/loss": 1.0}
    assert existing(figures) == {"train/loss": 1.0}
