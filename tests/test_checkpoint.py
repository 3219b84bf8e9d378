from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmoe_jax.checkpoint import Checkpoints
from flexmoe_jax.errors import InputError
from flexmoe_jax.types import Ledger, Own, Server, State


@pytest.fixture
def state() -> State:
    """Four clients and two experts in two groups of layers."""
    shared, experts = {"w": jnp.arange(3.0)}, {"mixture": {"w": jnp.ones((2, 3))}}
    optimizer, pairs = optax.adam(0.1), (2, 4, 2)
    ledger = Ledger(
        fitness=jnp.full(pairs, 0.3),
        usage=jnp.ones(pairs),
        held_rounds=jnp.ones(pairs, jnp.int32),
        current=jnp.ones(pairs, bool),
        load=jnp.ones((2, 2)),
        deficit=jnp.full((2, 2), -0.5),
        norms=jnp.ones((4, 3)),
        profile=jnp.arange(12.0).reshape(3, 4),
    )
    return State(
        server=Server(
            key=jax.random.key(7),
            round=jnp.int32(5),
            shared=shared,
            experts=experts,
            optimizer=(
                optimizer.init(shared),
                {layer: jax.vmap(optimizer.init)(stack) for layer, stack in experts.items()},
            ),
            ledger=ledger,
        ),
        clients=Own(
            gates={"mixture": {"w": jax.random.normal(jax.random.key(1), (4, 2, 3))}},
            private={},
            slots=jnp.array([[[0], [1]], [[1], [0]], [[2], [2]], [[2], [0]]]),
            residual=({"w": jnp.ones((4, 3))}, {"mixture": {"w": jnp.ones((4, 1, 3))}}),
        ),
    )


def with_server(state: State, **changes: Any) -> State:
    return state._replace(server=state.server._replace(**changes))


def after(state: State, number: int) -> State:
    """The state with another number of completed rounds."""
    return with_server(state, round=jnp.int32(number))


def blank(state: State) -> State:
    zeros = jax.tree.map(jnp.zeros_like, with_server(state, key=jnp.zeros(())))
    return with_server(zeros, key=jax.random.key(0))


def saved(folder: Path, state: State, *rounds: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=2)
    for number in rounds:
        checkpoints.save(after(state, number))
    return checkpoints


def assert_same(found: State | None, state: State) -> None:
    assert found is not None
    keys = [jax.random.key_data(s.server.key) for s in (found, state)]
    assert (keys[0] == keys[1]).all()
    chex.assert_trees_all_equal(*(with_server(s, key=jnp.zeros(())) for s in (found, state)))


def test_every_part_comes_back_bit_for_bit(state, tmp_path):
    folder = tmp_path / "checkpoints"
    assert Checkpoints(folder, keep=2).restore(state) == (None, ())
    saved(folder, state, 3, 4, 5).close()
    reopened = Checkpoints(folder, keep=2)
    restored = reopened.restore(blank(state))
    reopened.close()
    assert_same(restored.state, state)
    assert restored.passed_over == ()
    assert {path.name for path in folder.iterdir()} == {"4", "5"}


def test_keys_of_another_kind_come_back(state, tmp_path):
    drawn = with_server(state, key=jax.random.key(7, impl="rbg"))
    checkpoints = saved(tmp_path, drawn, 3)
    assert_same(checkpoints.restore(drawn).state, after(drawn, 3))
    checkpoints.close()


def test_to_keep_none_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^keep=0: give a number of at least 1"):
        Checkpoints(tmp_path, keep=0)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_leads_to_the_checkpoint_before(state, tmp_path, damage):
    whole, folder = tmp_path / "whole", tmp_path / "checkpoints"
    saved(whole, state, 4, 5).close()
    files = [path.relative_to(whole) for path in (whole / "5").rglob("*") if path.is_file()]
    assert len(files) > 5
    checkpoints = Checkpoints(folder, keep=2)
    for file in files:
        shutil.copytree(whole, folder)
        DAMAGE[damage](folder / file)
        restored = checkpoints.restore(blank(state))
        assert_same(restored.state, after(state, 4))
        assert len(restored.passed_over) == 1
        assert restored.passed_over[0].startswith("the checkpoint of round 5 is damaged")
        assert checkpoints.rounds() == [4]
        assert (tmp_path / "checkpoints-set-aside" / "5").is_dir()
        shutil.rmtree(folder)
    # Out of the way: the round is saved again, under the same number.
    shutil.copytree(whole, folder)
    DAMAGE[damage](folder / files[0])
    checkpoints.restore(state)
    checkpoints.save(state)
    assert_same(checkpoints.restore(blank(state)).state, state)
    checkpoints.close()


def test_none_that_can_be_read_is_said_of_each(state, tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = saved(folder, state, 4, 5)
    (folder / "4" / "checksums.json").write_text("[3]")
    shutil.rmtree(folder / "5")
    (folder / "5").mkdir()
    restored = checkpoints.restore(state)
    checkpoints.close()
    assert restored.state is None
    assert [line.split(" is ")[0] for line in restored.passed_over] == [
        "the checkpoint of round 5",
        "the checkpoint of round 4",
    ]


def test_newer_ones_than_wanted_are_set_aside(state, tmp_path):
    checkpoints = saved(tmp_path / "checkpoints", state, 3, 5)
    restored = checkpoints.restore(blank(state), at_most=4)
    assert int(restored.state.server.round) == 3
    assert "reach to round 4 only" in restored.passed_over[0]
    assert checkpoints.rounds() == [3]
    checkpoints.close()


@pytest.mark.parametrize("newest", ["whole", "damaged"])
def test_where_all_are_newer_than_wanted_the_newest_whole_one_is_kept(state, tmp_path, newest):
    folder = tmp_path / "checkpoints"
    checkpoints = saved(folder, state, 3, 5)
    if newest == "damaged":
        flip_a_bit(folder / "5" / "arrays.json")
    restored = checkpoints.restore(blank(state), at_most=0)
    checkpoints.close()
    assert int(restored.state.server.round) == (5 if newest == "whole" else 3)
    assert len(restored.passed_over) == (newest == "damaged")
    assert checkpoints.rounds() == ([3, 5] if newest == "whole" else [3])


def contents(folder: Path) -> dict[str, str]:
    """Returns the targets of the links in a folder, and the contents of files named as ours."""
    return {
        path.name: os.readlink(path) if path.is_symlink() else path.read_text()
        for path in folder.rglob("*")
        if path.is_symlink() or (path.is_file() and "mine" in path.name)
    }


def test_what_a_user_put_there_is_neither_read_nor_deleted(state, tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = saved(folder, state, 4, 5)
    shutil.copytree(folder / "4", tmp_path / "elsewhere")
    for name in ("007", "٣", "-1", "9" * 200, "1e3", "unfinished-notes", "2"):
        (folder / name).mkdir()
        (folder / name / f"mine {name[:9]}").write_text(name)
    (folder / "6").write_text("a file")
    os.mkfifo(folder / "7")
    (folder / "8").symlink_to("nowhere")
    (folder / "3").symlink_to(tmp_path / "elsewhere")
    (folder / "1").symlink_to(".")
    (folder / "5" / "mine too").write_text("beside the arrays")
    before = contents(folder)
    restored = checkpoints.restore(blank(state))
    assert_same(restored.state, state)
    assert restored.passed_over == ()
    # What has the name of a round that is saved is moved out of the way.
    for number in (6, 7, 8, 9):
        checkpoints.save(after(state, number))
    assert int(checkpoints.restore(blank(state)).state.server.round) == 9
    checkpoints.close()
    found = contents(folder) | contents(aside := tmp_path / "checkpoints-set-aside")
    assert found == {name: text for name, text in before.items() if name != "mine too"}
    assert (aside / "6").read_text() == "a file"
    assert {path.name for path in aside.iterdir()} == {"6", "7", "8"}
    assert (tmp_path / "elsewhere" / "checksums.json").exists()


def test_one_set_aside_twice_is_there_twice(state, tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for _ in range(2):
        checkpoints.save(state)
        flip_a_bit(folder / "5" / "arrays.json")
        assert checkpoints.restore(blank(state)).state is None
    checkpoints.close()
    aside = tmp_path / "checkpoints-set-aside"
    assert {path.name for path in aside.iterdir()} == {"5", "5-2"}


def test_checksums_that_leave_the_arrays_out_vouch_for_nothing(state, tmp_path):
    checkpoints = saved(tmp_path / "checkpoints", state, 5)
    for content in ("{}", '{"../../secret": "ab"}', '{"arrays.json": 3}', "[" * 9000, "null"):
        shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy")
        (tmp_path / "copy" / "5" / "checksums.json").write_text(content)
        restored = Checkpoints(tmp_path / "copy", keep=2).restore(blank(state))
        assert restored.state is None
        assert restored.passed_over[0].startswith("the checkpoint of round 5 is damaged (")
        shutil.rmtree(tmp_path / "copy")
    checkpoints.close()


def test_another_model_is_refused_and_nothing_is_moved(state, tmp_path):
    checkpoints = saved(tmp_path / "checkpoints", state, 4, 5)
    ledger = state.server.ledger
    for other in (
        with_server(state, ledger=ledger._replace(fitness=jnp.zeros((1, 4, 2)))),
        with_server(state, shared={"v": jnp.zeros(3)}),
        state._replace(clients=state.clients._replace(gates={})),
    ):
        with pytest.raises(InputError, match="of another model") as refusal:
            checkpoints.restore(other)
        assert "\n" not in str(refusal.value)
    assert checkpoints.rounds() == [4, 5]
    checkpoints.close()


def test_what_a_killed_save_leaves_is_cleared_away(state, tmp_path):
    folder = tmp_path / "checkpoints"
    saved(folder, state, 4).close()
    shutil.copytree(folder / "4", folder / "unfinished")
    shutil.copytree(folder / "4", folder / "unfinished.orbax-checkpoint-tmp")
    assert Checkpoints(folder, keep=2).rounds() == [4]
    saved(folder, state, 5).close()
    assert {path.name for path in folder.iterdir()} == {"4", "5"}


def test_a_file_that_cannot_be_written_is_one_error_and_no_loss(state, tmp_path, capfd):
    noise = np.random.default_rng(0).random((300, 300))
    big = with_server(state, experts={"mixture": {"w": jnp.asarray(noise, jnp.float32)}})
    folder = tmp_path / "checkpoints"
    checkpoints = saved(folder, big, 4)
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
    try:
        with pytest.raises(OSError, match="File too large") as failure:
            checkpoints.save(big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    assert (failure.value.errno, failure.value.filename) == (errno.EFBIG, str(folder))
    # orbax's threads may go on writing what the next save clears away.
    assert checkpoints.rounds() == [4]
    checkpoints.save(big)
    assert_same(checkpoints.restore(blank(big)).state, big)
    checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err
