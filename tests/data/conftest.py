from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flexmoe_jax import data

Examples = list[tuple[np.ndarray, int]]
Rows = list[dict[str, Any]]


def load(name: str, *, data_dir: str | Path = "", **given: Any) -> data.Dataset:
    """Loads a data set; options are given by name, beside the other arguments."""
    options = {key: given.pop(key) for key in data.DataOptions.rules() if key in given}
    return data.load(data.DataOptions(name, dir=str(data_dir), **options), **given)


def dealing(name: str, given: dict[str, Any]) -> data.PartitionOptions:
    """Separates the options of a partition from the other keyword arguments."""
    options = {key: given.pop(key) for key in data.PartitionOptions.rules() if key in given}
    return data.PartitionOptions(name, **{"min_per_client": 1} | options)


def partition(name: str, labels: np.ndarray, num_clients: int, **given: Any) -> Any:
    """Divides examples; options are given by name, beside the other arguments."""
    return data.partition(dealing(name, given), labels, num_clients, **given)


def check(name: str, **given: Any) -> None:
    """Checks a partition, in the same way."""
    data.check(dealing(name, given), **given)


def png(image: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="png")
    file.seek(0)
    return file


def write_texts(
    folder: Path,
    name: str,
    splits: Mapping[str, Rows],
    features: Callable[[Any], dict[str, Any]],
    supervised: tuple[str, str] | None = None,
) -> Path:
    """Prepares a data set of rows as TFDS itself does, without TensorFlow; returns its folder."""
    import tensorflow_datasets as tfds

    def info(self: Any) -> Any:
        columns = tfds.features.FeaturesDict(features(tfds))
        return tfds.core.DatasetInfo(builder=self, features=columns, supervised_keys=supervised)

    with tfds.core.registered.skip_registration():
        builder = make_builder(name, info, lambda self, rows: enumerate(rows), splits, "1.0.0")
    tfds.disable_progress_bar()
    builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def define_builder(
    name: str,
    splits: Mapping[str, Examples],
    *,
    shape: tuple[int | None, int | None, int],
    classes: int,
    as_arrays: bool = False,
    features: Callable[[Any], dict[str, Any]] | None = None,
    supervised: tuple[str, str] | None = ("image", "label"),
    version: str = "1.0.0",
) -> Any:
    """A TFDS builder class of the given examples, which TFDS registers under `name`."""
    import tensorflow_datasets as tfds

    def info(self: Any) -> Any:
        columns = {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(names=[f"class {y}" for y in range(classes)]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features(tfds) if features else columns),
            supervised_keys=supervised,
        )

    def examples(self: Any, rows: Examples) -> Any:
        for position, (image, label) in enumerate(rows):
            row = {"image": image if as_arrays else png(image), "label": label}
            for extra in set(self.info.features) - set(row):
                row[extra] = png(image)
            yield position, row

    return make_builder(name, info, examples, splits, version)


def make_builder(
    name: str, info: Any, examples: Any, splits: Mapping[str, Any], version: str
) -> Any:
    """Returns a TFDS builder class whose splits are the results of `examples`."""
    import tensorflow_datasets as tfds

    def generators(self: Any, _: Any) -> Any:
        return {split: self._generate_examples(rows) for split, rows in splits.items()}

    camel = "".join(part.title() for part in name.split("_"))
    return type(
        camel,
        (tfds.core.GeneratorBasedBuilder,),
        {
            "VERSION": tfds.core.Version(version),
            "name": name,
            "pkg_dir_path": Path(__file__).parent,
            "_info": info,
            "_split_generators": generators,
            "_generate_examples": examples,
        },
    )


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Prepares a data set under tmp_path/tfds, as TFDS itself does, and returns that folder."""

    def write(name: str, splits: Mapping[str, Examples], **options: Any) -> Path:
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        with tfds.core.registered.skip_registration():
            builder = define_builder(name, splits, **options)
        folder = tmp_path / "tfds"
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
        return folder

    return write


def flat(identity: int, height: int, width: int, channels: int) -> np.ndarray:
    """Returns an image whose pixels all equal its identity, shifted by i in channel i."""
    pixel = (identity + np.arange(channels)).astype(np.uint8)
    return np.broadcast_to(pixel, (height, width, channels)).copy()


@pytest.fixture
def make_examples() -> Callable[..., Examples]:
    """Makes flat images of varying or fixed size, whose label is their identity modulo Y."""

    def make(
        count: int, *, channels: int, classes: int, size: tuple[int, int] | None = None
    ) -> Examples:
        return [
            (flat(i, *(size or (5 + i % 4, 9 - i % 3)), channels), i % classes)
            for i in range(count)
        ]

    return make


@pytest.fixture
def define() -> Callable[..., Any]:
    """Registers a builder with TFDS, as data sets that can be downloaded are."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    return define_builder
