"""A federation of three real clients in one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from experiments.configs import digits
from experiments.deploying import joining
from experiments.deploying.checks import read_examples
from experiments.deploying.serving import Deployment, OwnData
from experiments.deploying.splitting import write_clients
from experiments.examples import load_examples
from experiments.train import train
from experiments.workdir import Workdir
from flexmoe_jax.deploy import LocalCarrier, Post, Worker


def small(**fields: Any) -> ConfigDict:
    """Three clients, two rounds of two steps."""
    config = digits.get_config()
    config.rounds = 2
    config.data.train_limit, config.data.test_limit = 150, 60
    config.clients.count, config.clients.capacity = 3, "1-2"
    config.model.experts, config.model.hidden, config.model.backbone = 4, 16, "mlp"
    config.local.max_steps, config.eval.every = 2, 1
    config.partition.name = "iid"  # Of one size all clients run one program, found on disk.
    config.checkpoint.every = config.execution.devices = 1
    for field, value in fields.items():
        group, name = field.split("__")
        config[group][name] = value
    return config


class Town:
    """A server and its clients, which can be stopped and started again.

    Args:
      folder: of everything.
      config: of the federation.
    """

    def __init__(self, folder: Path, config: ConfigDict) -> None:
        self.folder, self.config = folder, config
        self.said: list[str] = []
        self.files = write_clients(load_examples(config), folder / "data")
        self.carrier = LocalCarrier({})
        for number, _ in enumerate(self.files):
            self.start(number)

    def start(
        self, number: int, node: int | None = None, memory: int = 0, tells_labels: bool = True
    ) -> Worker:
        """Starts, or restarts, the process of a client at a node."""
        path = self.files[number]
        arrays, tests = read_examples(path)
        worker = Worker(
            name=path.stem,
            size=len(arrays["labels"]),
            memory=memory,
            join=partial(joining.join, path.stem, arrays, tests),
            folder=self.folder / "own" / path.stem,
            tells_labels=tells_labels,
        )
        self.carrier.clients[100 + number if node is None else node] = worker.answer
        return worker

    def train(
        self,
        rounds: int = 0,
        name: str = "served",
        stop: Callable[[], bool] = lambda: False,
        status: str = "finished",
    ) -> Workdir:
        """Serves the run, or resumes it, up to a round."""
        config = self.config.copy_and_resolve_references()
        config.rounds = rounds or config.rounds
        workdir = Workdir(self.folder / name)
        post = Post(self.carrier, stop=stop)
        self.post = post
        self.deployment = Deployment(OwnData(config), workdir, post)
        with closing(self.deployment):
            assert train(config, workdir, stop=stop, way=self.deployment.way) == status
        return workdir


class _Lines(logging.Handler):
    """Returns the lines of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _log_lines() -> Iterator[list[str]]:
    """Collects what the server and the clients log."""
    log, handler = logging.getLogger("flexmoe_jax.deploy"), _Lines()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler.lines
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)


@contextmanager
def a_town(folder: Path, **fields: Any) -> Iterator[Town]:
    """Returns a town in a folder; config fields are given as `local__max_steps=3`."""
    with _log_lines() as lines:
        town = Town(folder, small(**fields))
        town.said = lines
        yield town


@pytest.fixture
def make_town(tmp_path: Path) -> Iterator[Callable[..., Town]]:
    """Returns a function that creates a town; its arguments are config fields, as in `a_town`."""
    with _log_lines() as lines:

        def make(**fields: Any) -> Town:
            town = Town(tmp_path, small(**fields))
            town.said = lines
            return town

        yield make
