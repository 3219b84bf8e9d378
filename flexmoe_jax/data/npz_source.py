"""Read the user's own data set: NumPy arrays in one `.npz` file."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import numpy as np

from flexmoe_jax.data import decode
from flexmoe_jax.data.cache import Arrays
from flexmoe_jax.errors import InputError
from flexmoe_jax.npz import open_npz
from flexmoe_jax.reading import UnreadableError

SUFFIX = ".npz"
_NEEDED = ("train_images", "train_labels", "test_images", "test_labels")
_KNOWN = (*_NEEDED, "classes", "train_clients", "test_clients")


def read(
    name: str, image_size: int = 0, folder: str | os.PathLike[str] | None = None
) -> tuple[Arrays, tuple[str, ...]]:
    """Read the arrays of a file that `np.savez` wrote.

    Images are (M, height, width, channels), or (M, height, width) for one channel. Some backbones
    also accept features (M, D). Numbers other than uint8 are converted to float32.

    Args:
      name: path of the file.
      image_size: side in pixels to resize uint8 images to; 0 keeps their size.
      folder: base of a relative path; the current folder if empty.

    Returns:
      First the arrays: `train_images` (M, ...) uint8 or float32, `train_labels` (M,), the same two
      for `test`, `classes` (Y,), by default as many as there are different labels, and
      `train_clients` (M,) and `test_clients` if the file has them. `Dataset` checks whether they
      fit together. Second, sentences about arrays of the file that are not used.

    Raises:
      InputError: if the file is missing or damaged or lacks an array, or if images are not finite
        numbers or cannot be resized.
    """
    names, arrays = _open(name, folder)
    lacking = ", ".join(key for key in _NEEDED if key not in arrays)
    if lacking:
        raise InputError("data.name", name, f"it lacks {lacking} (it holds {_listed(names)})")
    for key in ("train_images", "test_images"):
        arrays[key] = _resized(_numbers(name, key, arrays[key]), image_size)
    if "classes" not in arrays:
        arrays["classes"] = _classes(arrays["train_labels"], arrays["test_labels"])
    for key in {"classes", "train_clients", "test_clients"} & arrays.keys():
        if arrays[key].dtype.kind == "S":
            arrays[key] = np.char.decode(arrays[key], "utf-8", "replace")
    return arrays, _unread(name, [key for key in names if key not in _KNOWN])


def _open(
    name: str, folder: str | os.PathLike[str] | None
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Read the names of all arrays in a file, and those arrays whose names are known."""
    path = Path(os.path.expanduser(folder or "")) / os.path.expanduser(name)
    try:
        with open_npz(path) as file:
            return list(file.names), {key: file.read(key) for key in _KNOWN if key in file}
    except (FileNotFoundError, NotADirectoryError) as error:
        where = f" in data.dir={folder}" if folder else ""
        raise InputError("data.name", name, f"there is no such file{where}") from error
    except (OSError, UnreadableError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = f"it cannot be read ({reason}); write it with np.savez, without Python objects"
        raise InputError("data.name", name, remedy) from error


def _classes(train_labels: np.ndarray, test_labels: np.ndarray) -> np.ndarray:
    """Return one class name for each different label; `Dataset` checks the labels later."""
    labels = [labels for labels in (train_labels, test_labels) if labels.dtype.kind in "iu"]
    return np.arange(len(np.unique(np.concatenate(labels, axis=None))) if labels else 0).astype(str)


def _listed(names: list[str]) -> str:
    """Return names as one line of limited length, for any number and content of names."""
    some = ", ".join(" ".join(name.split()) for name in names[:10]) or "nothing"
    return f"{some[:200]} and {len(names) - 10} more" if len(names) > 10 else some[:200]


def _unread(name: str, unknown: list[str]) -> tuple[str, ...]:
    """Return a sentence about unused arrays, with a guess at the intended name of the first."""
    if not unknown:
        return ()
    near = difflib.get_close_matches(unknown[0], _KNOWN, n=1, cutoff=0.85)
    hint = f"; did you mean {near[0]} by {unknown[0]}?" if near else ""
    return (f"{name} holds arrays that are not used: {_listed(unknown)}{hint}",)


def _numbers(name: str, key: str, images: np.ndarray) -> np.ndarray:
    """Return images with a channel axis, as uint8 or finite float32."""
    if images.dtype.kind not in "buif" or images.ndim < 2 or not images.size:
        found = f"{key} is {images.dtype} of shape {images.shape}"
        raise InputError("data.name", name, f"{found}; give numbers of shape (M, h, w, channels)")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype == np.uint8:
        return images
    with np.errstate(over="ignore"):  # Too large values become infinity, which is rejected below.
        images = images.astype(np.float32)
    if not np.isfinite(images).all():
        raise InputError("data.name", name, f"{key} has NaN or infinity; leave such examples out")
    return images


def _resized(images: np.ndarray, image_size: int) -> np.ndarray:
    """Return images resized to a square; unchanged if `image_size` is 0."""
    if not image_size or images.shape[1:-1] == (image_size, image_size):
        return images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        found = f"{images.dtype} of shape {images.shape[1:]}"
        remedy = f"only uint8 images of 1 or 3 channels are resized, not {found}; set 0"
        raise InputError("data.image_size", image_size, remedy)
    return decode.resize_all(images, image_size)
