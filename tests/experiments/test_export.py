"""Exported models, loaded with JAX alone, without this package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export
from safetensors.numpy import load_file

from experiments import export as command
from experiments.build import build
from experiments.configs import digits, text
from experiments.examples import load_examples
from experiments.export import export, write_folder
from experiments.portable import compiled, limits, make_portable, run_config, standalone
from experiments.train import train
from experiments.workdir import Workdir
from flexmoe_jax import simulation
from flexmoe_jax.checkpoint import Checkpoints
from flexmoe_jax.errors import InputError
from tests.limits import HANGS

ROOT = Path(__file__).parents[2]
ALONE = ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers", "safetensors")
# The folder's own instructions, on other inputs.
LOAD = """
import importlib.util, os, re, sys
sys.path.append(sys.argv[1])
for name in ("flexmoe_jax", "experiments", "flax", "optax"):
    assert importlib.util.find_spec(name) is None, name
import numpy as np
inputs = np.load(sys.argv[2])
for folder in sys.argv[3:]:
    os.chdir(folder)
    (code,) = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
    names = {}
    exec(code, names)
    call, parameters = names["function"].call, names["parameters"]
    assert names["outputs"].shape[0] == 3
    one = np.asarray(call(parameters, inputs[:1]))
    np.save("outputs.npy", np.asarray(call(parameters, inputs)))
    assert np.allclose(one, np.load("outputs.npy")[:1], atol=1e-5)
"""


def settings(**fields):
    config = digits.get_config()
    config.rounds = 2
    config.clients.count = 5
    config.clients.capacity = [1, 2, 2, 1, 3]
    config.model.backbone = "mlp"
    config.model.widths = (16,)
    config.model.experts = 4
    config.model.hidden = 8
    config.data.train_limit, config.data.test_limit = 200, 90
    config.checkpoint.every = 1
    config.execution.devices = 1
    config.update_from_flattened_dict(fields)
    return config


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Returns the folder of a run that was interrupted after one of two rounds and resumed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(settings(), Workdir(folder), stop=lambda: True) == "interrupted"
    (line,) = export(folder, "assembled", folder.parent / "early")
    assert line == "the run stands at round 1 of 2: this is the model after that round"
    assert json.loads((folder.parent / "early" / "model.json").read_text())["round"] == 1
    assert train(settings(), Workdir(folder)) == "finished"
    return folder


@pytest.fixture(scope="module")
def evaluated(run):
    """The run's evaluation, client by client."""
    experiment = build(settings())
    like = experiment.simulation.init(jax.random.key(0))
    state = Checkpoints(run / "checkpoints", 2).newest(like).state
    found = experiment.simulation.evaluate(state, experiment.test, experiment.about)
    return found, experiment, state


def only_jax(folder: Path) -> Path:
    """Returns a folder of packages with JAX, its dependencies and those of the instructions."""
    for name in ALONE:
        home = Path(find_spec(name).origin).parent
        for part in (home, home.with_name(f"{name}.libs")):
            if part.exists():
                (folder / part.name).symlink_to(part)
    return folder


def test_where_only_jax_is_an_exported_model_predicts_what_was_evaluated(run, evaluated, tmp_path):
    before = content(run)
    models = {"assembled": tmp_path / "all", "client:4": tmp_path / "new" / "client"}
    for what, target in models.items():
        assert export(run, what, target) == []
    assert content(run) == before
    examples = load_examples(settings()).test
    np.save(tmp_path / "inputs.npy", examples["images"])
    (tmp_path / "packages").mkdir()
    packages = only_jax(tmp_path / "packages")
    arguments = [packages, tmp_path / "inputs.npy", *models.values()]
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", LOAD, *map(str, arguments)],
        check=True,
        timeout=HANGS,
        cwd=tmp_path,
        env={"JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]},
    )
    labels, (found, experiment, state) = examples["labels"], evaluated

    def figures(logits):
        logits = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits.argmax(axis=1) == labels, -logits[np.arange(len(labels)), labels]

    hits, losses = figures(np.load(models["assembled"] / "outputs.npy"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert hits.mean() == pytest.approx(last["eval/assembled_accuracy"], abs=1e-6)
    assert losses.mean() == pytest.approx(last["eval/assembled_loss"], abs=1e-5)

    logits = np.load(models["client:4"] / "outputs.npy")
    said = json.loads((models["client:4"] / "model.json").read_text())
    prior = np.array(said["prior"]["log_label_share"])
    hits, losses = figures(logits - prior)
    assert hits.mean() == pytest.approx(found.global_accuracy[4], abs=1e-6)
    assert losses.mean() == pytest.approx(found.global_loss[4], abs=1e-5)
    share = np.asarray(experiment.about.label_share[4])
    of_class = [figures(logits)[1][labels == y].mean() for y in range(10)]
    assert share @ np.array(of_class) == pytest.approx(found.personal_loss[4], abs=1e-5)

    federation = experiment.simulation.setting.federation
    own = simulation.client_model(federation, state, 4, share)
    assert np.allclose(own.apply(own.params, examples["images"]), logits, atol=1e-5)


def test_what_the_files_say(run, evaluated, tmp_path):
    export(run, "client:4", tmp_path / "client")
    assert {path.name for path in (tmp_path / "client").iterdir()} == {
        "README.md",
        "function.stablehlo",
        "model.json",
        "parameters.safetensors",
    }
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "client").stat().st_mode == (tmp_path / "usual").stat().st_mode
    said = json.loads((tmp_path / "client" / "model.json").read_text())
    _, experiment, state = evaluated
    slots = np.asarray(state.clients.slots[4, 0])
    assert said["experts"] == {"mixture": slots[slots < 4].tolist()}
    assert (said["round"], said["rounds"], said["task"]) == (2, 2, "classification")
    assert said["labels"] == [str(y) for y in range(10)]
    assert said["standardisation"]["mean"] == experiment.prepare.mean.tolist()
    assert said["function"] == {
        "inputs": {"dtype": "uint8", "shape": ["b", 8, 8, 1]},
        "outputs": {"dtype": "float32", "shape": ["b", 10]},
        "limits": [],
        "platforms": ["cpu", "cuda", "tpu"],
    }
    parameters = load_file(tmp_path / "client" / "parameters.safetensors")
    held = (slots < 4).sum()
    assert {
        name: x.shape[0] for name, x in parameters.items() if "expert" in name
    } == dict.fromkeys([f"expert/{name}" for name in ("b_in", "b_out", "w_in", "w_out")], held)
    # Private parameters of a client are in its own file alone.
    early = json.loads((run.parent / "early" / "model.json").read_text())
    assert early.keys() == said.keys() - {"prior"}


def test_a_run_that_evaluates_without_prior_is_exported_without(run, tmp_path, monkeypatch):
    there = Workdir(run).config() | {"eval.prior": False}
    monkeypatch.setattr(Workdir, "config", lambda self: there)
    monkeypatch.setattr(Workdir, "check_inputs", lambda *_: ())
    files = make_portable(run, 4).files
    assert "prior" not in json.loads(files["model.json"])
    assert b"label" not in files["README.md"].split(b"`model.json`")[0]


@pytest.mark.parametrize("positions", ["learnt", "rotary"])
def test_text_of_any_length(positions):
    config = text.get_config()
    config.clients.count, config.partition.domains_per_client = 4, 9
    config.data.length, config.data.train_limit, config.data.test_limit = 12, 40, 8
    config.model.widths, config.model.heads, config.model.hidden = (16,), 2, 8
    config.model.positions = positions
    config.execution.devices = 1
    experiment = build(config)
    state = experiment.simulation.init(jax.random.key(0))
    model = simulation.assembled_model(experiment.simulation.setting.federation, state)
    limited = positions == "learnt"
    assert limits(config) == (("s <= 12",) if limited else ())
    function = jax_export.deserialize(compiled(experiment, config, model).serialize())
    apply = jax.jit(model.apply)
    for shape in ((1, 12), (3, 5)):
        tokens = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        found = function.call(model.params, tokens)
        assert np.allclose(found, apply(model.params, tokens), atol=1e-5)
    longer = np.zeros((1, 13), np.int32)
    if limited:
        with pytest.raises(ValueError, match="shapes"):
            function.call(model.params, longer)
    else:
        found = function.call(model.params, longer)
        assert np.allclose(found, apply(model.params, longer), atol=1e-5)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("client:5", "client=5: give 0 to 4"),
        ("client:-1", "--what=client:-1: give assembled, or client:7"),
        ("everything", "--what=everything: give assembled, or client:7"),
        ("client:٣", "--what=client:٣: give assembled"),
    ],
)
def test_models_that_are_not_there_are_refused(run, tmp_path, what, line):
    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        export(run, what, tmp_path / "out" / "model")
    assert not any(tmp_path.iterdir())


def test_where_gates_stay_with_clients_nothing_is_assembled():
    experiment = build(settings(**{"model.gate": "private"}))
    state = experiment.simulation.init(jax.random.key(0))
    with pytest.raises(
        InputError, match=r"^model=assembled: parts that stay .*: gate/bias, gate/k"
    ):
        standalone(experiment, state, None)


def test_damaged_checkpoints_are_not_used_and_stay_where_they_are(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "checkpoints" / "2" / "arrays.json").write_text("{}")
    before = content(folder)
    damaged, standing = export(folder, "client:0", tmp_path / "early")
    assert damaged == "the checkpoint of round 2 is damaged (arrays.json)"
    assert standing.startswith("the run stands at round 1 of 2")
    (folder / "checkpoints" / "1" / "checksums.json").unlink()
    del before["checkpoints/1/checksums.json"]
    with pytest.raises(InputError, match=r"^WORKDIR=.*: holds no whole checkpoint"):
        export(folder, "client:0", tmp_path / "out")
    assert content(folder) == before
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used_are_refused_before_anything_is_computed(
    run, tmp_path, monkeypatch
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")

    def refused(*arguments) -> str:
        with pytest.raises(InputError) as caught:
            export(*arguments)
        return str(caught.value).replace(str(tmp_path), "")

    assert refused(run, "assembled", tmp_path / "full").startswith("--to=/full: is not empty")
    assert refused(run, "assembled", tmp_path / "full" / "file").startswith(
        "--to=/full/file: is there"
    )
    monkeypatch.chdir(tmp_path / "empty")
    for here in (Path(), tmp_path / "empty"):
        assert "cannot be replaced as a whole; name a new folder in it" in refused(
            run, "assembled", here
        )
    assert refused(run, "assembled", tmp_path / "dangling").startswith("--to=/dangling: is there")
    assert refused(tmp_path / "no", "assembled", tmp_path / "x").startswith("WORKDIR=/no: there is")
    assert "config.json cannot be read" in refused(tmp_path / "empty", "assembled", tmp_path / "x")
    # One of another version.
    config = json.loads((run / "config.json").read_text())
    config["model"]["magic"] = 1
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    assert "has the field model.magic" in refused(tmp_path / "empty", "assembled", tmp_path / "x")
    del config["model"]["magic"]
    config["rounds"] = "many"
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    assert "config.json cannot be used" in refused(tmp_path / "empty", "assembled", tmp_path / "x")
    config["rounds"] = 2
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    assert "no whole checkpoint" in refused(tmp_path / "empty", "assembled", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "WORKDIR=(none): give the folder of one run"),
        (["a", "b"], "WORKDIR=a b: give the folder"),
        (["."], "--what=None: give assembled"),
        ([".", "--what=assembled"], "--to=None: name the folder"),
    ],
)
def test_the_command_says_what_it_lacks_in_a_line(arguments, line):
    process = subprocess.run(
        [sys.executable, "-m", "experiments.export", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith(line)
    assert process.stderr.count("\n") == 1


def test_the_command_writes_and_says_where(run, tmp_path):
    (tmp_path / "out").mkdir()
    process = subprocess.run(
        [sys.executable, "-m", "experiments.export", run, "--what=client:0", "--to=out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert re.fullmatch(r"out \(0\.\d MB\)\n", process.stdout)
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_link_to_an_empty_folder_leads_to_the_files(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(tmp_path / "link", {"a": b"1"})
    assert content(tmp_path / "real") == {"a": b"1"}
    assert (tmp_path / "link").is_symlink()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_folder(tmp_path / "out", {"a": b"1"})
    assert caught.value.filename == str(tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["safetensors", "flatbuffers"])
def test_without_the_extra_a_line_says_what_to_install(run, tmp_path, monkeypatch, missing):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(InputError, match=rf"^--to=.*: needs {missing}; .*flexmoe_jax\[export\]"):
        export(run, "assembled", tmp_path / "out")


def test_data_may_have_moved_and_others_in_their_place_are_refused(run, tmp_path, monkeypatch):
    there = Workdir(run).config() | {"data.name": "/once/here/mine.npz", "data.dir": "/once"}
    monkeypatch.setattr(Workdir, "config", lambda self: dict(there))
    assert run_config(Workdir(run), None).data.name == "/once/here/mine.npz"
    moved = run_config(Workdir(run), "/now")
    assert (moved.data.dir, moved.data.name) == ("/now", "mine.npz")
    # As if the files held other examples than those that the run began with.
    there |= {"data.name": "digits", "data.train_limit": 150}
    with pytest.raises(InputError, match="train_images, train_labels differ"):
        export(run, "assembled", tmp_path / "out")
    assert not (tmp_path / "out").exists()
