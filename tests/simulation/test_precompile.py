"""What programs are made from: equal settings must mean equal programs."""

from __future__ import annotations

import jax
import numpy as np

from flexmoe_jax import simulation
from flexmoe_jax.assignment import make_policy
from flexmoe_jax.simulation.precompile import _plan, _settings
from tests.conftest import CAPACITY


def test_programs_do_not_depend_on_what_the_host_alone_uses(make_simulation, clients, digits):
    """`_settings` leaves these out, so no compiled program may contain them."""
    test = simulation.chunk_test_set({"images": digits.test_images, "labels": digits.test_labels})

    def programs(simulated):
        lowered = simulated.init.lower(jax.random.key(0))
        plan = _plan(simulated.setting, 7, noise=False)
        return (
            lowered.as_text(),
            simulated.round.lower(lowered.out_info, clients, plan).as_text(),
            simulated.evaluate.lower(lowered.out_info, test, clients.about).as_text(),
        )

    one = make_simulation()
    sample = jax.tree.map(lambda x: np.asarray(x) + 1, one.setting.federation.sample)
    other = simulation.simulate(
        one.setting.federation.replace(
            policy=make_policy("flex"), seed=7, capacity=np.roll(CAPACITY, 1), sample=sample
        ),
        clients,
    )
    assert programs(one) == programs(other)
    left = set(_settings(one.setting)) ^ set(vars(one.setting.federation))
    assert {"policy", "seed", "capacity"} <= left
