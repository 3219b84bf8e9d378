from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexmoe_jax.data import layout
from flexmoe_jax.errors import InputError


def prepare(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        for file in ("features.json", "dataset_info.json"):
            (folder / name / file).write_text("{}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10", ("cifar10", "", "")),
        ("cifar10:3.0.2", ("cifar10", "", "3.0.2")),
        ("cifar10/3.0.2", ("cifar10", "", "3.0.2")),
        ("emnist/digits", ("emnist", "digits", "")),
        ("emnist/digits:3.*.*", ("emnist", "digits", "3.*.*")),
        ("visual_domain_decathlon/gtsrb", ("visual_domain_decathlon", "gtsrb", "")),
    ],
)
def test_names_come_apart(name: str, expected: tuple[str, str, str]) -> None:
    assert layout.parse(name) == expected


@pytest.mark.parametrize("name", ["", "../secret", "a/b/c", "a b", "/etc", "a:1", "a/..", "a\nb"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"data\.name="):
        layout.parse(name)


def test_the_newest_complete_version_is_found(tmp_path: Path) -> None:
    prepare(tmp_path, "toy/1.9.0", "toy/1.10.0", "set/small/1.0.0", "set/large/2.0.0")
    (tmp_path / "toy" / "9.0.0").mkdir()  # left behind by an interrupted preparation

    def find(name: str) -> str | None:
        found = layout.find(tmp_path, layout.parse(name))
        return None if found is None else str(found.relative_to(tmp_path))

    assert find("toy") == "toy/1.10.0"
    assert find("toy:1.9.0") == "toy/1.9.0"
    assert find("toy:1.*.*") == "toy/1.10.0"
    assert find("toy:2.0.0") is None
    assert find("set/small") == "set/small/1.0.0"
    assert find("set") is None
    (tmp_path / "set" / ".config").mkdir()
    note = {"default_config_name": "large"}
    (tmp_path / "set" / ".config" / "metadata.json").write_text(json.dumps(note))
    assert find("set") == "set/large/2.0.0"
    assert layout.prepared(tmp_path) == ["set/large", "set/small", "toy"]


@pytest.mark.parametrize(
    ("name", "field", "says"),
    [
        ("somecars", "data.name", "which holds set/small, toyota"),
        ("Toyta", "data.name", "did you mean toyota?"),
        ("digit", "data.name", "did you mean digits?"),
        ("set", "data.name", "did you mean set/small?"),
        ("toyota:2.0.0", "data.name", "holds its versions 1.0.0"),
    ],
)
def test_a_missing_data_set_is_refused(tmp_path: Path, name: str, field: str, says: str) -> None:
    prepare(tmp_path, "toyota/1.0.0", "set/small/1.0.0")
    error = layout.missing(name, layout.parse(name), tmp_path)
    assert error.field == field
    for part in (says, str(tmp_path), "point data.dir at", "set data.download=true"):
        assert part in str(error)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    error = layout.missing("cifar10", layout.parse("cifar10"), tmp_path)
    assert "which holds no prepared data set" in str(error)


@pytest.mark.parametrize(("name", "field"), [("cifar10", "data.dir"), ("digitz", "data.name")])
def test_a_missing_folder_is_refused(tmp_path: Path, name: str, field: str) -> None:
    error = layout.missing(name, layout.parse(name), tmp_path / "nowhere")
    assert error.field == field
    for part in (str(tmp_path / "nowhere"), "point data.dir at", "set data.download=true"):
        assert part in str(error)


def test_the_folder_defaults_to_that_of_tfds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert layout.data_folder("") == Path("/home/me/tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", "/big/disk")
    assert layout.data_folder(None) == Path("/big/disk")
    assert layout.data_folder("~/mine") == Path("/home/me/mine")
