from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexmoe_jax import reading
from flexmoe_jax.data import client_numbers
from flexmoe_jax.errors import InputError
from tests.data.conftest import load, partition

Save = Callable[..., str]


def arrays() -> dict[str, Any]:
    """Ten examples to train on and four to test on, whose pixels are their positions."""
    images = np.broadcast_to(np.arange(14, dtype=np.uint8)[:, None, None, None], (14, 3, 4, 3))
    return {
        "train_images": images[:10],
        "train_labels": np.arange(10) % 2,
        "test_images": images[10:],
        "test_labels": np.array([0, 1, 1, 0]),
    }


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes the arrays with changes, None leaving one out, and returns the file's name."""

    def write(**changes: Any) -> str:
        path = tmp_path / "mine.npz"
        kept = {key: value for key, value in {**arrays(), **changes}.items() if value is not None}
        np.savez(path, **kept)
        return str(path)

    return write


def test_arrays_come_back_as_they_were_written(save: Save) -> None:
    name = save(classes=np.array(["cat", "dog"]), train_clients=np.arange(10) // 4)
    data = load(name)
    for key, value in arrays().items():
        assert np.array_equal(getattr(data, key), value)
    assert data.train_images.dtype == np.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == np.int32
    assert data.classes == ("cat", "dog")
    assert data.num_owners == 3
    assert data.name == name


def test_classes_are_counted_and_clients_unknown_where_the_file_does_not_say(save: Save) -> None:
    data = load(save(train_labels=np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1], np.uint8)))
    assert data.classes == ("0", "1", "2", "3")
    assert data.train_clients is None


@pytest.mark.parametrize("kind", [np.str_, np.bytes_])
def test_clients_may_have_names(save: Save, kind: type) -> None:
    names = np.array(["zoé", "ann", "bob"])
    train, test = names[np.arange(10) % 3], np.array(["bob", "zoé", "bob", "bob"])
    if kind is np.bytes_:
        train, test = np.char.encode(train, "utf-8"), np.char.encode(test, "utf-8")
    data = load(save(train_clients=train, test_clients=test), train_limit=8, test_limit=3)
    position = data.train_images[:, 0, 0, 0].astype(int)
    assert data.train_clients is not None
    assert data.test_clients is not None
    assert np.array_equal(data.train_clients, names[position % 3])
    parts = partition("natural", data.train_labels, 3, seed=0, owner=data.train_clients)
    assert [names[position[part] % 3][0] for part in parts] == ["ann", "bob", "zoé"]
    numbers = client_numbers(data.train_clients, data.test_clients)
    assert [["ann", "bob", "zoé"][n] for n in numbers] == data.test_clients.tolist()


def test_a_limit_may_leave_owners_without_training_examples(save: Save) -> None:
    # Ten owners of one training example each, of whom four are left.
    data = load(
        save(train_clients=np.arange(10), test_clients=np.array([9, 0, 5, 1])), train_limit=4
    )
    assert data.num_owners == 4
    assert data.train_clients is not None
    assert data.test_clients is not None
    assert data.test_clients.tolist() == [9, 0, 5, 1]
    numbers = client_numbers(data.train_clients, data.test_clients)
    assert (numbers >= 0).tolist() == np.isin(data.test_clients, data.train_clients).tolist()
    assert not (numbers >= 0).all()


def test_owners_whom_a_limit_leaves_out_have_no_number() -> None:
    assert client_numbers(np.array([5, 3, 5]), np.array([3, 4, 5, 9, 0])).tolist() == [
        *(0, -1, 1, -1, -1)
    ]


def test_arrays_that_are_not_used_are_named(save: Save) -> None:
    assert load(save()).notes == ()
    (note,) = load(save(train_client=np.zeros(10), a=0, b=0)).notes
    assert note.endswith(
        "mine.npz holds arrays that are not used: train_client, a, b; did you mean train_clients "
        "by train_client?"
    )
    (note,) = load(save(**{f"extra_{i}": 0 for i in range(50)})).notes
    assert "extra_9 and 40 more" in note


def test_images_without_channels_get_one(save: Save) -> None:
    grey = arrays()["train_images"][..., 0]
    data = load(save(train_images=grey, test_images=grey[:4]))
    assert data.image_shape == (3, 4, 1)
    assert np.array_equal(data.train_images[..., 0], grey)


@pytest.mark.parametrize("dtype", [np.float64, np.uint16, np.int8, bool])
def test_other_numbers_become_single_precision(save: Save, dtype: type) -> None:
    features = np.arange(50).reshape(10, 5).astype(dtype)
    data = load(save(train_images=features, test_images=features[:4]))
    assert data.train_images.dtype == np.float32
    assert np.array_equal(data.train_images, features)


def test_limits_keep_each_examples_label_and_client(save: Save) -> None:
    data = load(save(train_clients=np.arange(10) * 5), train_limit=4, test_limit=2)
    position = data.train_images[:, 0, 0, 0].astype(int)
    assert np.bincount(data.train_labels).tolist() == [2, 2]
    assert np.array_equal(position % 2, data.train_labels)
    assert data.train_clients is not None
    assert np.array_equal(position * 5, data.train_clients)
    assert len(data.test_images) == len(data.test_labels) == 2


def test_sizes_are_put_to_the_caller_as_they_will_be(save: Save) -> None:
    seen = []
    name = save(train_clients=np.arange(10) // 5)
    load(name, train_limit=6, accept=lambda *sizes: seen.append(sizes))
    assert seen == [(2, 6, 2)]


def test_images_are_resized_on_request(save: Save) -> None:
    data = load(save(), image_size=6)
    assert data.train_images.shape == (10, 6, 6, 3)
    assert np.array_equal(data.train_images[:, 5, 5, 2], np.arange(10))
    with pytest.raises(InputError, match=r"^data\.image_size=6: .*not float32 of shape \(5,\)"):
        load(save(train_images=np.zeros((10, 5)), test_images=np.zeros((4, 5))), image_size=6)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train_labels": None, "test_images": None}, "it lacks train_labels, test_images .*holds"),
        ({"train_labels": np.zeros(9, int)}, "train_labels=.*each of 10 images"),
        ({"train_clients": np.zeros(9, int)}, "train_clients=.*each of 10 images"),
        ({"train_clients": np.zeros(10)}, "train_clients=float64 .*a whole number or a text"),
        ({"test_clients": np.zeros(4, int)}, "test_clients=int64: train_clients are none"),
        (
            {"train_clients": np.zeros(10, int), "test_clients": np.zeros(5, int)},
            "test_clients=int64 of shape .5,.: .*each of 4 images",
        ),
        (
            {"train_clients": np.zeros(10, int), "test_clients": np.array(list("aaaa"))},
            "test_clients=<U1: train_clients are int64; give ids",
        ),
        (
            {"train_clients": np.zeros(10, int), "test_clients": np.array([0, 7, 0, 8])},
            "test_clients=7: is one of 2 owners without a training example",
        ),
        ({"test_labels": np.array([0, 1, 0.5, 1])}, "test_labels=float64 .*whole number"),
        ({"test_labels": np.array(list("abba"))}, "test_labels=<U1 .*whole number"),
        # Two classes counted from 1; and a class 5 of which there are only two more.
        ({"train_labels": np.ones(10, int), "test_labels": np.full(4, 2)}, "test_labels=2: number"),
        ({"test_labels": np.array([0, 1, 5, 5])}, "test_labels=5: number the 3 .* 0 to 2"),
        ({"classes": np.array(["cat"])}, "train_labels=1: number the 1 classes"),
        ({"test_images": np.zeros((4, 3, 3, 3), np.uint8)}, r"test_images=\(3, 3, 3\): "),
        ({"train_images": np.array(["png"] * 10)}, "train_images is <U3"),
        ({"train_images": np.zeros((0, 3, 4, 3))}, r"train_images is float64 of shape \(0, 3"),
        ({"train_images": np.full((10, 3, 4, 3), np.nan)}, "train_images has NaN"),
        ({"classes": np.array(["cat", None], object)}, "it cannot be read .*np.savez"),
    ],
)
def test_a_file_that_will_not_do_is_one_line(
    save: Save, changes: dict[str, Any], line: str
) -> None:
    name = save(**changes)
    with pytest.raises(InputError, match=rf"^data\.name=.*mine\.npz: {line}") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_file_is_one_line(save: Save, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.name=nowhere/mine\.npz: there is no such file$"):
        load("nowhere/mine.npz")
    path = Path(save())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (b"", b"not an archive", whole[:500], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"mine\.npz: it cannot be read \(") as caught:
            load(str(path))
        assert "\n" not in str(caught.value)
    np.save(tmp_path / "alone.npy", np.zeros(3))
    (tmp_path / "alone.npy").rename(tmp_path / "alone.npz")
    with pytest.raises(InputError, match=r"alone\.npz: it cannot be read \("):
        load(str(tmp_path / "alone.npz"))


def test_the_home_folder_is_found(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(save())
    monkeypatch.setenv("HOME", str(path.parent))
    assert load("~/mine.npz").num_classes == 2


def test_a_relative_name_begins_in_the_data_folder(save: Save, tmp_path: Path, monkeypatch) -> None:
    home = Path(save()).parent
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load("mine.npz", data_dir=home).num_classes == 2
    assert load(save(), data_dir="/nowhere").num_classes == 2
    monkeypatch.setenv("HOME", str(home.parent))
    assert load("mine.npz", data_dir=f"~/{home.name}").num_classes == 2
    with pytest.raises(InputError, match=r"^data\.name=mine\.npz: there is no such file$"):
        load("mine.npz")
    line = r"^data\.name=mine\.npz: there is no such file in data\.dir=/nowhere$"
    with pytest.raises(InputError, match=line):
        load("mine.npz", data_dir="/nowhere")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_one_line_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd\nname.npz"
    {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
    }[kind](path)
    with pytest.raises(InputError, match=rf"odd name\.npz: it cannot be read \(is a {kind}") as one:
        load(str(path))
    assert "\n" not in str(one.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train_images": np.zeros((10, 3, 4), complex)}, "train_images is complex128"),
        ({"train_images": np.zeros((10, 3), "M8[s]")}, "train_images is datetime64"),
        ({"train_images": np.zeros((10, 3), "i4,f4")}, "it cannot be read"),
        ({"train_images": np.float64(3)}, r"train_images is float64 of shape \(\)"),
        ({"train_images": np.full((10, 3, 4, 3), 1e300)}, "train_images has NaN or infinity"),
        ({"train_labels": np.zeros(10, "m8[s]")}, "train_labels=timedelta64"),
        ({"train_labels": np.zeros(10, "M8[s]")}, "train_labels=datetime64"),
        ({"train_labels": np.int64(1)}, r"train_labels=int64 of shape \(\)"),
        ({"train_labels": np.array(["a"] * 10), "test_labels": np.zeros(4)}, "train_labels=<U1"),
        ({"train_labels": np.full(10, 2**63, np.uint64)}, "train_labels=9223372036854775808"),
        ({"classes": np.zeros((0, 3))}, "train_labels=0: number the 0 classes"),
    ],
)
def test_arrays_of_other_kinds_are_one_line(
    save: Save, recwarn, changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError, match=rf"mine\.npz: {line}"):
        load(save(**changes))
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [">f4", ">i2", np.longdouble, ">f8"])
def test_byte_order_and_layout_do_not_matter(save: Save, dtype: Any) -> None:
    features = np.asfortranarray(np.arange(50).reshape(10, 5).astype(dtype))
    labels = np.arange(10).astype(">u2") % 2
    data = load(save(train_images=features, test_images=features[:4], train_labels=labels))
    assert data.train_images.dtype == np.float32
    assert np.array_equal(data.train_images, np.arange(50).reshape(10, 5))
    assert np.array_equal(data.train_labels, labels)


def test_names_of_classes_in_bytes_are_their_texts(save: Save) -> None:
    assert load(save(classes=np.array([b"cat", "hé".encode()]))).classes == ("cat", "hé")


def test_images_too_large_for_memory_are_refused_before(save: Save, monkeypatch) -> None:
    monkeypatch.setattr(reading, "_free_memory", lambda: 10**6)
    line = r"^data\.image_size=4000: the decoded images are too large \(takes 0.5 GB"
    with pytest.raises(InputError, match=line):
        load(save(), image_size=4000)
    with pytest.raises(InputError, match=line.replace("0.5", "28.8")):
        load("digits", image_size=4000)
