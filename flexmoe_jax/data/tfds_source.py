"""Read labelled images, and text, in TFDS's format, without TensorFlow."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from flexmoe_jax.data import decode, layout
from flexmoe_jax.data.cache import Arrays
from flexmoe_jax.data.tfds_metadata import check_metadata
from flexmoe_jax.errors import InputError, require_package
from flexmoe_jax.reading import UnreadableError, require_memory

DEFAULT_IMAGE_SIZE = 32  # side in pixels, for data sets whose images vary in size
_TEST_SPLITS = ("test", "validation")  # in order of preference
_READ_AT_ONCE = 4096  # records

Texts = dict[str, bytes]


class _Columns(NamedTuple):
    """The features of an example that are read, and the shape that images are converted to.

    Attributes:
      image: key of the image feature.
      label: key of the label feature.
      classes: names of the Y classes; empty if the metadata do not give them.
      shape: (height, width, channels) of every image after decoding.
    """

    image: str
    label: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]


def read(
    name: str,
    version_folder: Path,
    image_size: int,
    accept: Callable[[int, int], None] = lambda classes, examples: None,
) -> Arrays:
    """Decode a prepared data set.

    The test examples come from the split `test`, or from `validation` if `test` is missing or has
    no labels. Examples without a label (-1) are left out.

    Args:
      name: the user's name of the data set, for messages.
      version_folder: the folder of one prepared version.
      image_size: side in pixels to resize images to; 0 keeps the data set's own size, or uses
        `DEFAULT_IMAGE_SIZE` if its images vary in size.
      accept: called with the numbers of classes and of training examples before anything is
        decoded, if the metadata give both; raises to reject the data set.

    Returns:
      `train_images` (M, height, width, channels) uint8, `train_labels` (M,) int32, the same two
      for `test`, and `classes` (Y,) str.

    Raises:
      InputError: if the data set has no images, labels, train split or labelled test split, or is
        damaged.
    """
    with _quiet(), _refusing_damage(name, version_folder):
        require_package(
            "tensorflow_datasets", "data", "reads data sets of TFDS, without TensorFlow"
        )
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(version_folder)
        columns = _columns(name, builder.info, image_size)
        if columns.classes and "train" in builder.info.splits:
            accept(len(columns.classes), builder.info.splits["train"].num_examples)
        train = _read_split(name, builder, "train", columns)
        tests = (_read_split(name, builder, split, columns) for split in _TEST_SPLITS)
        test = next((found for found in tests if found is not None), None)
    if train is None or test is None:
        lacking = "train" if train is None else " or ".join(_TEST_SPLITS)
        has = ", ".join(builder.info.splits)
        remedy = f"it has no labelled {lacking} split (it has {has}); choose another data set"
        raise InputError("data.name", name, remedy)
    labels = np.concatenate([train[1], test[1]])
    classes = columns.classes or tuple(str(y) for y in range(int(labels.max()) + 1))
    if labels.max() >= len(classes):
        remedy = f"it has a label {labels.max()} but {len(classes)} classes; prepare it again"
        raise InputError("data.name", name, remedy)
    return {
        "train_images": train[0],
        "train_labels": train[1],
        "test_images": test[0],
        "test_labels": test[1],
        "classes": np.array(classes),
    }


class _Text(NamedTuple):
    """The features of a text example that are read.

    Attributes:
      text: key of the text feature.
      domain: key of the feature whose value is the domain of a text; empty if there is one domain.
      names: names of the domain feature's values, if it is a class label.
    """

    text: str
    domain: str
    names: tuple[str, ...]


def read_text(name: str, version_folder: Path, domain: str) -> tuple[Texts, Texts]:
    """Read the texts of a prepared data set.

    Args:
      name: the user's name of the data set, for messages.
      version_folder: the folder of one prepared version.
      domain: key of the feature whose values are the domains. If empty, the domain is the class
        label if there is exactly one, else all text is one domain. Texts without a label (-1) are
        left out.

    Returns:
      Two dictionaries from domain to text, with a line break after each example: of the split
      `train`; and of `test`, else of `validation`, empty if neither has text.

    Raises:
      InputError: if the data set has no text, domain feature or train split, or is damaged.
    """
    with _quiet(), _refusing_damage(name, version_folder):
        require_package(
            "tensorflow_datasets", "data", "reads data sets of TFDS, without TensorFlow"
        )
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(version_folder)
        columns = _text_columns(name, builder.info, domain)
        train = _read_texts(name, builder, "train", columns)
        if not train:
            has = ", ".join(builder.info.splits)
            remedy = f"it has no text in a train split (it has {has}); choose another data set"
            raise InputError("data.name", name, remedy)
        tests = (_read_texts(name, builder, split, columns) for split in _TEST_SPLITS)
        test = next((found for found in tests if found), {})
    return train, test


def download(name: str, folder: Path) -> None:
    """Download and prepare a data set with TFDS, in a format that is readable without TensorFlow.

    Args:
      name: `base[/config][:version]`.
      folder: the data folder to prepare it in.

    Raises:
      InputError: if TFDS does not know the name, or the download fails.
    """
    base, config, version = layout.parse(name)
    full = base + (f"/{config}" if config else "") + (f":{version}" if version else "")
    with _quiet():
        require_package("tensorflow_datasets", "data", "downloads data sets of TFDS")
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(full, data_dir=folder, file_format="array_record")
            _encode_without_tensorflow(builder)
            builder.download_and_prepare()
        except tfds.core.registered.DatasetNotFoundError as error:
            raise InputError(
                "data.name", name, f"neither TFDS nor {folder} knows it; see tfds.list_builders()"
            ) from error
        except Exception as error:  # The network, the disk or the builder can raise anything.
            raise InputError(
                "data.download",
                True,
                f"{name} could not be prepared in {folder} ({_reason(error)}); check the network "
                "and the disk, or point data.dir at a folder that holds a prepared copy",
            ) from error


def fingerprint(version_folder: Path) -> str:
    """Hash the decoder, a prepared data set's path, and the name, size and time of each file."""
    files = sorted(path for path in version_folder.iterdir() if path.is_file())
    stats = [(path.name, path.stat()) for path in files]
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    made_from = decode.package(), str(version_folder), listing
    return hashlib.sha256(repr(made_from).encode()).hexdigest()


def _columns(name: str, info: Any, image_size: int) -> _Columns:
    """Find the image and the label in the metadata."""
    import tensorflow_datasets as tfds

    known = isinstance(info.features, tfds.features.FeaturesDict)
    features = dict(sorted(info.features.items())) if known else {}
    images = [key for key, one in features.items() if isinstance(one, tfds.features.Image)]
    labels = [key for key, one in features.items() if isinstance(one, tfds.features.ClassLabel)]
    supervised: tuple[str, ...] = info.supervised_keys or ()
    if len(supervised) == 2 and supervised[0] in images and supervised[1] in labels:
        images, labels = [supervised[0]], [supervised[1]]
    if len(images) != 1 or len(labels) != 1:
        raise InputError(
            "data.name",
            name,
            "image classification needs one image and one class label; its images are "
            f"{images} and its labels {labels}; choose another data set",
        )
    image, label = features[images[0]], features[labels[0]]
    if len(image.shape) != 3 or image.np_dtype not in (np.uint8, np.uint16):
        raise InputError(
            "data.name",
            name,
            f"its images are {image.np_dtype} of shape {image.shape}, not whole numbers of shape "
            "(height, width, channels); choose another data set",
        )
    height, width, channels = image.shape
    if image_size:
        height = width = image_size
    return _Columns(
        image=images[0],
        label=labels[0],
        classes=tuple(label.names or ()),
        shape=(
            height or DEFAULT_IMAGE_SIZE,
            width or DEFAULT_IMAGE_SIZE,
            1 if channels in (1, 2) else 3,
        ),
    )


def _text_columns(name: str, info: Any, domain: str) -> _Text:
    """Find the text, and the feature that gives its domain, in the metadata."""
    import tensorflow_datasets as tfds

    known = isinstance(info.features, tfds.features.FeaturesDict)
    features = dict(sorted(info.features.items())) if known else {}
    kinds = {key: one for key, one in features.items() if one.shape == ()}
    texts = [key for key, one in kinds.items() if isinstance(one, tfds.features.Text)]
    labels = [key for key, one in kinds.items() if isinstance(one, tfds.features.ClassLabel)]
    telling = [
        key for key, one in kinds.items() if key in texts or np.issubdtype(one.np_dtype, np.integer)
    ]
    if domain and domain not in telling:
        remedy = f"{name} has no such feature; choose one of {', '.join(telling)}"
        raise InputError("data.domain", domain, remedy)
    candidates = [key for key in texts if key != domain]
    chosen = [key for key in (*(info.supervised_keys or ()), "text") if key in candidates]
    if len(candidates) > 1:
        candidates = chosen[:1]
    if not candidates:
        remedy = f"next_token needs one text; its texts are {texts}; choose another data set"
        raise InputError("data.name", name, remedy)
    of = domain or (labels[0] if len(labels) == 1 else "")
    return _Text(candidates[0], of, tuple(features[of].names or ()) if of in labels else ())


def _read_texts(name: str, builder: Any, split: str, columns: _Text) -> Texts:
    """Return a split's texts by domain; empty if there is no such split."""
    if split not in builder.info.splits:
        return {}
    records = _records(name, builder, split)
    require_memory(sum(Path(path).stat().st_size for path in builder.info.splits[split].filepaths))
    found: dict[str, list[bytes]] = {}
    for feature in _features(records):
        domain = _domain(feature, columns)
        if domain is not None:
            text = feature[columns.text].bytes_list.value[0]
            found.setdefault(domain, []).append(text + b"\n")
    return {domain: b"".join(texts) for domain, texts in found.items()}


def _domain(feature: Any, columns: _Text) -> str | None:
    """Return the domain of an example; None if it has no label."""
    if not columns.domain:
        return "all"
    value = feature[columns.domain]
    if value.bytes_list.value:
        return value.bytes_list.value[0].decode()
    number = value.int64_list.value[0]
    if not columns.names:
        return str(number)
    return columns.names[number] if number >= 0 else None


def _read_split(
    name: str, builder: Any, split: str, columns: _Columns
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a split's labelled images and their labels, or None if it has none."""
    if split not in builder.info.splits:
        return None
    records = _records(name, builder, split)
    total = builder.info.splits[split].num_examples
    if total > sum(Path(path).stat().st_size for path in builder.info.splits[split].filepaths):
        raise UnreadableError(f"its split {split} is said to have {total:,} examples")
    decode.check_room(total * math.prod(columns.shape), columns.shape[0])
    images = np.empty((total, *columns.shape), np.uint8)
    labels = np.empty((total,), np.int32)
    to_image = decode.decoder(columns.shape[-1])
    count = 0
    for position, (encoded, label) in enumerate(_examples(records, columns)):
        if label < 0:
            continue
        try:
            images[count] = decode.resize(to_image(encoded), *columns.shape[:2])
        except OSError as error:
            raise InputError(
                "data.name",
                name,
                f"image {position} of its split {split} cannot be decoded; prepare it again",
            ) from error
        labels[count] = label
        count += 1
    return (images[:count], labels[:count]) if count else None


def _records(name: str, builder: Any, split: str) -> Any:
    """Open a split for random access to its serialised examples."""
    import tensorflow_datasets as tfds

    lost = [path for path in builder.info.splits[split].filepaths if not Path(path).is_file()]
    if lost:
        raise InputError("data.name", name, f"the file {lost[0]} is missing; prepare it again")
    try:
        return builder.as_data_source(
            split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
    except NotImplementedError as error:
        raise InputError(
            "data.name",
            name,
            f"{builder.data_path} holds it as {builder.info.file_format.value}, which only "
            "TensorFlow reads; prepare it with file_format=array_record, or set "
            "data.download=true with an empty data.dir",
        ) from error


def _examples(records: Any, columns: _Columns) -> Iterator[tuple[bytes, int]]:
    """Yield the encoded image and the label of each example."""
    for feature in _features(records):
        yield (
            feature[columns.image].bytes_list.value[0],
            feature[columns.label].int64_list.value[0],
        )


def _features(records: Any) -> Iterator[Any]:
    """Yield the features of each example by key."""
    from tensorflow_datasets.proto import tf_example_pb2

    for start in range(0, len(records), _READ_AT_ONCE):
        stop = min(start + _READ_AT_ONCE, len(records))
        for record in records.__getitems__(list(range(start, stop))):
            yield tf_example_pb2.Example.FromString(record).features.feature


def _encode_without_tensorflow(builder: Any) -> None:
    """Let a builder encode image arrays with Pillow, since TFDS would call TensorFlow."""
    if importlib.util.find_spec("tensorflow") is not None:
        return
    import tensorflow_datasets as tfds

    def with_pillow(encode: Any) -> Any:
        def encode_example(image: Any) -> Any:
            return encode(decode.encode_png(image) if isinstance(image, np.ndarray) else image)

        return encode_example

    for feature in dict(builder.info.features).values():
        if isinstance(feature, tfds.features.Image) and feature.np_dtype != np.float32:
            feature.encode_example = with_pillow(feature.encode_example)


@contextlib.contextmanager
def _refusing_damage(name: str, version_folder: Path) -> Iterator[None]:
    """Check the metadata, and turn the readers' errors about damaged files into an InputError."""
    try:
        check_metadata(version_folder)
        yield
    except InputError:
        raise
    except Exception as error:  # Damaged metadata, records and examples raise different errors.
        if isinstance(error, ImportError) and error.name != "tensorflow":
            raise  # A missing package is no damage. Only unusual types need TensorFlow.
        raise InputError(
            "data.name", name, f"{version_folder} is damaged ({_reason(error)}); prepare it again"
        ) from error


def _reason(error: Exception) -> str:
    """Return the start of an error's message, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS's log lines out of the run's log."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
