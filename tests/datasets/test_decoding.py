"""Which files decode: every extension, JPEGs with something after the end, strips, EXIF of Pillow's images."""

from __future__ import annotations

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, features

from mmmilan.datasets import CorruptImageError, ImageFolder, LoadImage, LoadRandomResizedCrop
from mmmilan.datasets.decoding import (
    EXTENSIONS,
    ORIENTATION,
    check_aspect_ratio,
    decode,
    from_pil,
    is_truncated_jpeg,
    read_size,
    warn_dark,
    warn_pages,
)
from mmmilan.datasets.listing import list_folder
from mmmilan.errors import InputError

rng = np.random.default_rng(0)
PIXELS = cv2.resize(rng.integers(0, 255, (9, 11, 3), dtype=np.uint8), (66, 54), interpolation=cv2.INTER_CUBIC)


def save(form: str, pixels: np.ndarray = PIXELS, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def exif(orientation: int, thumbnail: bytes = b'') -> bytes:
    """A segment APP1, in which the bytes of a thumbnail follow the tags."""
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes() + thumbnail


@pytest.mark.parametrize('ending', EXTENSIONS)
def test_every_extension_decodes(tmp_path, ending):
    form = {'.jfif': 'JPEG', '.jpe': 'JPEG', '.apng': 'PNG', '.dib': 'BMP', '.jpx': 'JPEG2000', '.j2k': 'JPEG2000'}
    form |= {'.heic': 'HEIF', '.heif': 'HEIF', '.hif': 'HEIF', '.pgm': 'PPM', '.pnm': 'PPM', '.pbm': 'PPM'}
    if ending in ('.heic', '.heif', '.hif'):
        pytest.importorskip('pillow_heif').register_heif_opener()
    path = tmp_path / f'photo{ending.upper()}'
    Image.fromarray(PIXELS).save(path, form.get(ending))
    (tmp_path / 'broken.gif').write_bytes(b'GIF89a')
    dataset = ImageFolder(str(tmp_path), pipeline=[LoadImage()])
    assert len(dataset) == 2
    assert np.abs(dataset[1]['img'][..., ::-1].astype(int) - PIXELS).mean() < 25
    assert LoadRandomResizedCrop(16)(dict(img_path=str(path)))['img'].shape == (16, 16, 3)


@pytest.mark.parametrize('form', ['GIF', 'JPEG2000', 'AVIF', 'HEIF'])
def test_what_pillow_decodes(form):
    if form == 'HEIF':
        pytest.importorskip('pillow_heif').register_heif_opener()
    if form == 'AVIF' and not features.check('avif'):
        pytest.skip('this Pillow has no AVIF')
    content = save(form)
    whole = decode(content, 'photo')
    assert whole.dtype == np.uint8 and whole.shape == (54, 66, 3) and whole.flags.c_contiguous
    assert (decode(content, 'renamed.jpg') == whole).all()
    for end in (len(content) // 2, 40):
        with pytest.raises(CorruptImageError, match=r'cut\.bin does not decode'):
            decode(content[:end], 'cut.bin')
    with pytest.raises(CorruptImageError, match='has 66 x 54 pixels'):
        decode(content, 'photo', max_pixels=1000)


def test_turned_avif():
    if not features.check('avif'):
        pytest.skip('this Pillow has no AVIF')
    assert decode(save('AVIF', exif=exif(6)), 'photo').shape == (66, 54, 3)


@pytest.mark.parametrize('path', ['file:///photos/a.png', 'gs://bucket/a.png', 's3://bucket/a.png'])
def test_addresses_that_nothing_reads(path):
    with pytest.raises(InputError, match=f'{path} cannot be read by MMEngine .*; give a file, an http address, or the'):
        LoadImage()(dict(img_path=path))


def test_the_first_frame_of_a_film():
    frames = [Image.fromarray(np.full((8, 8, 3), grey, np.uint8)) for grey in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:])
    assert (decode(file.getvalue(), 'film.gif') == 10).all()


def test_heic_without_the_package_is_left_out_by_name(tmp_path, monkeypatch, log):
    monkeypatch.setattr('mmmilan.datasets.listing.REMEDIES', {'.heic': 'pip install pillow-heif'})
    for name in ('a.HEIC', 'b.heic', 'c.jpg'):
        (tmp_path / name).touch()
    assert list_folder(tmp_path, ('.jpg',)).files == ['c.jpg']
    assert '2 .heic (pip install pillow-heif).' in log.text


# -- the end of a JPEG

BASELINE, PROGRESSIVE = save('JPEG', quality=90), save('JPEG', quality=90, progressive=True)
RESTARTS = cv2.imencode('.jpg', PIXELS, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[1].tobytes()
THUMBNAIL = save('JPEG', PIXELS[::4, ::4].copy())
WITH_THUMBNAIL = save('JPEG', exif=exif(1, THUMBNAIL))
JPEGS = dict(baseline=BASELINE, progressive=PROGRESSIVE, restarts=RESTARTS, thumbnail=WITH_THUMBNAIL)


@pytest.mark.parametrize('name', JPEGS)
def test_whatever_stands_after_the_end(name):
    content = JPEGS[name]
    film = b'\0\0\0\x18ftypmp42' + rng.bytes(3000) + b'\xff\xda\xff\xd8\xff\xda' + rng.bytes(3000)
    expected = decode(content, 'photo')
    for tail in (
        b'',
        b'\0' * 4096,
        b'\xff\xda',
        b'\xff\xd8\xff\xda',
        film,
        BASELINE,
        BASELINE[:-500],
        b'\xff' * 9,
        b'\n',
    ):
        assert not is_truncated_jpeg(content + tail)
        assert (decode(content + tail, 'photo') == expected).all()


@pytest.mark.parametrize('name', JPEGS)
def test_cut_off(name):
    content = JPEGS[name]
    scan = content.rfind(b'\xff\xda')
    for end in (scan + 20, (scan + len(content)) // 2, len(content) - 2, len(content) - 1):
        for tail in (b'', b'\0' * 100, BASELINE, THUMBNAIL):
            if tail == b'\0' * 100 or end < len(content) - 1 or not tail:
                assert is_truncated_jpeg(content[:end] + tail), (end, tail[:4])
                with pytest.raises(CorruptImageError, match='photo'):
                    decode(content[:end] + tail, 'photo')


def test_fill_bytes_before_the_end():
    assert not is_truncated_jpeg(BASELINE[:-2] + b'\xff\xff\xff\xd9')
    assert (decode(BASELINE[:-2] + b'\xff\xff\xff\xd9', 'photo') == decode(BASELINE, 'photo')).all()


def test_the_end_costs_little():
    import time

    content = save('JPEG', rng.integers(0, 255, (1500, 2000, 3), dtype=np.uint8), quality=90)

    def seconds(function) -> float:
        times = []
        for _ in range(5):
            begin = time.process_time()
            function()
            times.append(time.process_time() - begin)
        return min(times)

    assert seconds(lambda: is_truncated_jpeg(content)) < 0.2 * seconds(lambda: decode(content, 'photo'))


# -- strips


@pytest.mark.parametrize('size', [(0, 0), (0, 5), (5, 0)])
def test_images_without_pixels(size):
    with pytest.raises(CorruptImageError, match=r'An array is empty \(. x . pixels\); replace or remove it'):
        check_aspect_ratio(np.zeros((*size, 3), np.uint8), 'An array')


@pytest.mark.parametrize('size', [(1, 60000), (60000, 1), (1, 250000), (2, 500)])
@pytest.mark.parametrize('transform', [LoadImage(), LoadRandomResizedCrop(32)], ids=['whole', 'crop'])
def test_strips_are_refused(tmp_path, size, transform):
    path = tmp_path / 'strip.png'
    cv2.imwrite(str(path), np.zeros((*size, 3), np.uint8))
    with pytest.raises(CorruptImageError, match=rf'strip\.png is a strip of {size[1]} x {size[0]} pixels; crop it'):
        transform(dict(img_path=str(path)))


# -- images of Pillow


@pytest.mark.parametrize('orientation', range(10))
def test_pillow_images_are_turned_as_files_are(tmp_path, orientation):
    content = save('PNG', exif=exif(orientation))
    image = Image.open(io.BytesIO(content))
    assert (from_pil(image) == decode(content, 'photo')).all()


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
DEEP = np.arange(54 * 66, dtype=np.uint16).reshape(54, 66) * 18


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'deep PNG', 'JPEG of XMP'])
def test_one_orientation_everywhere(tmp_path, form, orientation):
    """Size, pixels, crop and Pillow's image agree, whatever another library takes for the orientation."""
    kind, pixels = form.replace(' of XMP', '').replace('deep ', ''), DEEP if 'deep' in form else PIXELS
    tags = Image.Exif()
    tags[0x010F] = 'a camera'
    if 'XMP' not in form:
        tags[ORIENTATION] = orientation
    options = dict(exif=tags.tobytes()) | (dict(xmp=XMP) if kind == 'JPEG' else {})
    content = save(kind, pixels, **options)
    path = tmp_path / 'photo'
    path.write_bytes(content)
    swapped = orientation >= 5 and 'XMP' not in form
    image = decode(content, 'photo')
    assert image.shape[:2] == ((66, 54) if swapped else (54, 66)) and tuple(read_size(str(path))) == image.shape[1::-1]
    assert np.abs(from_pil(Image.open(path)).astype(int) - image).max() <= 3
    cropped = LoadRandomResizedCrop(16, crop_ratio_range=(1, 1), aspect_ratio_range=(1, 1))(dict(img_path=str(path)))
    assert cropped['ori_shape'] == image.shape[:2]
    with Image.open(path) as whole:
        turned = whole if 'XMP' in form else ImageOps.exif_transpose(whole)
        expected = np.asarray(turned).astype(float) / (257 if 'deep' in form else 1)
    expected = expected[..., None] if expected.ndim == 2 else expected[..., ::-1]
    assert np.abs(expected - image).max() <= 3


def test_pillow_images_that_do_not_decode():
    closed = Image.fromarray(PIXELS)
    closed.close()
    cut = Image.open(io.BytesIO(save('PNG')[:-200]))
    for image in (closed, cut):
        with pytest.raises(CorruptImageError, match='An image does not decode'):
            from_pil(image)


def random_image(*shape: int, dtype: type = np.uint8, top: int | None = None) -> np.ndarray:
    top = top or np.iinfo(dtype).max + 1
    return np.random.default_rng(0).integers(0, top, shape, dtype=dtype)


def encode(image: np.ndarray, ending: str) -> bytes:
    return cv2.imencode(ending, image)[1].tobytes()


def tiff(image: np.ndarray, sample_format: int = 1, colours: int | None = None) -> bytes:
    """An uncompressed TIFF [H, W, C] by its specification, of any number of channels."""
    height, width, channels = image.shape
    data, colours = image.tobytes(), (2 if channels > 2 else 1) if colours is None else colours
    tags = [
        (256, [width]), (257, [height]), (258, [8 * image.itemsize] * channels), (259, [1]),
        (262, [colours]), (273, None), (277, [channels]), (278, [height]), (279, [len(data)]),
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
    for header in (b'P5\n# 12 bits\n3 1\n4095\n', b'P5 # of a\n# camera\n3 # wide\n1\n# white\n4095\n'):
        assert decode(header + values.tobytes(), 'a.pgm')[0, :, 0].tolist() == [0, 128, 255]


def test_dark_images_are_warned_of_once(log):
    warn_dark.cache_clear()
    for _ in range(2):
        assert decode(encode(random_image(9, 7, dtype=np.uint16, top=4000), '.png'), 'a').max() < 16
    assert log.text.count('no value above 4095 of 65535, nearly black') == 1


@pytest.mark.parametrize('kind, warned', [(0, 1), (1, 0), (4, 0)])
def test_pages_are_warned_of_once(log, kind, warned):
    """Slices of a stack, not the small version or the mask that GeoTIFFs have behind the image."""
    warn_pages.cache_clear()
    pages = [Image.fromarray(np.full((8, 8), grey, np.uint8)) for grey in (10, 200)]
    file = io.BytesIO()
    pages[1].encoderinfo = dict(tiffinfo={254: kind})
    pages[0].save(file, 'TIFF', save_all=True, append_images=pages[1:])
    for _ in range(2):
        assert (decode(file.getvalue(), 'stack.tif') == 10).all()
    assert log.text.count('several pages, of which the first alone is read') == warned


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


@pytest.mark.parametrize(('colours', 'channels'), [(5, 4), (8, 3), (9, 3), (10, 3), (32803, 1), (34892, 3)])
def test_other_colours(colours, channels):
    """OpenCV takes CIELAB, for one, for something else."""
    with pytest.raises(CorruptImageError, match=r'print\.tif has colours that are neither grey nor RGB, .* convert it'):
        decode(tiff(random_image(9, 7, channels), colours=colours), 'print.tif')


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_where_0_is_white(dtype):
    image = random_image(9, 7, 1, dtype=dtype)
    decoded = decode(tiff(image, colours=0), 'x-ray.tif')
    assert np.array_equal(decoded, decode(tiff(np.iinfo(dtype).max - image), 'x-ray.tif'))


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
