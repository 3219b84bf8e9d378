"""Runs with real clients: replaces the simulation in `experiments.train`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.build import Experiment, Known, build
from experiments.deploying.checks import check_deployable
from experiments.deploying.dashboard import Dashboard
from experiments.examples import Examples, load_examples
from experiments.fields import read
from experiments.rounds import Assigned, Carried
from experiments.train import Way
from experiments.workdir import Workdir, as_json, write_atomically
from flexmoe_jax import data, edge
from flexmoe_jax.data import ClientData
from flexmoe_jax.deploy import Common, Facts, Post, Service, layout_of
from flexmoe_jax.edge import Outcome
from flexmoe_jax.errors import InputError
from flexmoe_jax.options import DeployOptions
from flexmoe_jax.reading import read_json
from flexmoe_jax.types import State

# File with the clients of a run, and what each has reported about itself.
FILE = "federation.json"
# Examples of each client that is made up to try a config.
_MANY = 1000
PERSONAL = (
    "clients' own test examples, or where they brought none the common test set, weighted to each "
    "client's label shares"
)


class OwnData:
    """What the server knows before any client comes: the config, and a data set of its own.

    The test split of the server's data set is the common test set. The rest gives classes, shapes,
    and the mean and deviation of inputs, and is not used for training.

    Args:
      config: the config of the run.

    Raises:
      InputError: the config or the data cannot be used, with any clients.
    """

    def __init__(self, config: ConfigDict) -> None:
        """Loads the data set, and builds an experiment with made-up clients."""
        check_deployable(config)
        self.config = config = config.copy_and_resolve_references()
        # Clients compute on devices of their own.
        config.execution.devices = config.execution.expert_devices = 1
        own = config.copy_and_resolve_references()
        if config.task.name != "next_token":
            own.partition.update(name="iid", rule="none")
        examples = load_examples(own)
        # The notes are of that partition.
        notes = tuple(note for note in examples.notes if "partition.name=iid" not in note)
        self._examples = replace(
            examples, counts=None, group=None, personal=PERSONAL, notes=notes, ids=None
        )
        made_up = [Facts(f"client_{i}", _MANY, 2**60) for i in range(config.clients.count)]
        self.experiment(made_up)

    def examples(self, facts: Sequence[Facts]) -> Examples:
        """Returns the server's examples, with each client's number of examples in place of them."""
        examples = self._examples
        classes = examples.clients.label_share.shape[1]
        data_of: Callable[..., ClientData] = ClientData
        clients = data_of(
            arrays={name: np.asarray(x[:2]) for name, x in examples.clients.arrays.items()},
            index=np.zeros((len(facts), 1), np.int32),
            size=np.array([one.examples for one in facts], np.int32),
            label_share=np.zeros((len(facts), classes), np.float32),
        )
        return replace(examples, clients=clients, ids=np.array([one.name for one in facts]))

    def experiment(self, facts: Sequence[Facts]) -> Experiment:
        """Builds the experiment with these clients."""
        config = self.config
        return build(config, Known(self.examples(facts), _devices(config, facts)))


class Deployment:
    """Carries out a run with real clients, in place of a simulation.

    Args:
      own: the config of the run, and the server's data set.
      workdir: the folder of the run.
      post: sends messages to clients and receives their answers.
    """

    def __init__(self, own: OwnData, workdir: Workdir, post: Post) -> None:
        """Does not wait for clients yet."""
        self._own, self._workdir, self._post = own, workdir, post
        self._service: Service | None = None
        self._dashboard: Dashboard | None = None

    @property
    def way(self) -> Way:
        """How the run's rounds are carried out."""
        return Way(self._build, lambda experiment: experiment, self._carry)

    def _build(self, config: ConfigDict) -> Experiment:
        config = self._own.config
        name, facts = self._who()
        examples, experiment = self._own.examples(facts), self._own.experiment(facts)
        federation = experiment.simulation.setting.federation
        key = jax.random.key(config.seed)
        common = Common(
            config=json.dumps(as_json(config)),
            federation_id=name,
            classes=examples.classes,
            prepare=_constants(examples),
            tests=examples.test,
            examples=np.array([one.examples for one in facts]),
        )
        service = Service(
            federation, common, self._post, read(DeployOptions, config), key, config.edge.cache
        )
        self._post.admit(facts, service.setup, layout_of(federation), service.meet)
        self._service = service
        self._facts = facts
        # A simulation's state is a `State`; the state of this run is the server's `ServerState`.
        init: Any = service.init
        simulation = experiment.simulation._replace(
            init=init,
            assign=service.assign,
            evaluate=lambda state, test, about: service.evaluate(state),
        )
        return replace(experiment, simulation=simulation)

    def _who(self) -> tuple[str, list[Facts]]:
        """Returns the federation's id, and its clients by number; both survive a restart."""
        path = self._workdir.path / FILE
        if path.exists():
            known = read_json(path)
            return known["id"], [Facts(**one) for one in known["clients"]]
        facts = self._post.gather(self._own.config.clients.count)
        known = {"id": secrets.token_hex(8), "clients": [one._asdict() for one in facts]}
        self._pending = known
        return str(known["id"]), facts

    def _carry(
        self, experiment: Experiment, state: State, examples: ClientData, assigned: Assigned
    ) -> Carried:
        """Carries out a round with real clients."""
        assert self._service is not None
        self._open_dashboard()
        begin = time.monotonic()
        plan = experiment.simulation.plan(assigned.cohort, assigned.solutions)
        known: Any = state
        following, report, reached, delivered = self._service.round(known, plan)
        clients = np.asarray(plan.clients)
        row = {int(c): i for i, c in enumerate(clients)}
        places = np.array([row[int(c)] for c in assigned.cohort])
        outcome = Outcome(
            work=delivered[places].astype(float),
            delivered=delivered[places],
            reached=reached[places],
            seconds=time.monotonic() - begin,
        )
        after: Any = following
        return Carried(after, clients, outcome, report)

    def close(self) -> None:
        """Writes the final status of the clients."""
        if self._dashboard is not None:
            self._dashboard.close()

    def _open_dashboard(self) -> None:
        """Records the clients, and starts the dashboard; called once the run's folder is open."""
        path = self._workdir.path / FILE
        if not path.exists():
            write_atomically(path, json.dumps(self._pending, indent=2) + "\n")
        if self._dashboard is None:
            self._dashboard = Dashboard(self._workdir.path, self._post, self._facts)


def _devices(config: ConfigDict, facts: Sequence[Facts]) -> edge.Devices | None:
    """Returns the memory that clients report, as devices; None if capacities do not depend on it.

    Raises:
      InputError: a client does not report its memory.
    """
    if config.clients.capacity != "memory":
        return None
    silent = [one.name for one in facts if not one.memory]
    if silent:
        remedy = "does not say what memory it has: start it with --memory=BYTES"
        raise InputError("clients.capacity", silent[0], remedy)
    memory = np.array([one.memory for one in facts], np.float64)
    endless, each = np.full(len(facts), np.inf), np.arange(len(facts))
    names = tuple(one.name for one in facts)
    return edge.Devices(names, each, memory, endless, endless, endless, np.ones(len(facts)))


def _constants(examples: Examples) -> dict[str, np.ndarray]:
    if isinstance(examples.prepare, data.Standardisation):
        return {"mean": examples.prepare.mean, "factor": examples.prepare.factor}
    return {}
