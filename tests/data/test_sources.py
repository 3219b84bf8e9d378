from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexmoe_jax.data import decode, sources, tfds_source
from flexmoe_jax.errors import InputError
from tests.data.conftest import load

Write = Callable[..., Path]
Make = Callable[..., list[tuple[np.ndarray, int]]]


def test_digits_are_the_real_ones() -> None:
    data = load("digits")
    assert data.train_images.shape == (1438, 8, 8, 1)  # 1797 - 359
    assert data.test_images.shape == (359, 8, 8, 1)  # 0.2 · 1797 = 359.4
    assert data.train_images.dtype == np.uint8
    assert data.train_images.max() == 255
    assert data.classes == tuple("0123456789")
    # Stratified: 174 to 183 images a class, a fifth of which is 34.8 to 36.6.
    assert set(np.bincount(data.test_labels)) <= {34, 35, 36, 37}


def test_the_digits_split_does_not_depend_on_the_seed() -> None:
    one, two = load("digits", seed=1), load("digits", seed=2)
    assert np.array_equal(one.test_images, two.test_images)
    assert np.array_equal(one.train_labels, two.train_labels)


def test_digits_can_be_resized() -> None:
    assert load("digits", image_size=12).image_shape == (12, 12, 1)


def test_limits_draw_a_seeded_stratified_sample() -> None:
    whole = load("digits")
    data = load("digits", train_limit=100, test_limit=50, seed=3)
    assert len(data.train_images) == len(data.train_labels) == 100
    assert len(data.test_images) == len(data.test_labels) == 50
    # Each class is close to a tenth of the whole, so it gets 9 to 11 of 100.
    assert set(np.bincount(data.train_labels)) <= {9, 10, 11}
    again = load("digits", train_limit=100, test_limit=50, seed=3)
    assert np.array_equal(again.train_images, data.train_images)
    other = load("digits", train_limit=100, seed=4)
    assert not np.array_equal(other.train_images, data.train_images)
    rows = {image.tobytes() for image in whole.train_images}
    assert all(image.tobytes() in rows for image in data.train_images)


def test_a_limit_above_the_size_keeps_all() -> None:
    assert len(load("digits", train_limit=10**6).train_labels) == 1438


def test_stratified_sample_by_hand() -> None:
    # 6 of (4, 8): quotas 2 and 4.
    labels = np.repeat([0, 1], [4, 8])
    chosen = sources.stratified_sample(labels, 6, np.random.default_rng(0))
    assert isinstance(chosen, np.ndarray)
    assert np.bincount(labels[chosen]).tolist() == [2, 4]
    assert (np.diff(chosen) > 0).all()


@pytest.mark.parametrize("field", ["train_limit", "test_limit", "image_size"])
def test_negative_numbers_are_refused(field: str) -> None:
    options: dict[str, Any] = {field: -1}
    with pytest.raises(InputError, match=rf"data\.{field}=-1: "):
        load("digits", **options)


def test_images_are_decoded_once(
    write_dataset: Write, make_examples: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_examples(6, channels=3, classes=3)
    folder = write_dataset("once", {"train": rows, "test": rows}, shape=(None, None, 3), classes=3)
    reads: list[int] = []
    read = tfds_source.read

    def counted(name: str, version_folder: Path, image_size: int, *rest: Any) -> Any:
        reads.append(image_size)
        return read(name, version_folder, image_size, *rest)

    monkeypatch.setattr(tfds_source, "read", counted)
    cache = tmp_path / "cache"
    first = load("once", data_dir=folder, cache_dir=cache)
    second = load("once:1.0.0", data_dir=folder, cache_dir=cache)
    assert reads == [0]
    assert np.array_equal(first.train_images, second.train_images)
    assert first.classes == second.classes
    load("once", data_dir=folder, cache_dir=cache, image_size=8)
    assert reads == [0, 8]
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    load("once", data_dir=folder, cache_dir=cache)
    assert reads == [0, 8, 0]
    # Another decoder may give other pixels.
    other = "PIL" if decode.package() == "cv2" else "cv2"
    monkeypatch.setattr(decode, "package", lambda: other)
    load("once", data_dir=folder, cache_dir=cache)
    assert reads == [0, 8, 0, 0]


def test_what_will_not_do_is_refused_before_it_is_decoded(
    write_dataset: Write, make_examples: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_examples(6, channels=1, classes=3)
    folder = write_dataset("small", {"train": rows, "test": rows}, shape=(None, None, 1), classes=3)
    seen: list[tuple[int, int, int]] = []

    def refuse(*sizes: int) -> None:
        seen.append(sizes)
        raise InputError("clients.count", 9, "too many")

    def decoding(*arguments: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(tfds_source, "_read_split", decoding)
    options = {"data_dir": folder, "cache_dir": tmp_path / "cache", "accept": refuse}
    for limit, examples in ((0, 6), (4, 4), (50, 6)):
        with pytest.raises(InputError, match=r"clients\.count=9: too many"):
            load("small", train_limit=limit, **options)
        assert seen.pop() == (3, examples, 0)
    assert not (tmp_path / "cache").exists()


def test_a_changed_data_set_is_decoded_again(
    write_dataset: Write, make_examples: Make, tmp_path: Path
) -> None:
    rows = make_examples(6, channels=1, classes=3)
    options: dict[str, Any] = {"shape": (None, None, 1), "classes": 3}
    folder = write_dataset("fickle", {"train": rows, "test": rows}, **options)
    before = load("fickle", data_dir=folder, cache_dir=tmp_path / "cache")
    folder.rename(tmp_path / "old")
    write_dataset("fickle", {"train": rows[:4], "test": rows}, **options)
    after = load("fickle", data_dir=folder, cache_dir=tmp_path / "cache")
    assert (len(before.train_labels), len(after.train_labels)) == (6, 4)


def test_nothing_is_fetched_or_imported_for_a_missing_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("download")

    monkeypatch.setattr(tfds_source, "download", never)
    monkeypatch.setattr(tfds_source, "read", never)
    with pytest.raises(InputError, match=r"data\.name=cifar10: .*data\.download=true"):
        load("cifar10", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"data\.dir=.*nowhere: .*data\.download=true"):
        load("cifar10", data_dir=tmp_path / "nowhere")


def test_download_prepares_what_is_missing_without_tensorflow(
    make_examples: Make, define: Callable[..., Any], tmp_path: Path
) -> None:
    rows = make_examples(6, channels=3, classes=3, size=(4, 4))
    define("fetched_toy", {"train": rows, "test": rows}, shape=(4, 4, 3), classes=3, as_arrays=True)
    data = load("fetched_toy", data_dir=tmp_path / "new", cache_dir=tmp_path, download=True)
    assert np.array_equal(data.train_images[:, 0, 0, 0] % 3, data.train_labels)
    assert np.array_equal(data.train_images[:, 0, 0, 2], data.train_images[:, 0, 0, 0] + 2)


def test_a_failing_download_is_one_line(
    make_examples: Make, define: Callable[..., Any], tmp_path: Path
) -> None:
    broken = [(np.zeros((4, 4, 3), np.uint8), 99)]  # a label beyond the classes
    define("broken_toy", {"train": broken}, shape=(4, 4, 3), classes=3)
    with pytest.raises(InputError, match=r"^data\.download=True: broken_toy .*data\.dir") as caught:
        load("broken_toy", data_dir=tmp_path / "new", cache_dir=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_a_name_that_tfds_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.name=nobody_knows_it: neither TFDS nor"):
        load("nobody_knows_it", data_dir=tmp_path, download=True)


def test_the_room_imports_no_heavy_library() -> None:
    heavy = "{'tensorflow', 'tensorflow_datasets', 'torch', 'sklearn', 'PIL', 'cv2'}"
    code = f"import sys, flexmoe_jax.data; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
