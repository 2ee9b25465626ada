"""A cache gives what was written, rounded to 8 bits; one that does not fit is refused with the reason."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, FUNCTIONS, MODELS
from torch import nn

from helpers import ROOT, relative_error
from mmmilan.datasets import Draw, ImageFolder
from mmmilan.errors import InputError
from mmmilan.teachers.cache import (
    TeacherCache,
    decode,
    describe,
    encode,
    importance_of,
    make_cache,
    record_dtype,
    thumbnails,
)

CONFIG = ROOT / 'configs/milan/milan-cached_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
LOADER = {f'train_dataloader.{key}': value for key, value in dict(batch_size=4, num_workers=0).items()}
MANIFEST = dict(version=3, images=3, num_patches=4, feature_dim=64)


@pytest.fixture
def cached(tiny_config, run_tool, tmp_path, capsys) -> tuple[Path, Path, str]:
    """A config, the folder of its cache of two crops, and what the tool printed."""
    config, folder = tiny_config(LOADER), tmp_path / 'cache'
    run_tool('cache_targets.py', config, folder, '--epochs', 2)
    return config, folder, capsys.readouterr().out


def random_output(images: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Crops, features and importances."""
    inputs = torch.randint(256, (images, 3, 8, 8), dtype=torch.uint8)
    return inputs, torch.randn(images, 5, 64), torch.rand(images, 4).softmax(-1)


def has(cache: TeacherCache, crop: int, image: int) -> bool:
    return cache.load(crop, [image])['checksum'][0] > 0


def batch_of(cfg: Config, crop: int) -> dict:
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    return FUNCTIONS.get('default_collate')([dataset[Draw(0, crop, i)] for i in range(6)])


def test_features_and_importance_in_8_bits():
    inputs, features, importance = random_output()
    features = features * torch.logspace(-3, 3, 5)[:, None]
    importance[0, 0] = 1e-9
    decoded, recalled = decode(encode(inputs, features, importance), torch.device('cpu'))
    error = (decoded - features).abs() / features.abs().amax(-1, keepdim=True)
    assert error.max() <= 0.5 / 127 * 1.001
    assert relative_error(recalled, importance) < 5e-3 and (recalled > 0).all()
    assert decoded.dtype == recalled.dtype == torch.float32


def test_records_are_those_of_their_crop_and_image(tmp_path):
    make_cache(tmp_path / 'cache', MANIFEST)
    cache = TeacherCache(tmp_path / 'cache')
    inputs, *output = random_output()
    records = encode(inputs, *output)
    cache.write(1, [2, 0], records[:2])
    expected = [False, False, False, True, False, True]
    assert [has(cache, crop, image) for crop in (0, 1) for image in range(3)] == expected
    for each in (cache, TeacherCache(tmp_path / 'cache'), pickle.loads(pickle.dumps(cache))):
        found = each.read(1, [0, 1, 2], inputs[[1, 2, 0]])
        assert found[0] == records[1] and found[2] == records[0]
        assert not found[1]['checksum'] and not each.read(0, [0], inputs[:1])['checksum']
        assert not each.read(7, [0], inputs[:1])['checksum']  # beyond the end of the file


def test_damaged_records_and_those_of_other_pixels_count_as_none(tmp_path, log):
    make_cache(tmp_path / 'cache', MANIFEST)
    inputs, *output = random_output()
    TeacherCache(tmp_path / 'cache').write(0, [0, 1, 2], encode(inputs, *output))
    path, size = tmp_path / 'cache/records.bin', record_dtype(4, 64).itemsize
    content = bytearray(path.read_bytes())
    content[size + 17] ^= 1
    path.write_bytes(content[:-1])  # and the last one is cut
    cache = TeacherCache(tmp_path / 'cache')
    assert [has(cache, 0, image) for image in range(3)] == [True, False, False]
    assert (cache.read(0, [0, 1, 2], inputs)['checksum'] > 0).tolist() == [True, False, False]
    assert not log.text
    noise = inputs[:1].int() + torch.randint(-1, 2, inputs[:1].shape)
    assert cache.read(0, [0], noise.clamp(0, 255).byte())['checksum']
    for other in (inputs[:1].flip(-1), inputs[1:2]):
        assert not cache.read(0, [0], other)['checksum']
    assert log.text.count('Crop 0 of image 0 has other pixels than in') == 1


def test_thumbnails():
    images = torch.randint(256, (2, 3, 224, 112), dtype=torch.uint8)
    images[1, :, :56, 28:56] = 7
    found = thumbnails(images)
    assert found.shape == (2, 3, 4, 4) and (found[1, :, 0, 1] == 7).all()
    assert found[0, 1, 2, 3] == pytest.approx(images[0, 1, 112:168:2, 84::2].float().mean().item(), abs=1e-3)


def test_names_that_are_not_utf8_have_a_checksum(tmp_path, tiny_config):
    config = Config.fromfile(tiny_config())
    for folder, name in (('a', b'\xff\xe9.jpg'), ('b', b'\xfe\xe9.jpg'), ('c', 'ÿé.jpg'.encode())):
        (tmp_path / folder).mkdir()
        Path(tmp_path / folder, os.fsdecode(name)).touch()
        manifest = describe(config, nn.Linear(2, 2), ImageFolder(str(tmp_path / folder), pipeline=[]), 0, 16, 24)
        assert manifest['names'] == zlib.crc32(name) and manifest['images'] == 1


def test_the_cache_holds_what_the_teacher_gives(cached):
    config, folder, printed = cached
    cfg, cache = Config.fromfile(config), TeacherCache(folder)
    model = MODELS.build(cfg.model)
    for crop in (0, 1):
        batch = batch_of(cfg, crop)
        features, importance = model.head.run_teacher(model.data_preprocessor(batch)['inputs'])
        codes, kept = decode(cache.read(crop, list(range(6)), batch['inputs']), torch.device('cpu'))
        assert 0 < relative_error(codes, features) < 0.01 and 0 < relative_error(kept, importance) < 0.01
    record = record_dtype(16, 24).itemsize
    assert (folder / 'records.bin').stat().st_size == 2 * 24 * record
    assert f'{record / 1e3:.1f} KB each' in printed


def test_a_resumed_cache_is_the_same(cached, run_tool, tmp_path):
    config, folder, _ = cached
    run_tool('cache_targets.py', config, tmp_path / 'again', '--epochs', 1)
    os.truncate(tmp_path / 'again/records.bin', 7 * record_dtype(16, 24).itemsize - 3)
    run_tool('cache_targets.py', config, tmp_path / 'again', '--epochs', 2)
    for name in ('manifest.json', 'records.bin'):
        assert (tmp_path / 'again' / name).read_bytes() == (folder / name).read_bytes()


def test_masks_that_the_pipeline_draws(cached):
    """The pipeline form of the masking draws from the importance maps of a cache; the model takes its masks."""
    config, folder, _ = cached
    cfg = Config.fromfile(config)
    steps = Config.fromfile(CONFIG).train_dataloader.dataset.pipeline[1:]
    assert [step.type for step in steps[:2]] == ['mmmilan.LoadImportance', 'mmmilan.SemanticAwareMasking']
    steps[0].cache = str(folder)
    cfg.train_dataloader.dataset.pipeline[1:] = steps
    cache, visible, every = TeacherCache(folder), [], []
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    for i in range(24):
        samples = [dataset[Draw(0, crop, i)] for crop in (0, 1, 0)]
        masks = [torch.as_tensor(sample['data_samples'].mask) for sample in samples]
        assert all(int((~mask).sum()) == 4 for mask in masks) and torch.equal(masks[0], masks[2])
        importance = importance_of(cache.read(0, [i], samples[0]['inputs'][None]))[0]
        visible.append(importance[~masks[0].numpy()].mean())
        every.append(importance.mean())
    assert np.mean(visible) > np.mean(every)  # the important patches are drawn more often
    seen, model = [], MODELS.build(cfg.model)
    reconstruct = model.reconstruct
    model.reconstruct = lambda images, patches, *rest: seen.append(patches) or reconstruct(images, patches, *rest)
    data = model.data_preprocessor(batch_of(cfg, 0), training=True)
    assert torch.isfinite(model.loss(**data)['loss'])
    for patches, sample in zip(seen[0][0], data['data_samples'], strict=True):
        assert patches.tolist() == np.flatnonzero(~np.asarray(sample.mask.cpu())).tolist()
    with pytest.raises(InputError, match='lacks this crop of .*; run tools/cache_targets.py, with --epochs as'):
        dataset[Draw(0, 2, 0)]
    with pytest.raises(InputError, match='has to know the crop; set train_dataloader.sampler.type=mmmilan.Repro'):
        dataset[0]


def test_the_importance_of_an_image_that_does_not_decode(tiny_config, image_folder, run_tool, tmp_path):
    """What stands in for it has a uniform one."""
    shutil.copytree(image_folder, tmp_path / 'images')
    sorted((tmp_path / 'images').rglob('*.jpg'))[3].write_bytes(b'damaged')
    config = tiny_config(LOADER | {'train_dataloader.dataset.data_root': str(tmp_path / 'images')})
    run_tool('cache_targets.py', config, tmp_path / 'cache', '--epochs', 1)
    cfg = Config.fromfile(config)
    pack = dict(type='PackInputs', algorithm_keys=('importance',))
    cfg.train_dataloader.dataset.pipeline[1:] = [
        dict(type='mmmilan.LoadImportance', cache=str(tmp_path / 'cache')),
        pack,
    ]
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert (dataset[Draw(0, 0, 3)]['data_samples'].importance == 1).all()
    assert (dataset[Draw(0, 0, 4)]['data_samples'].importance < 1).all()


def test_the_tool_takes_the_config_that_trains_with_the_cache(cached, run_tool, tiny_config):
    config, folder, _ = cached
    content = (folder / 'records.bin').read_bytes()
    pipeline = Config.fromfile(config).train_dataloader.dataset.to_dict()['pipeline']
    pipeline[1:1] = [dict(type='mmmilan.LoadImportance', cache='none'), dict(type='mmmilan.SemanticAwareMasking')]
    config = tiny_config(LOADER | {'train_dataloader.dataset.pipeline': pipeline})
    run_tool('cache_targets.py', config, folder, '--epochs', 2)
    assert (folder / 'records.bin').read_bytes() == content


def test_the_tool_makes_damaged_records_again(cached, run_tool):
    config, folder, _ = cached
    content = (folder / 'records.bin').read_bytes()
    (folder / 'records.bin').write_bytes(content[:5000] + b'damaged' + content[5007:])
    run_tool('cache_targets.py', config, folder, '--epochs', 2)
    repaired = np.frombuffer((folder / 'records.bin').read_bytes(), record_dtype(16, 24))
    expected = np.frombuffer(content, record_dtype(16, 24))
    assert relative_error(*(torch.from_numpy(each['codes'].astype(float)) for each in (repaired, expected))) < 0.01


# -- caches that do not fit


def test_folders_that_are_no_cache_are_refused(tmp_path):
    make_cache(tmp_path / 'cache', MANIFEST)
    with pytest.raises(InputError, match='holds a cache of another images, feature_dim; choose another folder'):
        make_cache(tmp_path / 'cache', MANIFEST | dict(images=4, feature_dim=8))
    path = tmp_path / 'cache/manifest.json'
    for content, message in (
        ('{', 'holds no readable manifest.json; make a cache with tools/cache_targets.py'),
        ('[]', 'is a cache of another version'),
        (json.dumps(MANIFEST | dict(version=2)), 'is a cache of another version; make it again'),
        (json.dumps(MANIFEST | dict(images=-1)), 'lacks the number of images, patches or features'),
        (json.dumps(MANIFEST | dict(num_patches='4')), 'lacks the number of images'),
        (json.dumps(MANIFEST | dict(feature_dim=2**30)), 'cannot be used .*; make it again in another folder'),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            TeacherCache(tmp_path / 'cache')
    path.unlink()
    (tmp_path / 'cache/records.bin').write_text('mine')
    with pytest.raises(InputError, match='records.bin exists'):
        make_cache(tmp_path / 'cache', MANIFEST)
    assert (tmp_path / 'cache/records.bin').read_text() == 'mine'


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    make_cache(tmp_path / 'cache', MANIFEST)

    def full(*args: object) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.pwrite', full)
    with pytest.raises(InputError, match=r'records.bin cannot be written \(No space left on device\); free some space'):
        TeacherCache(tmp_path / 'cache').write(0, [0], encode(*random_output(1)))


def test_tool_says_what_it_cannot_cache(cached, run_tool, tiny_config, tmp_path):
    config, folder, _ = cached
    with pytest.raises(SystemExit, match='--epochs 0 leaves nothing to cache; choose 1 or more'):
        run_tool('cache_targets.py', config, folder, '--epochs', 0)
    other = tiny_config(LOADER | {'train_dataloader.dataset.pipeline': [dict(type='mmmilan.LoadImage')]})
    with pytest.raises(SystemExit, match='holds a cache of another pipeline; choose another folder'):
        run_tool('cache_targets.py', other, folder, '--epochs', 3)
    pixels = tiny_config(LOADER | {'model.neck.predict_feature_dim': 768})
    cfg = Config.fromfile(pixels)
    cfg.model.head = dict(type='mmmilan.PixelTarget')
    cfg.model.masking.type = 'mmmilan.RandomMasking'
    cfg.dump(pixels)
    with pytest.raises(SystemExit, match='Only the features of a single teacher can be kept; take CLIPTarget or'):
        run_tool('cache_targets.py', pixels, tmp_path / 'pixels', '--epochs', 1)
    assert not (tmp_path / 'pixels').exists()
