from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.simulation import (
    Floor,
    Tampering,
    assignment_slots,
    make_plan,
    sample_cohort,
    slots_assignment,
)


@given(st.integers(1, 50), st.data(), st.integers(0, 5), st.integers(0, 9))
def test_cohorts_are_distinct_and_repeatable(clients, data, seed, round_index):
    size = data.draw(st.integers(1, clients))
    cohort = sample_cohort(clients, size, seed=seed, round_index=round_index)
    assert len(set(cohort.tolist())) == size
    assert cohort.min() >= 0
    assert cohort.max() < clients
    assert (cohort == sample_cohort(clients, size, seed=seed, round_index=round_index)).all()


def test_cohorts_change_from_round_to_round():
    cohorts = {tuple(sample_cohort(30, 5, seed=0, round_index=t)) for t in range(10)}
    assert len(cohorts) == 10


@given(st.integers(0, 2**16 - 1), st.integers(1, 4), st.integers(1, 3))
def test_slots_and_assignment_are_inverse(bits, rows, groups):
    assignment = (np.arange(16) < 0) | (bits >> np.arange(16) & 1).astype(bool)
    assignment = np.resize(assignment, (rows, groups, 6))
    slots = assignment_slots(assignment, 6)
    assert (np.diff(slots, axis=-1) >= 0).all()
    assert (slots_assignment(slots, 6) == assignment).all()


def test_plan_by_hand():
    assignment = np.array([[True, False, True], [False, True, False], [True, True, False]])
    turned = ~assignment[:, ::-1]
    plan = make_plan(
        np.array([4, 7, 9]),
        np.stack([assignment, turned], axis=1),
        np.array([[2.0, 2.0, 1.0], [1.0, 1.0, 2.0]]),
        Floor(clients=10, slots=2, rows=3, block_size=2),
        steps=np.array([5, 8, 8]),
        tampering=Tampering(np.array([1.0, -1.0, 1.0]), np.array([0.0, 0.5, 0.0])),
    )
    # Longest first, equal ones by id, then padding (client 10 = C, slots 3 = E) to a whole block.
    assert plan.clients.tolist() == [7, 9, 4, 10]
    assert plan.slots[:, 0].tolist() == [[1, 3], [0, 1], [0, 2], [3, 3]]
    assert plan.slots[:, 1].tolist() == [[0, 2], [0, 3], [1, 3], [3, 3]]
    assert plan.load.tolist() == [[2, 2, 1], [1, 1, 2]]
    assert plan.steps.tolist() == [8, 8, 5, 0]
    assert plan.tamper.tolist() == [-1, 1, 1, 1]
    assert plan.noise.tolist() == [0.5, 0, 0, 0]
    assert plan.secret is None


def test_blocks_are_dealt_out_to_the_devices_in_turn():
    # Seven clients in blocks of two on two devices: the first takes clients 0, 1, 4, 5, the second
    # 2, 3, 6 and a row of padding.
    floor = Floor(clients=9, slots=1, rows=7, block_size=2, devices=2)
    assert floor.padded == 8
    assert floor.deal(7).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    # Room for more clients than come makes more padding.
    assert floor._replace(rows=9).padded == 12
