"""Simulates the network: which clients are asked, which of them answer, and at what cost.

Everything here is a function of (seed, round) and runs on the host between rounds. A resumed run
therefore sees the same cohorts, dropouts and faults as an uninterrupted run.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from flexmoe_jax.edge import Availability, Devices, Outcome, attempt, draw_dropouts, run_attempt
from flexmoe_jax.options.edge import EdgeOptions
from flexmoe_jax.options.simulation import FaultsOptions
from flexmoe_jax.simulation.plan import Arrival, sample_cohort
from flexmoe_jax.simulation.traffic import Traffic

# Separates the choice of faulty clients from other draws of the same seed.
_FAULTY, _TURN = 0xFA017, 0x70291


class Faults(NamedTuple):
    """Clients that send an altered update in place of the trained one.

    Attributes:
      share: the fraction of all clients that is faulty, in [0, 1], at least one if it is not 0;
        these clients are drawn once.
      factor: multiplies their updates: NaN makes all numbers NaN, -1 reverses the update, 1000
        makes it 1000 times as long.
      noise: L2 norm of the Gaussian noise added to each update, relative to the update's own norm.
    """

    share: float = FaultsOptions.share
    factor: float = float("nan")
    noise: float = 0.0


class Network(NamedTuple):
    """Clients, their devices and the links to them.

    Attributes:
      clients: C.
      per_round: P, the number of updates that a round should receive.
      steps: (C,) local steps of each client in a round.
      examples: (C,) examples that each client trains on in a round, counted once per step.
      seed: of all random draws.
      sizes: (C,) examples that each client has, in proportion to which clients are drawn; None to
        draw them uniformly.
      availability: which clients can be reached; None if all can.
      devices: of the clients; None to ignore time.
      edge: over-selection, deadline and dropouts.
      faults: clients whose updates are tampered with.
    """

    clients: int
    per_round: int
    steps: np.ndarray
    examples: np.ndarray
    seed: int
    sizes: np.ndarray | None = None
    availability: Availability | None = None
    devices: Devices | None = None
    edge: EdgeOptions = EdgeOptions()
    faults: Faults = Faults()

    @property
    def asked(self) -> int:
        """The largest number of clients that a round asks."""
        return min(self.clients, int(np.ceil(self.per_round * self.edge.over_select - 1e-9)))

    def cohort(self, round_index: int) -> np.ndarray:
        """Draws the clients that a round asks: (P,) ascending ids, fewer if fewer are available."""
        weight = None
        if self.sizes is not None or self.availability is not None:
            weight = np.asarray(np.ones(self.clients) if self.sizes is None else self.sizes, float)
            if self.availability is not None:
                weight = weight * self.availability(round_index)
        return sample_cohort(
            self.clients, self.asked, seed=self.seed, round_index=round_index, weight=weight
        )

    def play(
        self, cohort: np.ndarray, traffic: Traffic, round_index: int
    ) -> tuple[Arrival, Outcome]:
        """Simulates a round: how much of the cohort's work arrives, and how long that takes.

        Without devices, every client answers immediately and the round takes no time.

        Args:
          cohort: (P,) client ids.
          traffic: the bytes that each client transfers.
          round_index: index of the round, from 0.
        """
        draw = partial(draw_dropouts, cohort=cohort, seed=self.seed, round_index=round_index)
        lots = np.random.default_rng([self.seed, _TURN, round_index]).random(self.clients)
        devices = self.devices or instant_devices(self.clients)
        outcome = run_attempt(
            attempt(
                devices,
                cohort,
                bytes_down=traffic.down,
                bytes_up=traffic.up,
                examples=self.examples[cohort],
            ),
            wanted=self.per_round,
            deadline=self.edge.deadline or float("inf"),
            late=self.edge.late,
            dropped_before=draw(self.edge.dropout_before, stage="before"),
            dropped_during=draw(self.edge.dropout_during, stage="during"),
            steps=self.steps[cohort],
            turn=lots[cohort],
        )
        faulty = self.faulty()[cohort]
        tamper = np.where(faulty, self.faults.factor, 1.0)
        noise = np.where(faulty, self.faults.noise, 0.0) if self.faults.noise else None
        return Arrival(outcome.work, outcome.reached, tamper, noise), outcome

    def faulty(self) -> np.ndarray:
        """(C,) bool, the clients whose updates are tampered with."""
        chosen = np.zeros(self.clients, bool)
        order = np.random.default_rng([self.seed, _FAULTY]).permutation(self.clients)
        number = int(np.floor(self.faults.share * self.clients + 0.5))
        chosen[order[: max(number, int(self.faults.share > 0))]] = True
        return chosen


def instant_devices(clients: int) -> Devices:
    """Returns devices without limits on memory, speed or bandwidth."""
    endless = np.full(clients, np.inf)
    none = np.zeros(clients, np.int64)
    return Devices(("instant",), none, endless, endless, endless, endless, np.ones(clients))


FAULTS = {
    "nan": Faults(factor=float("nan")),
    "flip": Faults(factor=-1.0),
    "scale": Faults(factor=1000.0),
    "noise": Faults(factor=1.0, noise=10.0),
}
"""The kinds of faults by name: how the updates of faulty clients are altered."""


def make_faults(options: FaultsOptions) -> Faults:
    """Returns the faults of the given kind, for the given share of clients."""
    return FAULTS[options.kind]._replace(share=options.share)
