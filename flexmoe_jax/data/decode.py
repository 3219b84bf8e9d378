"""Decode images (PNG, JPEG, ...) to uint8 arrays, and resize them."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable

import numpy as np

from flexmoe_jax.errors import InputError, require_package
from flexmoe_jax.reading import UnreadableError, require_memory

Decoder = Callable[[bytes], np.ndarray]


def package() -> str:
    """Return the package that `decoder` uses. The two may differ by a few grey levels."""
    return "PIL" if importlib.util.find_spec("cv2") is None else "cv2"


def decoder(channels: int) -> Decoder:
    """Return the fastest decoder that is installed: OpenCV, else Pillow.

    Both ignore orientation tags, as TFDS does, and drop an alpha channel. Of 16-bit images they
    keep the upper eight bits.

    Args:
      channels: 1 (grey) or 3 (red, green, blue), number of channels that the decoder returns.

    Returns:
      A function from an encoded image to (height, width, channels) uint8. It raises OSError if the
      bytes are not an image.
    """
    require_package("PIL", "data", "pictures are decoded by Pillow")
    if package() == "PIL":
        return lambda encoded: decode_with_pillow(encoded, channels)
    return lambda encoded: decode_with_opencv(encoded, channels)


def decode_with_opencv(encoded: bytes, channels: int) -> np.ndarray:
    """Decode with OpenCV, or with Pillow if OpenCV cannot read the format (such as GIF)."""
    import cv2

    colour = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    raw = np.frombuffer(encoded, np.uint8)
    image = cv2.imdecode(raw, colour | cv2.IMREAD_IGNORE_ORIENTATION) if raw.size else None
    if image is None:
        return decode_with_pillow(encoded, channels)
    image = np.asarray(image, np.uint8)
    return image[..., None] if channels == 1 else image[..., ::-1]  # OpenCV's order is BGR.


def decode_with_pillow(encoded: bytes, channels: int) -> np.ndarray:
    """Decode with Pillow."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255.
            grey = (np.asarray(image) >> 8).astype(np.uint8)[..., None]
            return np.repeat(grey, channels, axis=-1)
        if channels == 1:
            return np.asarray(image.convert("L"), np.uint8)[..., None]
        return np.asarray(image.convert("RGB"), np.uint8)


def encode_png(image: np.ndarray) -> bytes:
    """Encode (height, width, 1, 3 or 4) uint8, or (height, width, 1) uint16, losslessly."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="png")
    return file.getvalue()


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image to (height, width) by bilinear interpolation, antialiased if it shrinks.

    This always uses Pillow, so that resizing does not depend on which decoder is installed.

    Args:
      image: (any height, any width, 1 or 3) uint8.
      height: pixels.
      width: pixels.

    Returns:
      (height, width, channels) uint8; the image itself if it already has that size.
    """
    if image.shape[:2] == (height, width):
        return image
    require_package("PIL", "data", "pictures are resized by Pillow")
    from PIL import Image

    flat = image[..., 0] if image.shape[-1] == 1 else np.ascontiguousarray(image)
    scaled = Image.fromarray(flat).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(scaled, np.uint8).reshape(height, width, image.shape[-1])


def resize_all(images: np.ndarray, side: int) -> np.ndarray:
    """Resize images (M, height, width, 1 or 3) uint8 to squares (M, side, side, channels).

    Raises:
      InputError: if the result would not fit into memory.
    """
    check_room(images.shape[0] * side * side * images.shape[-1], side)
    return np.stack([resize(image, side, side) for image in images])


def check_room(size: int, side: int) -> None:
    """Check that images fit into memory.

    Args:
      size: bytes of all images.
      side: side of the images in pixels, for the error about `data.image_size`.

    Raises:
      InputError: if there is too little memory.
    """
    try:
        require_memory(size)
    except UnreadableError as error:
        remedy = f"the decoded images are too large ({error}); choose a smaller side in pixels"
        raise InputError("data.image_size", side, remedy) from error
