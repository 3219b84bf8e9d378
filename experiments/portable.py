"""Converts a run's model to files: parameters, compiled function, description and README."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export
from ml_collections import ConfigDict

from experiments.build import Experiment, build
from experiments.cli import flat_fields
from experiments.configs import base
from experiments.markup import markdown_text
from experiments.workdir import Workdir
from flexmoe_jax import data, simulation
from flexmoe_jax.checkpoint import Checkpoints, Restored
from flexmoe_jax.errors import InputError
from flexmoe_jax.simulation import Standalone
from flexmoe_jax.types import Array, Roll, State

PARAMETERS, FUNCTION, DESCRIPTION = "parameters.safetensors", "function.stablehlo", "model.json"
PLATFORMS = ("cpu", "cuda", "tpu")


class Portable(NamedTuple):
    """A model as files.

    Attributes:
      files: content of each file, by name.
      notes: sentences that a user of the model should read.
    """

    files: dict[str, bytes]
    notes: tuple[str, ...]


def make_portable(folder: Path, client: int | None, data_dir: str | None = None) -> Portable:
    """Extracts a model from a run.

    Args:
      folder: folder of the run; it is not changed.
      client: number of the client whose model is exported; None for all experts together.
      data_dir: the present folder of the run's data; None if they have not moved.

    Raises:
      InputError: the folder holds no such model, or the run's data have been replaced.
    """
    workdir = Workdir(folder, writes=False)
    config = run_config(workdir, data_dir)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    none = InputError("WORKDIR", folder, "holds no whole checkpoint to take a model from")
    if not checkpoints.rounds():
        raise none
    experiment = build(config)
    unknown = workdir.check_inputs(config, experiment.inputs)
    found, deployed, shares = _newest(checkpoints, experiment, config.seed)
    checkpoints.close()
    if found.state is None:
        raise none
    share: Any = None
    if client is not None and client < len(shares) and np.any(shares[client]):
        share = shares[client]
    model = standalone(experiment, found.state, client, share)
    silent = deployed and client is not None and share is None and config.eval.prior
    description, function = describe(experiment, config, model), compiled(experiment, config, model)
    done = int(found.state.server.round)
    name = "all experts in one model" if client is None else f"the model of client {client}"
    description = {"model": name, "round": done, "rounds": config.rounds} | description
    description["function"] = {
        "inputs": _shape(function.in_avals[-1]),
        "outputs": _shape(function.out_avals[0]),
        "limits": list(limits(config)),
        "platforms": list(function.platforms),
    }
    parameters = {path: np.ascontiguousarray(leaf) for path, leaf in model.params.items()}
    return Portable(
        {
            PARAMETERS: safetensors.numpy.save(parameters),
            FUNCTION: bytes(function.serialize()),
            DESCRIPTION: (json.dumps(description, indent=2, allow_nan=False) + "\n").encode(),
            "README.md": read_me(description).encode(),
        },
        (
            *(_OF_REAL_CLIENT if silent else ()),
            *(*experiment.notes, *unknown, *found.passed_over, *_standing(done, config.rounds)),
        ),
    )


_OF_REAL_CLIENT = (
    "the client adds the logarithm of its label shares to the outputs (eval.prior) where it "
    "evaluates; it has not told them to the server, so this model does not",
)


class _Newest(NamedTuple):
    """The newest checkpoint.

    Attributes:
      found: the state, as of a simulation.
      deployed: whether it is of real clients.
      shares: (C, Y) the clients' label shares, 0 where they are not known; may be empty.
    """

    found: Restored
    deployed: bool
    shares: np.ndarray


def _newest(checkpoints: Checkpoints, experiment: Experiment, seed: int) -> _Newest:
    """Reads the newest checkpoint, of a simulation or of real clients.

    Raises:
      InputError: it is of another model, or parts of the model are with real clients.
    """
    state = experiment.simulation.init(jax.random.key(seed))
    try:
        return _Newest(checkpoints.newest(state), False, np.asarray(experiment.about.label_share))
    except InputError as error:
        accepted = jnp.full(len(state.clients.slots), -1, jnp.int32)
        shares = experiment.about.label_share
        asked = experiment.simulation.setting.federation.needs_labels
        roll: Any = Roll(state.clients.slots, accepted, jnp.zeros_like(shares) if asked else ())
        try:
            found = checkpoints.newest(state._replace(clients=roll))
        except InputError:
            raise error from None
    if not experiment.simulation.setting.federation.assembles:
        remedy = "gates or other parts of its models are with its clients, and not in this folder"
        raise InputError("WORKDIR", "a run of real clients", remedy)
    told = np.zeros((0, 0))
    if found.state is not None:
        known: Any = found.state.clients
        told = np.asarray(known.label_share)
        there = state.clients._replace(slots=known.slots)
        found = found._replace(state=found.state._replace(clients=there))
    return _Newest(found, True, told)


def _standing(done: int, rounds: int) -> tuple[str, ...]:
    if done == rounds:
        return ()
    return (f"the run stands at round {done} of {rounds}: this is the model after that round",)


def run_config(workdir: Workdir, data_dir: str | None) -> ConfigDict:
    """Returns the config of a run, changed to use one device.

    Raises:
      InputError: the folder holds no run, or one of another version.
    """
    there, config = workdir.config(), base.get_config()
    for field in sorted(there.keys() ^ flat_fields(config).keys()):
        has = "has" if field in there else "lacks"
        remedy = f"its config.json {has} the field {field}: it is of another version of the code"
        raise InputError("WORKDIR", workdir.path, remedy)
    if isinstance(there["model.widths"], list):
        there["model.widths"] = tuple(there["model.widths"])  # JSON has no tuples.
    try:
        config.update_from_flattened_dict(there)
    except (TypeError, ValueError) as error:
        remedy = f"its config.json cannot be used ({' '.join(str(error).split())})"
        raise InputError("WORKDIR", workdir.path, remedy) from error
    config.execution.devices = config.execution.expert_devices = 1
    if data_dir is not None:
        config.data.dir = data_dir
        if config.data.name.endswith(".npz"):
            config.data.name = Path(config.data.name).name
    return config


def standalone(
    experiment: Experiment, state: State, client: int | None, share: Array | None = None
) -> Standalone:
    """Returns the requested model, in the form that evaluation uses.

    Args:
      experiment: the experiment of the run.
      state: the state of the run.
      client: the client's number; None for all experts together.
      share: (Y,) the client's label shares, if they are known.
    """
    federation = experiment.simulation.setting.federation
    if client is None:
        return simulation.assembled_model(federation, state)
    return simulation.client_model(federation, state, client, share)


def compiled(experiment: Experiment, config: ConfigDict, model: Standalone) -> export.Exported:
    """Compiles the function of parameters and raw inputs, for any batch size and text length.

    Raises:
      InputError: the model cannot be compiled for an unknown batch size.
    """
    inputs = experiment.simulation.setting.federation.inputs
    spec = ", ".join(map(str, ("b", *inputs.shape[1:])))
    if config.task.name == "next_token":
        spec = "b, s"
    dims = export.symbolic_shape(spec, constraints=limits(config))
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in model.params.items()}
    arguments = shapes, jax.ShapeDtypeStruct(dims, inputs.dtype)
    function = jax.jit(model.apply)
    try:
        try:
            return export.export(function, platforms=PLATFORMS)(*arguments)
        except NotImplementedError:  # Some operation does not exist on all platforms.
            return export.export(function)(*arguments)
    except Exception as error:  # A user's backbone can fail in any way.
        reason = " ".join(str(error).split())[:300]
        remedy = f"cannot be compiled for a batch of any size ({reason})"
        raise InputError("model.backbone", config.model.backbone, remedy) from error


def limits(config: ConfigDict) -> tuple[str, ...]:
    """Returns the constraints on variable sizes."""
    if config.task.name == "next_token" and config.model.positions == "learnt":
        return (f"s <= {config.data.length}",)
    return ()


def describe(experiment: Experiment, config: ConfigDict, model: Standalone) -> dict[str, Any]:
    """Returns the description of the model that a user of the files needs."""
    description: dict[str, Any] = {
        "task": config.task.name,
        "data": config.data.name,
        "experts": {layer: list(numbers) for layer, numbers in model.experts.items()},
        "experts_of_the_federation": experiment.simulation.setting.federation.layout.experts,
    }
    if config.task.name == "classification":
        description["labels"] = list(experiment.classes)
    if isinstance(experiment.prepare, data.Standardisation):
        description["standardisation"] = {
            "formula": "(x - mean) * factor, along the last axis; the function does it",
            "mean": experiment.prepare.mean.tolist(),
            "factor": experiment.prepare.factor.tolist(),
        }
    if model.log_share is not None:
        description["prior"] = {
            "formula": "logits + log_label_share; the function does it",
            "log_label_share": np.asarray(model.log_share).tolist(),
        }
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return description | {"versions": versions}


def _shape(aval: Any) -> dict[str, Any]:
    """Returns type and shape of an array; variable sizes are given by name."""
    sides = [side if isinstance(side, int) else str(side) for side in aval.shape]
    return {"dtype": str(aval.dtype), "shape": sides}


def read_me(description: dict[str, Any]) -> str:
    """Returns the README, in Markdown, which explains how to load the files."""
    function, name = description["function"], description["model"]
    inputs, outputs = function["inputs"], function["outputs"]
    some = ["3" if side == "b" else "8" if side == "s" else side for side in inputs["shape"]]
    held = "; ".join(
        f"{markdown_text(layer)}: {', '.join(map(str, numbers))}"
        for layer, numbers in description["experts"].items()
    )
    return _READ_ME.format(
        title=name[0].upper() + name[1:],
        data=markdown_text(description["data"]),
        task=description["task"],
        round=description["round"],
        rounds=description["rounds"],
        experts=f" Its experts, by MoE layer, are {held}." if held else "",
        whose=_OWN if "prior" in description else "",
        given=_text(inputs),
        made=_text(outputs),
        platforms=", ".join(function["platforms"]),
        limits="".join(f" that keeps {limit}" for limit in function["limits"]),
        some=", ".join(map(str, some)),
        dtype=inputs["dtype"],
    )


def _text(array: dict[str, Any]) -> str:
    return f"{array['dtype']} ({', '.join(map(str, array['shape']))})"


_OWN = """
It is meant for the client's own examples: the function adds the logarithm of the client's label
shares to its outputs. These shares, and the parameters that the client alone has, say something of
its data.
"""
_READ_ME = f"""# {{title}}

Of a federation on {{data}} ({{task}}), after round {{round}} of {{rounds}}.{{experts}}
{{whose}}
- `{FUNCTION}`: the function of the parameters and of raw inputs, {{given}}, to outputs, {{made}};
  StableHLO for {{platforms}}. Where a size is a letter, any from 1 on will do{{limits}}.
- `{PARAMETERS}`: the parameters, by their paths in the model.
- `{DESCRIPTION}`: all else, such as labels, and what the function does to inputs.

`pip install jax flatbuffers safetensors`, and then, in this folder:

```python
import numpy as np
from jax import export
from safetensors.numpy import load_file

parameters = load_file("{PARAMETERS}")  # NumPy arrays by name; needs no JAX
with open("{FUNCTION}", "rb") as file:
    function = export.deserialize(bytearray(file.read()))
inputs = np.zeros(({{some}}), np.{{dtype}})
outputs = function.call(parameters, inputs)
```
"""
