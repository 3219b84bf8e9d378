from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexmoe_jax.data import tfds_source
from flexmoe_jax.errors import InputError
from tests.data.conftest import load

Write = Callable[..., Path]
Make = Callable[..., list[tuple[np.ndarray, int]]]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_varying_size_are_resized(
    write_dataset: Write, make_examples: Make, tmp_path: Path, channels: int
) -> None:
    folder = write_dataset(
        "varying",
        {
            "train": make_examples(43, channels=channels, classes=43),
            "test": make_examples(10, channels=channels, classes=43),
        },
        shape=(None, None, channels),
        classes=43,
    )
    data = load("varying", data_dir=folder, cache_dir=tmp_path)
    assert data.train_images.shape == (43, 32, 32, channels)
    assert data.test_images.shape == (10, 32, 32, channels)
    assert data.train_images.dtype == np.uint8
    assert data.train_labels.dtype == np.int32
    assert data.classes == tuple(f"class {y}" for y in range(43))
    # Every pixel tells its image's identity, which is its label here.
    assert np.array_equal(data.train_images[:, 5, 7, 0], data.train_labels)
    if channels == 3:
        assert np.array_equal(data.train_images[:, 5, 7, 2], data.train_labels + 2)
    smaller = load("varying", data_dir=folder, cache_dir=tmp_path, image_size=12)
    assert smaller.image_shape == (12, 12, channels)


def test_a_fixed_size_is_kept_unless_another_is_asked_for(
    write_dataset: Write, make_examples: Make, tmp_path: Path
) -> None:
    rows = make_examples(6, channels=1, classes=3, size=(4, 6))
    folder = write_dataset("fixed", {"train": rows, "test": rows}, shape=(4, 6, 1), classes=3)
    assert load("fixed", data_dir=folder, cache_dir=tmp_path).image_shape == (4, 6, 1)
    resized = load("fixed", data_dir=folder, cache_dir=tmp_path, image_size=9)
    assert resized.image_shape == (9, 9, 1)


def test_four_channels_become_three(
    write_dataset: Write, make_examples: Make, tmp_path: Path
) -> None:
    rows = make_examples(4, channels=4, classes=2, size=(4, 4))
    folder = write_dataset("alpha", {"train": rows, "test": rows}, shape=(4, 4, 4), classes=2)
    assert load("alpha", data_dir=folder, cache_dir=tmp_path).image_shape == (4, 4, 3)


@pytest.mark.parametrize("test_split", ["absent", "unlabelled"])
def test_validation_serves_without_a_labelled_test_split(
    write_dataset: Write, make_examples: Make, tmp_path: Path, test_split: str
) -> None:
    splits = {
        "train": make_examples(6, channels=1, classes=2),
        "validation": make_examples(5, channels=1, classes=2),
    }
    if test_split == "unlabelled":
        splits["test"] = [(image, -1) for image, _ in make_examples(7, channels=1, classes=2)]
    folder = write_dataset("fallback", splits, shape=(None, None, 1), classes=2)
    data = load("fallback", data_dir=folder, cache_dir=tmp_path)
    assert sorted(data.test_images[:, 0, 0, 0].tolist()) == [0, 1, 2, 3, 4]
    assert np.array_equal(data.test_images[:, 0, 0, 0] % 2, data.test_labels)


def test_unlabelled_examples_are_left_out(
    write_dataset: Write, make_examples: Make, tmp_path: Path
) -> None:
    rows = make_examples(6, channels=1, classes=2)
    some = [(image, label if i > 1 else -1) for i, (image, label) in enumerate(rows)]
    folder = write_dataset("some", {"train": some, "test": rows}, shape=(None, None, 1), classes=2)
    data = load("some", data_dir=folder, cache_dir=tmp_path)
    assert sorted(data.train_images[:, 0, 0, 0].tolist()) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("splits", "lacking"), [(("train",), "test or validation"), (("test",), "train")]
)
def test_a_data_set_without_the_splits_is_refused(
    write_dataset: Write,
    make_examples: Make,
    tmp_path: Path,
    splits: tuple[str, ...],
    lacking: str,
) -> None:
    rows = make_examples(4, channels=1, classes=2)
    folder = write_dataset("halved", dict.fromkeys(splits, rows), shape=(None, None, 1), classes=2)
    with pytest.raises(InputError, match=rf"data\.name=halved: it has no labelled {lacking} split"):
        load("halved", data_dir=folder, cache_dir=tmp_path)


def test_columns_are_found_without_supervised_keys(
    write_dataset: Write, make_examples: Make, tmp_path: Path
) -> None:
    rows = make_examples(4, channels=1, classes=2)
    splits = {"train": rows, "test": rows}
    folder = write_dataset("bare", splits, shape=(None, None, 1), classes=2, supervised=None)
    assert load("bare", data_dir=folder, cache_dir=tmp_path).num_classes == 2


def test_two_images_without_supervised_keys_are_refused(
    write_dataset: Write, make_examples: Make, tmp_path: Path
) -> None:
    def features(tfds: Any) -> dict[str, Any]:
        image = tfds.features.Image(shape=(None, None, 1))
        return {"image": image, "mask": image, "label": tfds.features.ClassLabel(num_classes=2)}

    rows = make_examples(4, channels=1, classes=2)
    folder = write_dataset(
        "pair",
        {"train": rows, "test": rows},
        shape=(None, None, 1),
        classes=2,
        features=features,
        supervised=None,
    )
    with pytest.raises(InputError, match=r"its images are \['image', 'mask'\]"):
        load("pair", data_dir=folder, cache_dir=tmp_path)


def test_a_missing_file_is_refused(
    write_dataset: Write, make_examples: Make, tmp_path: Path
) -> None:
    rows = make_examples(4, channels=1, classes=2)
    folder = write_dataset("torn", {"train": rows, "test": rows}, shape=(None, None, 1), classes=2)
    next((folder / "torn" / "1.0.0").glob("*test*")).unlink()
    with pytest.raises(InputError, match=r"data\.name=torn: .*prepare it again"):
        load("torn", data_dir=folder, cache_dir=tmp_path)


@pytest.mark.parametrize("file", ["features.json", "hurt-test.array_record-00000-of-00001"])
def test_a_damaged_file_is_refused(
    write_dataset: Write, make_examples: Make, tmp_path: Path, file: str
) -> None:
    rows = make_examples(4, channels=1, classes=2)
    folder = write_dataset("hurt", {"train": rows, "test": rows}, shape=(None, None, 1), classes=2)
    path = folder / "hurt" / "1.0.0" / file
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"data\.name=hurt: .*is damaged") as caught:
        load("hurt", data_dir=folder, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shards(content: Any, length: str) -> None:
    for split in content["splits"]:
        split["shardLengths"] = [length]


HOSTILE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "examples without end": (
        "dataset_info.json",
        lambda path: rewrite(path, lambda content: shards(content, "1000000000000")),
        "is damaged",
    ),
    "images without end": (
        "features.json",
        lambda path: path.write_text(path.read_text().replace("-1", "1000000")),
        "is damaged|too large",
    ),
    "a module to import": (
        "features.json",
        lambda path: path.write_text(
            path.read_text().replace("tensorflow_datasets.", "antigravity.")
        ),
        "names antigravity.*, which is no feature of TFDS",
    ),
    "nested": ("features.json", lambda path: path.write_text("[" * 100_000), "is damaged"),
    "a pipe": ("label.labels.txt", lambda path: (path.unlink(), os.mkfifo(path)), "is a pipe"),
    "a type of TensorFlow": (
        "features.json",
        lambda path: path.write_text(path.read_text().replace('"uint8"', '"uint9"')),
        "names uint9, which is no type",
    ),
    "names without end": ("label.labels.txt", lambda path: os.truncate(path, 2**40), "larger than"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_metadata_are_refused_in_one_line(
    write_dataset: Write, make_examples: Make, tmp_path: Path, kind: str
) -> None:
    rows = make_examples(4, channels=3, classes=2)
    folder = write_dataset("odd", {"train": rows, "test": rows}, shape=(None, None, 3), classes=2)
    name, change, line = HOSTILE[kind]
    change(folder / "odd" / "1.0.0" / name)
    with pytest.raises(InputError, match=line) as caught:
        load("odd", data_dir=folder, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert "antigravity" not in sys.modules


def test_one_flipped_bit_is_refused_or_harmless(
    write_dataset: Write, make_examples: Make, tmp_path: Path
) -> None:
    rows = make_examples(4, channels=1, classes=2)
    folder = write_dataset("bit", {"train": rows, "test": rows}, shape=(None, None, 1), classes=2)
    draw = random.Random(0)
    for path in sorted((folder / "bit" / "1.0.0").iterdir()):
        whole = path.read_bytes()
        for turn in range(8):
            broken = bytearray(whole)
            # The records lie at the start of a file that is otherwise empty.
            broken[draw.randrange(min(len(broken), 1500))] ^= 1 << draw.randrange(8)
            path.write_bytes(broken)
            with contextlib.suppress(InputError):
                load("bit", data_dir=folder, cache_dir=tmp_path / f"{path.name}-{turn}")
        path.write_bytes(whole)


def test_a_format_that_needs_tensorflow_is_refused(
    write_dataset: Write, make_examples: Make, tmp_path: Path
) -> None:
    rows = make_examples(4, channels=1, classes=2)
    folder = write_dataset("rec", {"train": rows, "test": rows}, shape=(None, None, 1), classes=2)
    info = folder / "rec" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for file in info.parent.glob("*.array_record*"):
        file.rename(file.parent / file.name.replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r"holds it as tfrecord, which only TensorFlow reads"):
        load("rec", data_dir=folder, cache_dir=tmp_path)


def test_a_changed_data_set_changes_the_fingerprint(
    write_dataset: Write, make_examples: Make, tmp_path: Path
) -> None:
    rows = make_examples(4, channels=1, classes=2)
    folder = write_dataset("moody", {"train": rows, "test": rows}, shape=(None, None, 1), classes=2)
    home = folder / "moody" / "1.0.0"
    before = tfds_source.fingerprint(home)
    assert tfds_source.fingerprint(home) == before
    copy = tmp_path / "copy"
    shutil.copytree(home, copy)
    assert tfds_source.fingerprint(copy) != before
    (home / "label.labels.txt").write_text("other\nnames\n")
    assert tfds_source.fingerprint(home) != before
