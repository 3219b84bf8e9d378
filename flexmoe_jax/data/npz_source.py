"""Reads a data set of one's own: NumPy arrays in one `.npz` file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from flexmoe_jax.data import decode
from flexmoe_jax.data.cache import Arrays
from flexmoe_jax.errors import InputError

SUFFIX = ".npz"
_NEEDED = ("train_images", "train_labels", "test_images", "test_labels")
_KNOWN = (*_NEEDED, "classes", "train_clients")


def read(name: str, image_size: int = 0) -> Arrays:
    """Reads the arrays of a file that `np.savez` wrote.

    Images are (M, height, width, channels), or (M, height, width) for one channel; features
    (M, D) are for backbones that take them. Numbers other than uint8 become float32.

    Args:
      name: path of the file.
      image_size: side in pixels to resize uint8 images to; 0 keeps their size.

    Returns:
      `train_images` (M, ...) uint8 or float32, `train_labels` (M,), the same two for `test`,
      `classes` (Y,), by default as many as there are different labels, and `train_clients` (M,)
      where the file has them. Whether they fit together is for `Dataset` to say.

    Raises:
      InputError: for a file that is missing or damaged or lacks an array, for images that are not
        finite numbers, or that cannot be resized.
    """
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        raise InputError("data.name", name, "there is no such file")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            held = ", ".join(file.files) or "nothing"
            arrays = {key: file[key] for key in _KNOWN if key in file}
    except MemoryError:
        raise
    except Exception as error:  # Damage shows in many ways.
        reason = " ".join(str(error).split())[:300]
        remedy = f"it cannot be read ({reason}); write it with np.savez, without Python objects"
        raise InputError("data.name", name, remedy) from error
    lacking = ", ".join(key for key in _NEEDED if key not in arrays)
    if lacking:
        raise InputError("data.name", name, f"it lacks {lacking} (it holds {held})")
    for key in ("train_images", "test_images"):
        arrays[key] = _resized(_numbers(name, key, arrays[key]), image_size)
    if "classes" not in arrays:
        labels = np.union1d(arrays["train_labels"], arrays["test_labels"])
        arrays["classes"] = np.arange(len(labels)).astype(str)
    return arrays


def _numbers(name: str, key: str, images: np.ndarray) -> np.ndarray:
    """Returns images with a channel axis, as uint8 or finite float32."""
    if images.dtype.kind not in "buif" or images.ndim < 2 or not images.size:
        found = f"{key} is {images.dtype} of shape {images.shape}"
        raise InputError("data.name", name, f"{found}; give numbers of shape (M, h, w, channels)")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype == np.uint8:
        return images
    images = images.astype(np.float32)
    if not np.isfinite(images).all():
        raise InputError("data.name", name, f"{key} has NaN or infinity; leave such examples out")
    return images


def _resized(images: np.ndarray, image_size: int) -> np.ndarray:
    """Returns images stretched to a square; as they are for an `image_size` of 0."""
    if not image_size or images.shape[1:-1] == (image_size, image_size):
        return images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        found = f"{images.dtype} of shape {images.shape[1:]}"
        remedy = f"only uint8 images of 1 or 3 channels are resized, not {found}; set 0"
        raise InputError("data.image_size", image_size, remedy)
    return np.stack([decode.resize(image, image_size, image_size) for image in images])
