from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe_jax.edge import Devices
from flexmoe_jax.errors import InputError
from flexmoe_jax.options import EdgeOptions, FaultsOptions
from flexmoe_jax.simulation import Faults, Network, Traffic, make_faults

STEPS, EXAMPLES = np.array([4, 4, 2, 8]), np.array([40, 40, 20, 80])
# Bytes and examples a second: the last client is ten times as slow.
SPEED = np.array([10.0, 10.0, 10.0, 1.0])
DEVICES = Devices(("any",), np.zeros(4, int), SPEED, SPEED, SPEED, SPEED, np.ones(4))
TRAFFIC = Traffic(down=np.full(4, 10), up=np.full(4, 20), cached=np.zeros(4))


def make_network(**options):
    return Network(4, 4, STEPS, EXAMPLES, seed=0, **options)


def test_a_plain_network_takes_everybody_and_no_time():
    network = make_network()
    cohort = network.cohort(0)
    arrival, outcome = network.play(cohort, TRAFFIC, 0)
    assert cohort.tolist() == [0, 1, 2, 3]
    assert arrival.work.tolist() == [1, 1, 1, 1]
    assert arrival.tamper.tolist() == [1, 1, 1, 1]
    assert arrival.reached.all()
    assert outcome.delivered.all()
    assert outcome.seconds == 0


def test_times_by_hand():
    # Downloads 1 and 10 s, compute 4, 4, 2 and 80 s, uploads 2 and 20 s.
    network = make_network(devices=DEVICES)
    assert network.play(np.arange(4), TRAFFIC, 0)[1].seconds == 110
    # With 34 s for all, the last has 4 s of 80 to train in: 0.4 of its 8 steps, which is none.
    network = make_network(devices=DEVICES, edge=EdgeOptions(deadline=34.0, late="partial"))
    arrival, outcome = network.play(np.arange(4), TRAFFIC, 0)
    assert arrival.work.tolist() == [1, 1, 1, 0]
    assert outcome.delivered.tolist() == [True, True, True, False]
    assert outcome.seconds == 34
    # With 70 s it has 40: half of its steps.
    network = make_network(devices=DEVICES, edge=EdgeOptions(deadline=70.0, late="partial"))
    arrival, outcome = network.play(np.arange(4), TRAFFIC, 0)
    assert arrival.work.tolist() == [1, 1, 1, 0.5]
    assert outcome.seconds == 70


def test_over_selection_ends_with_the_last_one_wanted():
    network = make_network(devices=DEVICES, edge=EdgeOptions(over_select=1.9))._replace(per_round=2)
    assert network.asked == 4
    arrival, outcome = network.play(network.cohort(0), TRAFFIC, 0)
    # Client 2 (5 s), and 0 or 1 (7 s).
    assert outcome.delivered[2]
    assert outcome.delivered[:2].sum() == 1
    assert not outcome.delivered[3]
    assert outcome.seconds == 7
    assert arrival.reached.all()


@given(st.integers(0, 1000), st.integers(0, 9))
def test_weighted_and_absent_clients(seed, round_index):
    there = np.array([True, False, True, True])
    network = make_network(sizes=EXAMPLES, availability=lambda t: there)._replace(
        seed=seed, per_round=2
    )
    cohort = network.cohort(round_index)
    assert len(cohort) == 2
    assert 1 not in cohort
    assert np.array_equal(cohort, network.cohort(round_index))
    nobody = network._replace(availability=lambda t: np.zeros(4, bool))
    assert len(nobody.cohort(round_index)) == 0


def test_clients_with_more_examples_come_more_often():
    # In proportion to what they have, not to what a round trains on.
    sizes = np.array([30, 10, 40, 20])
    network = make_network(sizes=sizes)._replace(per_round=1)
    drawn = np.bincount([network.cohort(t)[0] for t in range(2000)], minlength=4) / 2000
    assert np.allclose(drawn, sizes / sizes.sum(), atol=0.05)


def test_the_equally_fast_are_accepted_equally_often():
    network = make_network(edge=EdgeOptions(over_select=2.0))._replace(per_round=2)
    cohort, rounds = np.arange(4), 400
    delivered = sum(
        network.play(cohort, TRAFFIC, t)[1].delivered.astype(int) for t in range(rounds)
    )
    assert np.allclose(delivered / rounds, 0.5, atol=0.1)


def test_who_has_no_time_for_a_step_takes_nobodys_place():
    # The last client has 4 of its 80 s, which is less than one of its 8 steps.
    edge = EdgeOptions(deadline=34.0, late="partial", over_select=2.0)
    network = make_network(devices=DEVICES, edge=edge)._replace(per_round=1)
    two = Traffic(*(bytes_[:2] for bytes_ in TRAFFIC))
    assert network.play(np.array([0, 3]), two, 0)[1].delivered.tolist() == [True, False]


def test_faulty_clients_are_the_same_all_along():
    network = make_network(faults=Faults(0.5, -1.0))
    assert network.faulty().sum() == 2
    # A half counts as one, and so does any share at all.
    for share, number in ((0.375, 2), (0.625, 3), (0.01, 1), (0.0, 0)):
        assert make_network(faults=Faults(share, -1.0)).faulty().sum() == number
    for t in range(3):
        arrival, _ = network.play(np.arange(4), TRAFFIC, t)
        assert np.array_equal(arrival.tamper, np.where(network.faulty(), -1.0, 1.0))
    assert np.isnan(make_faults(FaultsOptions(0.1, "nan")).factor)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [((0.1, "lie"), "faults.kind=lie: choose one of"), ((1.5, "nan"), "faults.share=1.5")],
)
def test_bad_faults_are_refused(arguments, line):
    with pytest.raises(InputError, match=line):
        FaultsOptions(*arguments)
