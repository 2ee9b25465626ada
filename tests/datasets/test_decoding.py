"""Which files decode: every extension, JPEGs with something after the end, strips, EXIF of Pillow's images."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image, features

from mmmilan.datasets import CorruptImageError, ImageFolder, LoadImage, LoadRandomResizedCrop
from mmmilan.datasets.decoding import EXTENSIONS, ORIENTATION, decode, from_pil, is_truncated_jpeg
from mmmilan.datasets.listing import list_folder

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


def test_pillow_images_that_do_not_decode():
    closed = Image.fromarray(PIXELS)
    closed.close()
    cut = Image.open(io.BytesIO(save('PNG')[:-200]))
    for image in (closed, cut):
        with pytest.raises(CorruptImageError, match='An image does not decode'):
            from_pil(image)
