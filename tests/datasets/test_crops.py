"""The input pipeline in one transform: mmpretrain's crops and Pillow's pixels."""

from __future__ import annotations

from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
from mmpretrain.datasets.transforms import RandomResizedCrop
from mmpretrain.registry import TRANSFORMS as MMPRETRAIN_TRANSFORMS
from PIL import Image

from helpers import real_data
from mmmilan.datasets import CorruptImageError, LoadImage, LoadRandomResizedCrop
from mmmilan.datasets.crops import crop, decode, read_jpeg_shape, resize
from mmmilan.errors import InputError


@pytest.fixture
def write_jpeg(tmp_path):
    """Writes a photograph-like JPEG of a size: smooth shapes and some noise."""

    def write(width: int, height: int, **options) -> str:
        rng = np.random.default_rng(width + height)
        coarse = rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
        image = (image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)
        path = tmp_path / f'{width}x{height}.jpg'
        Image.fromarray(image).save(path, quality=90, **options)
        return str(path)

    return write


def reference(path: str, seed: int, scale: int, area: tuple[float, float]) -> np.ndarray:
    """mmpretrain's default pipeline."""
    steps = [
        dict(type='LoadImageFromFile'),
        dict(type='RandomResizedCrop', scale=scale, crop_ratio_range=area, backend='pillow', interpolation='bicubic'),
        dict(type='RandomFlip', prob=0.5),
    ]
    results = dict(img_path=path)
    np.random.seed(seed)
    for step in steps:
        results = MMPRETRAIN_TRANSFORMS.build(step)(results)
    return results['img'].astype(int)


def ours(path: str, seed: int, scale: int, area: tuple[float, float]) -> np.ndarray:
    np.random.seed(seed)
    return LoadRandomResizedCrop(scale, area, flip_prob=0.5)(dict(img_path=path))['img'].astype(int)


# -- crops and pixels


@pytest.mark.parametrize('size', [(300, 240), (120, 500), (40, 30)], ids=str)
def test_same_random_numbers_same_pixels(write_jpeg, size):
    """Crop, bicubic filter and flip are those of mmpretrain's default pipeline, up to rounding."""
    path = write_jpeg(*size)
    for seed in range(20):
        difference = np.abs(ours(path, seed, 64, (0.2, 1.0)) - reference(path, seed, 64, (0.2, 1.0)))
        assert difference.max() <= 2 and difference.mean() < 0.1


def test_distribution_of_crops():
    """Area and aspect ratio have the distribution asked for; crops reach the whole image, edges included."""
    transform = LoadRandomResizedCrop(224, (0.2, 1.0))
    boxes = np.array([transform.draw_crop((300, 400)) for _ in range(4000)])
    top, left, height, width = boxes.T
    area, ratio = height * width / (300 * 400), width / height
    assert area.min() > 0.19 and area.max() <= 1
    assert ratio.min() > 0.735 and ratio.max() < 1.345  # 3/4 to 4/3, in whole pixels
    small = area[area < 0.5]  # which fit wherever the ratio puts them: uniform
    assert np.histogram(small, bins=3, range=(0.2, 0.5))[0] == pytest.approx(len(small) / 3, rel=0.12)
    assert abs((top + height / 2).mean() - 150) < 3 and abs((left + width / 2).mean() - 200) < 3
    assert top.min() == left.min() == 0
    assert (top + height).max() == 300 and (left + width).max() == 400

    np.random.seed(0)
    theirs = RandomResizedCrop(224, (0.2, 1.0))
    expected = [theirs.rand_crop_params(np.zeros((300, 400, 3))) for _ in range(100)]
    np.random.seed(0)
    assert [transform.draw_crop((300, 400)) for _ in range(100)] == expected


def test_flips(tmp_path):
    transform = LoadRandomResizedCrop(8, (1.0, 1.0), (1.0, 1.0), flip_prob=0.5)
    path = tmp_path / 'ramp.png'
    cv2.imwrite(str(path), np.tile(np.arange(0, 256, 16, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    flips = []
    for _ in range(200):
        results = transform(dict(img_path=str(path)))
        row = results['img'][0, :, 0].astype(int)
        assert (np.diff(row) < 0).all() if results['flip'] else (np.diff(row) > 0).all()
        flips.append(results['flip'])
    assert 70 < sum(flips) < 130


@pytest.mark.parametrize(('crop_size', 'factor'), [(100, 1), (255, 1), (256, 2), (511, 2), (512, 4), (1500, 8)])
def test_reduction_leaves_twice_the_output(crop_size, factor):
    transform = LoadRandomResizedCrop(64)
    assert transform.reduction((0, 0, crop_size, 2000)) == factor
    assert transform.reduction((0, 0, 2000, crop_size)) == factor


def test_large_images_are_decoded_reduced(write_jpeg, monkeypatch):
    """They look the same: nearer to Pillow's bicubic of the whole image than Pillow's bilinear is."""
    path = write_jpeg(1100, 900)
    flags = []
    module = 'mmmilan.datasets.crops.decode'
    monkeypatch.setattr(module, lambda *args, **kwargs: flags.append(args[2]) or decode(*args, **kwargs))
    whole, transform = decode(Path(path).read_bytes(), path), LoadRandomResizedCrop(64, (0.15, 1.0))
    differences, bilinear = [], []
    for seed in range(10):
        np.random.seed(seed)
        box = transform.draw_crop((900, 1100))
        factor = transform.reduction(box)
        # the crop in whole pixels of the reduced image: within half of one of these of what was drawn
        top, left, height, width = (round(side / factor) * factor for side in box)
        part = whole[top : top + height, left : left + width]
        expected, other = (
            mmcv.imresize(part, (64, 64), interpolation=name, backend='pillow').astype(int)
            for name in ('bicubic', 'bilinear')
        )
        np.random.seed(seed)
        differences.append(np.abs(transform(dict(img_path=path))['img'] - expected).mean())
        bilinear.append(np.abs(other - expected).mean())
    assert set(flags) == {cv2.IMREAD_REDUCED_COLOR_2, cv2.IMREAD_REDUCED_COLOR_4}
    assert np.mean(differences) < 0.7 * np.mean(bilinear)
    assert max(differences) < 1


@pytest.mark.data
def test_real_images():
    """Mean absolute difference to mmpretrain's default pipeline at 224, of 255; its cv2 backend is the comparison."""
    folder = real_data('imagenet_sample/train')
    paths = [str(path) for path in sorted(folder.glob('*/*'))[:40]]
    differences = [
        np.abs(ours(path, seed, 224, (0.2, 1.0)) - reference(path, seed, 224, (0.2, 1.0)))
        for seed, path in enumerate(paths)
    ]
    assert np.mean(differences) < 0.1
    assert np.mean(np.array(differences) > 1) < 1e-4


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
@pytest.mark.parametrize('size', [(90, 60), (700, 600)], ids=str)
def test_orientation(write_jpeg, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write_jpeg(*size, exif=exif)
    whole = LoadImage()(dict(img_path=path))['img']
    assert read_jpeg_shape(Path(path).read_bytes()) == whole.shape[:2]
    results = LoadRandomResizedCrop(32, (1.0, 1.0))(dict(img_path=path))
    assert results['ori_shape'] == whole.shape[:2]
    np.random.seed(3)
    box = LoadRandomResizedCrop(32, (0.5, 0.9)).draw_crop(whole.shape[:2])
    np.random.seed(3)
    image = LoadRandomResizedCrop(32, (0.5, 0.9))(dict(img_path=path))['img']
    expected = resize(crop(whole, box, 1), (32, 32)).astype(int)
    difference = np.abs(image - expected).mean()
    assert difference < 5 < min(np.abs(image - turned).mean() for turned in (expected[::-1], expected[:, ::-1]))


@pytest.mark.parametrize('mode', ['L', 'CMYK', 'RGBA', 'P'])
def test_other_formats(tmp_path, mode):
    """Grey, four colours, transparency and palettes come as three channels, as LoadImage gives them."""
    path = str(tmp_path / ('image.png' if mode in ('RGBA', 'P') else 'image.jpg'))
    Image.radial_gradient('L').resize((80, 60)).convert('RGB').convert(mode).save(path)
    np.random.seed(0)
    image = LoadRandomResizedCrop(60, (1.0, 1.0), (4 / 3, 4 / 3))(dict(img_path=path))['img']
    expected = resize(LoadImage()(dict(img_path=path))['img'], (60, 60))
    assert image.shape == (60, 60, 3) and np.array_equal(image, expected)


# -- files that do not decode


@pytest.mark.parametrize('content', [b'', b'not an image', b'\xff\xd8\xff\xe0 no JPEG'])
def test_corrupt_images(tmp_path, content):
    path = tmp_path / 'image.jpg'
    path.write_bytes(content)
    messages = set()
    for transform in (LoadImage(), LoadRandomResizedCrop(8)):
        with pytest.raises(CorruptImageError) as error:
            transform(dict(img_path=str(path)))
        messages.add(str(error.value))
    assert messages == {f'{path} does not decode as an image; replace or remove it.'}


@pytest.mark.parametrize(
    'ranges', [dict(crop_ratio_range=(2, 3)), dict(crop_ratio_range=(0, 1)), dict(aspect_ratio_range=(-1, 2))]
)
def test_ranges_without_a_crop(ranges):
    """For them mmpretrain takes the centre of each image."""
    with pytest.raises(InputError, match='leave no crop; give shares of the image from above 0 to 1'):
        LoadRandomResizedCrop(8, **ranges)


def test_truncated_and_missing(write_jpeg):
    path = Path(write_jpeg(300, 200))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptImageError, match=f'{path} is a truncated JPEG'):
        LoadRandomResizedCrop(8)(dict(img_path=str(path)))
    path.unlink()
    with pytest.raises(InputError, match=f'The image {path} is missing'):
        LoadRandomResizedCrop(8)(dict(img_path=str(path)))
