"""Grey images, 16-bit images, and images that cannot be used."""

from __future__ import annotations

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from mmmilan.datasets import CorruptImageError, LoadRandomResizedCrop
from mmmilan.datasets.bit_depth import warn_dark
from mmmilan.datasets.decoding import decode, from_pil
from mmmilan.errors import InputError


def random_image(*shape: int, dtype: type = np.uint8, top: int | None = None) -> np.ndarray:
    top = top or np.iinfo(dtype).max + 1
    return np.random.default_rng(0).integers(0, top, shape, dtype=dtype)


def encode(image: np.ndarray, ending: str) -> bytes:
    return cv2.imencode(ending, image)[1].tobytes()


def tiff(image: np.ndarray, sample_format: int = 1) -> bytes:
    """An uncompressed TIFF [H, W, C] by its specification, of any number of channels."""
    height, width, channels = image.shape
    data = image.tobytes()
    tags = [
        (256, [width]), (257, [height]), (258, [8 * image.itemsize] * channels), (259, [1]),
        (262, [2 if channels > 2 else 1]), (273, None), (277, [channels]), (278, [height]), (279, [len(data)]),
        (339, [sample_format] * channels),
    ]  # fmt: skip
    place, tail, rows = 8 + 2 + 12 * len(tags) + 4, b'', []
    for tag, values in tags:
        body = struct.pack(f'<{len(values)}I', *values) if values else b''
        if len(body) > 4:
            body, tail = struct.pack('<I', place + len(tail)), tail + body
        rows.append((tag, len(values or [0]), body))
    entries = [
        struct.pack('<HHI', tag, 4, count) + (body or struct.pack('<I', place + len(tail))) for tag, count, body in rows
    ]
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + b''.join(entries) + b'\0' * 4 + tail + data


@pytest.mark.parametrize('ending', ['.png', '.tiff', '.pgm', '.bmp'])
def test_grey_has_three_equal_channels(ending):
    grey = random_image(9, 7)
    assert np.array_equal(decode(encode(grey, ending), 'a'), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize('ending', ['.png', '.tiff'])
def test_colour_of_8_bits_is_unchanged(ending):
    image = random_image(9, 7, 3)
    assert np.array_equal(decode(encode(image, ending), 'a'), image)


@pytest.mark.parametrize('ending', ['.png', '.tiff', '.pgm'])
@pytest.mark.parametrize('shape', [(9, 7), (9, 7, 3)])
def test_16_bits_are_scaled_from_black_to_white(ending, shape):
    """0 to 0, 65535 to 255, and every value to its nearest; not to the image's own range."""
    ending = '.ppm' if ending == '.pgm' and len(shape) == 3 else ending
    image = random_image(*shape, dtype=np.uint16)
    image.flat[:2] = 0, 65535
    expected = np.array([round(int(value) * 255 / 65535) for value in image.flat], np.uint8).reshape(shape)
    expected = expected if len(shape) == 3 else np.repeat(expected[..., None], 3, axis=2)
    decoded = decode(encode(image, ending), 'a')
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, expected)
    assert np.array_equal(decode(encode(image // 2, ending), 'a') > 128, np.zeros_like(decoded, bool))


def test_white_of_a_portable_map_is_in_its_header():
    values = np.array([0, 2048, 4095], '>u2')
    decoded = decode(b'P5\n# 12 bits\n3 1\n4095\n' + values.tobytes(), 'a.pgm')
    assert decoded[0, :, 0].tolist() == [0, 128, 255]


def test_dark_images_are_warned_of_once(log):
    warn_dark.cache_clear()
    for _ in range(2):
        assert decode(encode(random_image(9, 7, dtype=np.uint16, top=4000), '.png'), 'a').max() < 16
    assert log.text.count('no value above 4095 of 65535, nearly black') == 1


def test_in_the_training_pipeline(tmp_path):
    image = np.full((40, 50), 40000, np.uint16)
    (tmp_path / 'a.png').write_bytes(encode(image, '.png'))
    loaded = LoadRandomResizedCrop(scale=(24, 16)).transform(dict(img_path=str(tmp_path / 'a.png')))['img']
    assert loaded.shape == (24, 16, 3) and (loaded == round(40000 / 257)).all()


def test_transparency_is_dropped():
    image = random_image(9, 7, 4)
    assert np.array_equal(decode(encode(image, '.png'), 'a'), image[..., :3])
    deep = random_image(9, 7, 4, dtype=np.uint16)
    assert np.array_equal(decode(encode(deep, '.png'), 'a'), np.round(deep[..., :3] / 257).astype(np.uint8))


@pytest.mark.parametrize('channels', [2, 4, 5, 13])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_other_channels(channels, dtype):
    with pytest.raises(CorruptImageError) as error:  # one of many is skipped
        decode(tiff(random_image(9, 7, channels, dtype=dtype)), 'field.tif')
    assert str(error.value) == f'field.tif has {channels} channels; give images of one (grey) or three (RGB).'


def test_other_types():
    for image, kind in ((random_image(9, 7, 1).astype(np.float32), 3), (random_image(9, 7, 1).astype(np.int16), 2)):
        message = 'depth.tif does not hold unsigned integers of 8 or 16 bits; convert it to them'
        with pytest.raises(InputError, match=message):
            decode(tiff(image, kind), 'depth.tif')


def test_tiff_of_this_test_is_read():
    for dtype in (np.uint8, np.uint16):
        image = random_image(9, 7, 3, dtype=dtype)
        expected = image if dtype == np.uint8 else np.round(image / 257).astype(np.uint8)
        assert np.array_equal(decode(tiff(image), 'a')[..., ::-1], expected)


def test_damaged_files():
    for content in (
        tiff(random_image(9, 7, 3))[:40],
        b'II*\0',
        encode(random_image(9, 7, dtype=np.uint16), '.png')[:60],
    ):
        with pytest.raises(CorruptImageError, match='a.tif does not decode as an image'):
            decode(content, 'a.tif')


def test_images_of_pillow():
    deep = random_image(9, 7, dtype=np.uint16)
    file = io.BytesIO(encode(deep, '.png'))
    assert np.array_equal(from_pil(Image.open(file))[..., 0], np.round(deep / 257).astype(np.uint8))
    colour = random_image(9, 7, 3)
    assert np.array_equal(from_pil(Image.fromarray(colour)), colour[..., ::-1])
    with pytest.raises(InputError, match='An image of mode F has no range of its own; convert it'):
        from_pil(Image.fromarray(np.ones((9, 7), np.float32)))
