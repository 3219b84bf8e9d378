"""Load data sets into host memory: embedded digits, the user's own arrays and texts, and TFDS."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from flexmoe_jax.data import decode, layout, npz_source, tfds_source
from flexmoe_jax.data.apportion import apportion
from flexmoe_jax.data.cache import Arrays, cached, default_folder
from flexmoe_jax.data.text import TEXT, TOPICS, Corpus, corpus_of, python_topics, read_corpus
from flexmoe_jax.errors import InputError, require_package
from flexmoe_jax.options.data import DataOptions

_DIGITS_TEST_SHARE = 0.2
_DIGITS_SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An image classification data set.

    Attributes:
      name: the name under which it was loaded.
      train_images: (M, height, width, channels) uint8, or any numbers of shape (M, ...) that the
        backbone accepts.
      train_labels: (M,) int in [0, Y); int32 if `load` made the data set.
      test_images: like `train_images`, for the test examples.
      test_labels: like `train_labels`, for the test examples.
      classes: names of the Y classes.
      train_clients: (M,) int or str, id of the client that owns each training example; None if the
        data set does not say.
      test_clients: the same for the test examples. An owner without training examples, for example
        because `data.train_limit` left them out, is not a client.
      notes: sentences that tell the user how the data were read.

    Raises:
      InputError: if the arrays do not fit together; names the array.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    train_clients: np.ndarray | None = None
    test_clients: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the arrays fit together."""
        twice = [name for i, name in enumerate(self.classes) if name in self.classes[:i]]
        if twice:
            raise InputError("classes", twice[0], "two classes have this name: give each its own")
        _check_labels("train_labels", self.train_labels, self.train_images, self.num_classes)
        _check_labels("test_labels", self.test_labels, self.test_images, self.num_classes)
        if self.test_images.shape[1:] != self.image_shape:
            shape = self.test_images.shape[1:]
            raise InputError("test_images", shape, f"those to train on are {self.image_shape}")
        if self.train_clients is not None:
            _check_owners("train_clients", self.train_clients, len(self.train_images))
        if self.test_clients is not None:
            _check_owners("test_clients", self.test_clients, len(self.test_images))
            _check_same_ids(self.test_clients, self.train_clients)

    @property
    def num_classes(self) -> int:
        """Y, the number of classes."""
        return len(self.classes)

    @property
    def num_owners(self) -> int:
        """Number of clients that own training examples; 0 if the data set does not say."""
        return 0 if self.train_clients is None else len(np.unique(self.train_clients))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of every image."""
        return self.train_images.shape[1:]


def load(
    options: DataOptions,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    accept: Callable[[int, int, int], None] = lambda classes, examples, owners: None,
) -> Dataset:
    """Load a data set.

    `digits` is scikit-learn's 1,797 handwritten digits, in a fixed stratified 80/20 split. The path
    of an `.npz` file loads its arrays: `train_images`, `train_labels`, `test_images`,
    `test_labels`, and optionally `classes`, `train_clients` and `test_clients`, as in `Dataset`.
    Any other name is a TFDS image classification data set (`emnist/digits`, `cifar10:3.0.2`). Its
    metadata give shape, classes and splits. Its images are decoded once; later loads read the
    pixels from the cache.

    Args:
      options: the name, as `digits`, `path/to/file.npz` or `name[/config][:version]`; the folder;
        and limits on the number of examples. If the folder is empty, it is TFDS's default
        (`$TFDS_DATA_DIR`, else `~/tensorflow_datasets`), or for an `.npz` file the current folder.
        Nothing is downloaded unless the options say so.
      cache_dir: folder of the decoded pixels; if empty, `$XDG_CACHE_HOME/flexmoe_jax`, else
        `~/.cache/flexmoe_jax`.
      seed: seed for the choice of examples if there are limits.
      accept: called with the numbers of classes, of training examples and of clients that own them
        (0 if unknown) once they are known, if possible before decoding. It raises to reject.

    Returns:
      The data set.

    Raises:
      InputError: if the data set is missing or unsuitable.
    """
    name = options.name

    def accept_prepared(classes: int, examples: int) -> None:
        accept(classes, min(options.train_limit or examples, examples), 0)

    if name == layout.EMBEDDED:
        whole = _digits(options.image_size, cache_dir)
    elif name.endswith(npz_source.SUFFIX):
        arrays, unread = npz_source.read(name, options.image_size, options.dir)
        whole = _dataset(name, arrays, unread)
    else:
        whole = _prepared(options, cache_dir, accept_prepared)
    one, two = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    train = stratified_sample(whole.train_labels, options.train_limit, one)
    test = stratified_sample(whole.test_labels, options.test_limit, two)
    dataset = dataclasses.replace(
        whole,
        train_images=whole.train_images[train],
        train_labels=whole.train_labels[train].astype(np.int32),
        test_images=whole.test_images[test],
        test_labels=whole.test_labels[test].astype(np.int32),
        train_clients=None if whole.train_clients is None else whole.train_clients[train],
        test_clients=None if whole.test_clients is None else whole.test_clients[test],
    )
    accept(dataset.num_classes, len(dataset.train_labels), dataset.num_owners)
    return dataset


def is_pictures(name: str) -> bool:
    """Return whether the value of `data.name` alone shows that the data set holds no text."""
    return name == layout.EMBEDDED or name.endswith(npz_source.SUFFIX)


def load_corpus(options: DataOptions) -> Corpus:
    """Load texts.

    `python_topics` is the help text of the Python installation, with one domain for each topic.
    `text` is a folder or `.jsonl` file (see `read_corpus`). Any other name is a TFDS data set with
    a text feature (`tiny_shakespeare`, `ag_news_subset`). Its domains are the values of the feature
    `options.domain` (by default its class label), and its test texts come from its test split.

    Raises:
      InputError: if the texts are missing or unsuitable.
    """
    if options.name == TOPICS:
        return python_topics()
    if options.name == TEXT:
        return read_corpus(options.dir)
    folder = _prepared_folder(options)
    return corpus_of(*tfds_source.read_text(options.name, folder, options.domain), folder)


def stratified_sample(
    labels: np.ndarray, limit: int, rng: np.random.Generator
) -> np.ndarray | slice:
    """Draw `limit` examples without replacement, with the class shares of all examples.

    Args:
      labels: (M,) int in [0, Y).
      limit: number of examples; 0, or M and more, keeps all.
      rng: draws the examples within each class.

    Returns:
      Increasing positions (limit,), or a slice that keeps everything without a copy.
    """
    if limit == 0 or limit >= len(labels):
        return slice(None)
    present, counts = np.unique(labels, return_counts=True)
    quotas = apportion(limit, counts)
    chosen = [
        rng.choice(np.flatnonzero(labels == y), quota, replace=False)
        for y, quota in zip(present, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def _digits(image_size: int, cache_dir: str | os.PathLike[str] | None) -> Dataset:
    """Return the embedded data set: (8, 8, 1) images, grey levels 0..16 scaled to 0..255."""
    require_package("sklearn", "data", "the digits are scikit-learn's")

    def read() -> dict[str, np.ndarray]:
        # Importing scikit-learn takes longer than everything else a launch loads, so do it once.
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
        return {"images": images, "labels": bunch.target.astype(np.int32)}

    folder = Path(os.path.expanduser(cache_dir)) if cache_dir else default_folder()
    kept = cached(folder / "digits.npz", f"scikit-learn {version('scikit-learn')}", read)
    images, labels = kept["images"], kept["labels"]
    if image_size:
        images = decode.resize_all(images, image_size)
    is_test = np.zeros(len(labels), bool)
    test_count = round(_DIGITS_TEST_SHARE * len(labels))
    # The split does not depend on the run's seed, so results on digits compare across seeds.
    is_test[stratified_sample(labels, test_count, np.random.default_rng(_DIGITS_SPLIT_SEED))] = True
    return Dataset(
        name=layout.EMBEDDED,
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
        classes=tuple(str(y) for y in range(10)),
    )


def _prepared(
    options: DataOptions,
    cache_dir: str | os.PathLike[str] | None,
    accept: Callable[[int, int], None],
) -> Dataset:
    """Return a data set in TFDS's format, from the cache if these files were decoded before."""
    name, image_size = options.name, options.image_size
    reference, version_folder = layout.parse(name), _prepared_folder(options)
    # One cache file for each copy of the data: if the copy changes, its cache file is replaced.
    place = hashlib.sha256(f"{version_folder}|{image_size}".encode()).hexdigest()[:16]
    stem = "-".join(filter(None, [reference.base, reference.config, version_folder.name, place]))
    arrays = cached(
        (Path(os.path.expanduser(cache_dir)) if cache_dir else default_folder()) / f"{stem}.npz",
        tfds_source.fingerprint(version_folder),
        lambda: tfds_source.read(name, version_folder, image_size, accept),
    )
    return _dataset(name, arrays)


def _prepared_folder(options: DataOptions) -> Path:
    """Return the folder of one version of a TFDS data set, downloaded if the options say so.

    Raises:
      InputError: if it does not exist.
    """
    name, folder = options.name, layout.data_folder(options.dir)
    reference = layout.parse(name)
    found = layout.find(folder, reference)
    if found is None and options.download:
        tfds_source.download(name, folder)
        found = layout.find(folder, reference)
    if found is None:
        raise layout.missing(name, reference, folder)
    return found.resolve()


def _dataset(name: str, arrays: Arrays, notes: tuple[str, ...] = ()) -> Dataset:
    """Make a data set of arrays; if they do not fit, the error names the data set."""
    others = dict(arrays)
    classes = tuple(str(y) for y in np.ravel(others.pop("classes")))
    try:
        dataset = Dataset(name=name, classes=classes, notes=notes, **others)
        _check_known_owners(dataset)
    except InputError as error:
        raise InputError("data.name", name, str(error)) from error
    return dataset


def _check_labels(field: str, labels: np.ndarray, images: np.ndarray, num_classes: int) -> None:
    """Check that the labels give every image one of the classes."""
    _check_integers(field, labels, len(images))
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.size:
        remedy = f"number the {num_classes} classes from 0 to {num_classes - 1}, or name more"
        raise InputError(field, outside[0], f"{remedy} in classes")


def _check_integers(field: str, found: np.ndarray, count: int) -> None:
    """Check for one whole number for each of `count` examples, and at least one example."""
    if found.dtype.kind not in "iu" or found.shape != (count,) or not count:
        given = f"{found.dtype} of shape {found.shape}"
        raise InputError(field, given, f"give a whole number for each of {count} images")


def _check_owners(field: str, found: np.ndarray, count: int) -> None:
    """Check for one id, a whole number or a string, for each of `count` examples."""
    if found.dtype.kind not in "iuU" or found.shape != (count,):
        given = f"{found.dtype} of shape {found.shape}"
        remedy = f"give the owner's id, a whole number or a text, for each of {count} images"
        raise InputError(field, given, remedy)


def _check_same_ids(test: np.ndarray, train: np.ndarray | None) -> None:
    """Check that the owners of training examples are known too, by ids of the same kind."""
    if train is None or (test.dtype.kind == "U") != (train.dtype.kind == "U"):
        kind = "none" if train is None else train.dtype
        remedy = f"train_clients are {kind}; give ids of the same clients in both"
        raise InputError("test_clients", test.dtype, remedy)


def _check_known_owners(whole: Dataset) -> None:
    """Check that all owners of test examples also own training examples, before any limit."""
    if whole.train_clients is None or whole.test_clients is None:
        return
    strangers = np.setdiff1d(whole.test_clients, whole.train_clients)
    if strangers.size:
        alone = strangers.size == 1
        which = "owns no" if alone else f"is one of {strangers.size} owners without a"
        remedy = f"{which} training example; leave such test examples out"
        raise InputError("test_clients", strangers[0], remedy)
