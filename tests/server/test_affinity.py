"""Affinity: updates show which clients are similar, and these share experts."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe_jax.server import affinity as module
from flexmoe_jax.server.affinity import affinity, learn_profile, sketch


@pytest.fixture(autouse=True, scope="module")
def few_searches() -> Iterator[None]:
    """Reduces the searches to a tenth, which is enough for profiles as simple as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SEARCHES", (4, 16))
        yield


def mixed_profiles(
    rng: np.random.Generator, clients: int, kinds: int, held: int, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """(C, F) profiles of clients with `held` kinds of data each, and which these are (C, kinds)."""
    deck = np.concatenate([rng.permutation(kinds) for _ in range(clients * held // kinds + 1)])
    owns = np.zeros((clients, kinds), bool)
    for c in range(clients):
        fresh = [k for k in dict.fromkeys(deck) if not owns[c, k]][:held]
        owns[c, fresh] = True
        for k in fresh:
            deck = np.delete(deck, np.flatnonzero(deck == k)[0])
    of_kind = rng.normal(size=(kinds, 64))
    profiles = owns @ of_kind / held
    return profiles - profiles.mean(axis=0) + noise * rng.normal(size=(clients, 64)), owns


@pytest.mark.parametrize("held", [1, 2])
def test_clients_of_a_kind_are_given_an_expert_of_their_own(held: int) -> None:
    rng = np.random.default_rng(3)
    profiles, owns = mixed_profiles(rng, 24, 6, held, noise=0.05)
    like = affinity(profiles, np.zeros((1, 24, 6)), np.full(24, held), seed=0)[0]
    top = np.argsort(-like, axis=1)[:, :held]
    chosen = np.zeros_like(owns)
    np.put_along_axis(chosen, top, values=True, axis=1)
    # Each kind's clients, and no others, have one expert in common.
    assert {tuple(column) for column in chosen.T} == {tuple(column) for column in owns.T}
    assert like.max() > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_clients_of_one_kind_with_room_for_two_have_one_expert_of_their_own(seed: int) -> None:
    # Three kinds can also be explained as the three pairs of three others, which is further away.
    rng = np.random.default_rng(seed)
    profiles, owns = mixed_profiles(rng, 24, 8, 1, noise=0.6)
    like = affinity(profiles, np.zeros((1, 24, 8)), np.full(24, 2), seed)[0] > 0.1
    assert {tuple(column) for column in like.T} == {tuple(column) for column in owns.T}


def test_profiles_without_structure_count_for_nothing() -> None:
    rng = np.random.default_rng(0)
    like = affinity(rng.normal(size=(60, 64)), np.zeros((1, 60, 8)), np.full(60, 2), seed=0)
    assert like.max() < 0.05


def shared_classes(rng: np.random.Generator, clients: int) -> np.ndarray:
    """(C, Y) label shares of clients that have 4 of 10 classes each."""
    has = rng.random((clients, 10)).argsort(axis=1) < 4
    return has / has.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_kinds_are_found_beyond_what_label_shares_explain(seed: int) -> None:
    rng = np.random.default_rng(seed)
    profiles, owns = mixed_profiles(rng, 100, 4, 1, noise=0.1)
    share = shared_classes(rng, 100)
    by_class = 3 * (share - share.mean(axis=0)) @ rng.normal(size=(10, 64))
    usage, room = np.zeros((1, 100, 4)), np.ones(100, int)
    hidden = affinity(profiles + by_class, usage, room, seed=0)[0] > 0.1
    found = affinity(profiles + by_class, usage, room, seed=0, label_share=share)[0]
    kinds = {tuple(kind) for kind in owns.T}
    assert {tuple(column) for column in hidden.T} != kinds
    assert {tuple(column) for column in (found > 0.1).T} == kinds
    # Where clients differ by classes alone, less is found.
    nothing = by_class + 0.1 * rng.normal(size=by_class.shape)
    left = affinity(nothing, usage, room, seed=0, label_share=share).max()
    assert left < 0.6 * affinity(nothing, usage, room, seed=0).max()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kinds", [2, 3, 4])
def test_clients_of_one_kind_share_experts_whatever_the_number_of_kinds(
    seed: int, kinds: int
) -> None:
    """The three pairs of three kinds would explain three others as well."""
    rng = np.random.default_rng(seed)
    profiles, owns = mixed_profiles(rng, 12, kinds, 1, noise=0.4)
    like = affinity(profiles, np.zeros((1, 12, 2 * kinds)), np.full(12, 2), seed)[0]
    held = like >= 0.9 * like.max()
    assert {tuple(column) for column in held.T} == {tuple(kind) for kind in owns.T}


@pytest.mark.parametrize("seed", range(3))
def test_differences_between_clients_of_one_kind_are_no_kinds(seed: int) -> None:
    """They lie in few directions, as those of gradients do, so many centres explain them well."""
    rng = np.random.default_rng(seed)
    profiles, owns = mixed_profiles(rng, 24, 2, 1, noise=0.2)
    profiles += 0.3 * rng.normal(size=(24, 4)) @ rng.normal(size=(4, 64))
    usage = rng.random((1, 24, 8))
    for round_ in range(3):
        like = affinity(profiles, usage, np.full(24, 2), seed=round_)[0]
        usage[0] += like
    shared = like > 0.1
    assert {tuple(column) for column in shared.T} == {tuple(kind) for kind in owns.T}


@pytest.mark.parametrize("seed", range(3))
def test_kinds_need_evidence(seed: int) -> None:
    """Kinds count whatever their number; noise does not, nor what label shares explain."""
    rng = np.random.default_rng(seed)
    usage, room = np.zeros((1, 60, 8)), np.full(60, 2)
    share = shared_classes(rng, 60)
    by_class = 3 * (share - share.mean(axis=0)) @ rng.normal(size=(10, 64))
    noise = 0.3 * rng.normal(size=(60, 64))
    seen = partial(affinity, usage=usage, capacity=room, seed=0, label_share=share)
    for kinds in (2, 4, 8):
        profiles, _ = mixed_profiles(rng, 60, kinds, 1, noise=0.1)
        assert seen(profiles, evidence=0.25).any()
        np.testing.assert_array_equal(seen(profiles, evidence=0.25), seen(profiles))
    assert not seen(noise, evidence=0.25).any()
    assert not seen(by_class + noise, evidence=0.25).any()
    assert seen(by_class + noise).any()
    few = partial(affinity, usage=usage[:, :6, :4], capacity=room[:6], seed=0, evidence=0.25)
    assert not few(noise[:6]).any()


def test_clients_whose_label_shares_are_unknown_have_no_affinity() -> None:
    rng = np.random.default_rng(0)
    profiles, owns = mixed_profiles(rng, 100, 4, 1, noise=0.1)
    share, silent = shared_classes(rng, 100), np.arange(100) % 4 == 0
    share[silent] = 0.0
    usage, room = np.zeros((1, 100, 4)), np.ones(100, int)
    found = affinity(profiles, usage, room, seed=0, label_share=share)[0] > 0.1
    assert not found[silent].any()
    kinds = {tuple(kind) for kind in owns[~silent].T}
    assert {tuple(column) for column in found[~silent].T} == kinds


def test_label_shares_that_differ_by_chance_explain_nothing() -> None:
    rng = np.random.default_rng(0)
    profiles, owns = mixed_profiles(rng, 24, 6, 2, noise=0.05)
    share = rng.multinomial(500, np.full(10, 0.1), size=24) / 500
    like = affinity(profiles, np.zeros((1, 24, 6)), np.full(24, 2), seed=0, label_share=share)[0]
    assert {tuple(column) for column in (like > 0.3).T} == {tuple(column) for column in owns.T}


def test_an_expert_keeps_the_clients_that_have_used_it() -> None:
    rng = np.random.default_rng(1)
    profiles, owns = mixed_profiles(rng, 24, 6, 2, noise=0.05)
    usage = np.stack([owns, owns[:, ::-1]]) * 100.0
    like = affinity(profiles, usage, np.full(24, 2), seed=5)
    np.testing.assert_array_equal(like[0] > 0.3, owns)
    np.testing.assert_array_equal(like[1] > 0.3, owns[:, ::-1])


@pytest.mark.parametrize("seed", range(3))
def test_kinds_that_are_hard_to_find_again_are_not_lost(seed: int) -> None:
    # Random starts alone mostly end in a worse optimum here.
    rng = np.random.default_rng(seed)
    profiles, owns = mixed_profiles(rng, 64, 16, 4, noise=0.05)
    usage = owns * 100.0 + rng.uniform(0, 40, owns.shape)  # Early rounds assigned at random.
    like = affinity(profiles, usage[None], np.full(64, 4), seed)[0]
    np.testing.assert_array_equal(like > 0.8, owns)


def test_nothing_is_said_of_clients_that_are_not_known_or_hold_nothing() -> None:
    rng = np.random.default_rng(2)
    profiles, _ = mixed_profiles(rng, 24, 6, 2, noise=0.05)
    profiles[3] = 0
    capacity = np.full(24, 2)
    capacity[4] = 0
    like = affinity(profiles, np.zeros((1, 24, 6)), capacity, seed=0)[0]
    assert not like[3:5].any()
    assert (like.max(axis=1) > 0.3).sum() == 22


def test_fewer_known_clients_than_experts_tell_nothing() -> None:
    profiles = np.zeros((24, 64))
    profiles[:5] = np.eye(5, 64)
    assert not affinity(profiles, np.zeros((1, 24, 6)), np.full(24, 2), seed=0).any()


def test_fewer_clients_than_experts_have_kinds_too() -> None:
    rng = np.random.default_rng(5)
    profiles, owns = mixed_profiles(rng, 8, 2, 1, noise=0.05)
    like = affinity(profiles, np.zeros((1, 8, 12)), np.ones(8, int), seed=0)[0]
    assert {tuple(column) for column in (like > 0.1).T} == {tuple(column) for column in owns.T}


def test_layers_that_number_their_experts_differently_do_not_mix() -> None:
    rng = np.random.default_rng(0)
    profiles, owns = mixed_profiles(rng, 64, 16, 4, noise=0.05)
    order = rng.permutation(16)
    like = affinity(profiles, np.stack([owns, owns[:, order]]) * 100.0, np.full(64, 4), seed=0)
    np.testing.assert_array_equal(like > 0.8, [owns, owns[:, order]])


def test_experts_of_one_kind_are_merged_however_much_they_are_used() -> None:
    centres = np.eye(3).repeat(2, axis=0)
    use = np.array([12.0, 2.0, 2.0, 12.0, 7.0, 7.0])
    for kinds in module._merge(use[:, None] * centres, use, np.array([3])):
        assert (kinds[::2] == kinds[1::2]).all()
        assert len(set(kinds)) == 3


def test_clients_with_more_room_take_part_in_more_centres() -> None:
    rng = np.random.default_rng(4)
    profiles, _ = mixed_profiles(rng, 30, 6, 1, noise=0.02)
    capacity = np.where(np.arange(30) % 2, 1, 3)
    like = affinity(profiles, np.zeros((1, 30, 6)), capacity, seed=0)[0]
    assert like.shape == (30, 6)
    assert ((like >= 0) & (like <= 1)).all()
    assert (like.sum(axis=1) <= capacity + 1e-9).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), factor=st.floats(1e-3, 1e3))
def test_profiles_may_be_of_any_length(seed: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    profiles, _ = mixed_profiles(rng, 12, 3, 1, noise=0.1)
    usage, room = rng.random((1, 12, 4)), np.ones(12, np.int64)
    np.testing.assert_allclose(
        affinity(factor * profiles, usage, room, seed=0),
        affinity(profiles, usage, room, seed=0),
        atol=1e-6,
    )


def test_a_sketch_keeps_angles_between_updates() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 40_000)).astype(np.float32)
    cosine = lambda a, b: float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))  # noqa: E731
    for share in (0.0, 0.5, 1.0):
        mixed = share * one + (1 - share) * other
        kept = [sketch({"a": jnp.asarray(x)}, 2048) for x in (one, mixed)]
        assert cosine(*kept) == pytest.approx(cosine(jnp.asarray(one), jnp.asarray(mixed)), abs=0.1)


def test_a_router_is_not_heard() -> None:
    update = {"a": jnp.ones(8), "moe": {"router": {"kernel": jnp.ones((4, 4))}}}
    changed = {"a": jnp.ones(8), "moe": {"router": {"kernel": jnp.arange(16.0).reshape(4, 4)}}}
    np.testing.assert_array_equal(sketch(update, 16), sketch(changed, 16))
    assert sketch(update, 16).any()


def test_every_array_of_an_update_is_heard() -> None:
    loud, quiet = jnp.ones(100) * 1e6, jnp.arange(30.0)
    both = sketch({"a": loud, "b": quiet}, 16)
    np.testing.assert_allclose(both, sketch({"a": loud * 1e-6, "b": quiet * 7}, 16), rtol=1e-5)
    assert sketch({"a": loud}, 0).shape == (0,)
    assert not sketch({"a": jnp.zeros(5)}, 16).any()


def test_a_profile_adds_up_what_differs_from_the_cohort() -> None:
    sketches = jnp.array([[4.0, 0.0], [0.0, 0.0], [50.0, 9.0], [7.0, 7.0]])
    clients = jnp.array([2, 0, 1, 3])  # 3 is padding.
    accepted = jnp.array([True, True, False, False])
    learn = jax.jit(learn_profile)
    learnt = learn(jnp.ones((3, 2)), clients, sketches, accepted, 0)
    # The mean of those let in is (2, 0): one lies a length of 1 to either side.
    np.testing.assert_allclose(learnt, [[0, 1], [1, 1], [2, 1]])
    # An update with a value that is not finite gives no information, even if it was accepted.
    broken = sketches.at[2].set(jnp.nan)
    same = learn(jnp.ones((3, 2)), clients, broken, accepted.at[2].set(True), 0)
    np.testing.assert_allclose(same, learnt)
    # Later updates tell less: in round 20 a quarter.
    late = learn(jnp.ones((3, 2)), clients, sketches, accepted, 19)
    np.testing.assert_allclose(late - 1, (learnt - 1) / 4, rtol=1e-6)


def test_fewer_kinds_than_experts_are_given_several_each() -> None:
    rng = np.random.default_rng(6)
    profiles, owns = mixed_profiles(rng, 24, 3, 1, noise=0.3)
    like = affinity(profiles, np.zeros((1, 24, 6)), np.full(24, 2), seed=0)[0]
    # Two experts belong to each kind, held by no other kind: no client mixes two kinds.
    kinds = owns.argmax(axis=1)
    theirs = {kind: {tuple(row) for row in like[kinds == kind] > 0} for kind in range(3)}
    assert all(len(rows) == 1 for rows in theirs.values())
    held = np.array([next(iter(rows)) for rows in theirs.values()])
    assert held.sum(axis=0).tolist() == [1] * 6
    assert held.sum(axis=1).tolist() == [2] * 3


def test_a_client_of_two_kinds_wishes_for_one_expert_of_each() -> None:
    rng = np.random.default_rng(7)
    profiles, owns = mixed_profiles(rng, 40, 5, 2, noise=0.05)
    like = affinity(profiles, np.zeros((1, 40, 10)), np.full(40, 2), seed=0)[0]
    wished = like == like.max()
    assert (wished.sum(axis=1) == 2).all()
    assert ((like > 0).sum(axis=1) == 4).all()  # the kinds' other experts, which are worth less
    # The experts of a kind have as many that wish for them.
    assert np.ptp(wished.sum(axis=0)) <= 1
    kind_of = np.array([owns[like[:, e] > 0].sum(axis=0).argmax() for e in range(10)])
    assert np.bincount(kind_of).tolist() == [2] * 5
    for c in range(40):
        assert sorted(kind_of[wished[c]]) == np.flatnonzero(owns[c]).tolist()
