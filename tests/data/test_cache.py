from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flexmoe_jax.data import cache


class Counter:
    """Builds the same arrays at every call, and counts the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> cache.Arrays:
        self.calls += 1
        return {"images": np.arange(4000, dtype=np.uint8), "classes": np.array(["a", "bc"])}


def test_the_second_read_is_a_hit(tmp_path: Path) -> None:
    build = Counter()
    path = tmp_path / "new" / "folder" / "file.npz"
    first = cache.cached(path, "one", build)
    second = cache.cached(path, "one", build)
    assert build.calls == 1
    assert set(first) == set(second) == {"images", "classes"}
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert [item.name for item in path.parent.iterdir()] == ["file.npz"]


def test_another_fingerprint_replaces_the_file(tmp_path: Path) -> None:
    build = Counter()
    path = tmp_path / "file.npz"
    for fingerprint in ("one", "two", "two"):
        cache.cached(path, fingerprint, build)
    assert build.calls == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "junk"])
def test_a_damaged_file_is_rebuilt(tmp_path: Path, damage: str) -> None:
    build = Counter()
    path = tmp_path / "file.npz"
    whole = cache.cached(path, "one", build)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(
        {
            "empty": b"",
            "truncated": path.read_bytes()[:2000],
            "flipped": bytes(content),
            "junk": b"not an archive",
        }[damage]
    )
    again = cache.cached(path, "one", build)
    assert build.calls == 2
    assert np.array_equal(again["images"], whole["images"])
    cache.cached(path, "one", build)
    assert build.calls == 2


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    build, path = Counter(), tmp_path / "file.npz"
    os.mkfifo(path)
    for _ in range(2):
        assert set(cache.cached(path, "one", build)) == {"images", "classes"}
    assert build.calls == 1


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": np.arange(3)},
        {"fingerprint": np.array("one"), "images": np.arange(3)},
        {"fingerprint": np.array(["one", "images", "classes"]), "images": np.arange(3)},
        {"fingerprint": np.array(["one", "images"]), "images": np.arange(3), "more": np.arange(3)},
        {"fingerprint": np.array([1.5]), "images": np.arange(3)},
        {"fingerprint": np.zeros(0)},
    ],
)
def test_a_file_that_lacks_arrays_or_has_others_is_rebuilt(tmp_path: Path, arrays: dict) -> None:
    build, path = Counter(), tmp_path / "file.npz"
    np.savez(path, **arrays)
    assert set(cache.cached(path, "one", build)) == {"images", "classes"}
    assert build.calls == 1


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(
        cache.logging, "log_first_n", lambda level, text, n, *rest: warnings.append(text)
    )
    blocked = tmp_path / "a file, not a folder"
    blocked.write_text("")
    arrays = cache.cached(blocked / "file.npz", "one", Counter())
    assert arrays["images"].shape == (4000,)
    assert len(warnings) == 1


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(cache.np, "savez", full_disk)
    cache.cached(tmp_path / "file.npz", "one", Counter())
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.default_folder() == Path("/somewhere/flexmoe_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.default_folder() == Path("/home/me/.cache/flexmoe_jax")
