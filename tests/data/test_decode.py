from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from flexmoe_jax.data import decode

Backend = Callable[[bytes, int], np.ndarray]


@pytest.fixture(params=[decode.decode_with_opencv, decode.decode_with_pillow])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param  # type: ignore[no-any-return]


def encoded(image: np.ndarray, image_format: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=image_format)
    return file.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_colour_keeps_its_channel_order(backend: Backend) -> None:
    image = noise(4, 6, 3)
    assert np.array_equal(backend(encoded(image), 3), image)


def test_grey_keeps_one_channel(backend: Backend) -> None:
    image = noise(4, 6)
    assert np.array_equal(backend(encoded(image), 1), image[..., None])


def test_grey_file_in_a_colour_data_set(backend: Backend) -> None:
    image = noise(4, 6)
    assert np.array_equal(backend(encoded(image), 3), np.repeat(image[..., None], 3, axis=-1))


def test_alpha_is_dropped(backend: Backend) -> None:
    image = noise(4, 6, 4)
    assert np.array_equal(backend(encoded(image), 3), image[..., :3])


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_the_upper_eight(backend: Backend, channels: int) -> None:
    image = np.array([[0, 255, 256], [0x1234, 0xABCD, 65535]], np.uint16)
    expected = np.repeat((image >> 8)[..., None], channels, axis=-1)
    assert np.array_equal(backend(encoded(image), channels), expected)


def test_orientation_tags_are_ignored(backend: Backend) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90°
    file = io.BytesIO()
    Image.fromarray(noise(4, 6, 3)).save(file, format="jpeg", exif=exif)
    assert backend(file.getvalue(), 3).shape == (4, 6, 3)


def test_gif_is_read_whatever_the_decoder(backend: Backend) -> None:
    image = np.full((4, 6), 7, np.uint8)
    assert np.array_equal(backend(encoded(image, "gif"), 1), image[..., None])


@pytest.mark.parametrize("junk", [b"", b"no image"])
def test_junk_raises_os_error(backend: Backend, junk: bytes) -> None:
    with pytest.raises(OSError, match="cannot identify image"):
        backend(junk, 3)


def test_the_decoder_without_opencv_is_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(4, 6, 3)
    monkeypatch.setattr(
        decode.importlib.util, "find_spec", lambda name: None if name == "cv2" else name
    )
    monkeypatch.setattr(decode, "decode_with_opencv", None)
    assert np.array_equal(decode.decoder(3)(encoded(image)), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_stretches(channels: int) -> None:
    # Halving two flat halves of an image leaves two flat halves.
    image = np.zeros((4, 8, channels), np.uint8)
    image[:, 4:] = 200
    small = decode.resize(image, 2, 2)
    assert small.shape == (2, 2, channels)
    assert (small[:, 0] < 40).all()
    assert (small[:, 1] > 160).all()
    assert decode.resize(image, 4, 8) is image


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(channels: int) -> None:
    image = noise(3, 5, channels)
    assert np.array_equal(decode.decode_with_pillow(decode.encode_png(image), channels), image)
