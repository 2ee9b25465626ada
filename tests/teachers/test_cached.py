"""A cached teacher is the teacher, rounded to 8 bits; a cache that does not fit is refused with the reason."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, FUNCTIONS, MODELS
from torch._dynamo.testing import CompileCounter

from helpers import ROOT, relative_error
from mmmilan.datasets import Draw, ImageFolder
from mmmilan.engine.compilation import compile_model
from mmmilan.engine.online_evaluation import OnlineEvaluationHook, evaluating
from mmmilan.errors import InputError
from mmmilan.teachers.cached import TargetCache, checksum_of_names, encode, record_dtype

CONFIG = ROOT / 'configs/milan/milan-cached_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
LOADER = {f'train_dataloader.{key}': value for key, value in dict(batch_size=4, num_workers=0).items()}


@pytest.fixture
def cached(tiny_config, run_tool, tmp_path, capsys) -> tuple[Path, Path, str]:
    """A config, the folder of its cache of two epochs, and what the tool printed."""
    config, folder = tiny_config(LOADER), tmp_path / 'cache'
    run_tool('cache_targets.py', config, folder, '--epochs', 2)
    return config, folder, capsys.readouterr().out


def cached_config(config: Path, folder: Path) -> Config:
    cfg = Config.fromfile(config)
    cfg.train_dataloader.dataset.update(type='mmmilan.CachedTargets', cache=str(folder))
    cfg.model.type = 'mmmilan.CachedMILAN'
    cfg.model.head.teacher = dict(type='mmmilan.CachedTeacher', cache=str(folder), of=cfg.model.head.teacher)
    return cfg


def batch_of(cfg: Config, epoch: int) -> dict:
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    return FUNCTIONS.get('default_collate')([dataset[Draw(0, epoch, i)] for i in range(6)])


def loss_of(cfg: Config, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and the loss of a model, always of the same weights and draws."""
    model = MODELS.build(cfg.model)
    torch.manual_seed(0)  # now, as building a teacher draws random numbers
    model.init_weights()
    data = model.data_preprocessor(batch_of(cfg, epoch), training=True)
    torch.manual_seed(1)
    return data['inputs'], model.loss(**data)['loss']


def test_names_that_are_not_utf8_have_a_checksum(tmp_path):
    for folder, name in (('a', b'\xff\xe9.jpg'), ('b', b'\xfe\xe9.jpg'), ('c', 'ÿé.jpg'.encode())):
        (tmp_path / folder).mkdir()
        Path(tmp_path / folder, os.fsdecode(name)).touch()
    sums = [checksum_of_names(ImageFolder(str(tmp_path / folder), pipeline=[])) for folder in 'abc']
    assert sums == [zlib.crc32(name) for name in (b'\xff\xe9.jpg', b'\xfe\xe9.jpg', 'ÿé.jpg'.encode())]


def test_training_is_that_with_the_teacher(cached):
    config, folder, printed = cached
    for epoch in (0, 1):
        images, loss = loss_of(Config.fromfile(config), epoch)
        cached_images, cached_loss = loss_of(cached_config(config, folder), epoch)
        assert torch.equal(images, cached_images)
        assert 0 < abs(cached_loss / loss - 1) < 1e-3
    # the third epoch has the crops and targets of the first
    assert torch.equal(loss_of(cached_config(config, folder), 2)[1], loss_of(cached_config(config, folder), 0)[1])
    record = record_dtype(16, 24).itemsize
    assert (folder / 'epoch_1.bin').stat().st_size == 24 * record
    assert f'{record / 1e3:.1f} KB per image and epoch' in printed
    assert 'rounding to 8 bits alone causes a loss of' in printed


@pytest.mark.slow
def test_the_compiled_loss_takes_each_batch_from_the_cache(cached):
    """It is compiled once, and the targets are those of the batch at hand."""
    config, folder, _ = cached
    model, graphs = MODELS.build(cached_config(config, folder).model).train(), CompileCounter()
    model.init_weights()
    batches = [model.data_preprocessor(batch_of(cached_config(config, folder), epoch), True) for epoch in (0, 1, 0)]

    def losses() -> list[float]:
        values = []
        for batch in batches:
            torch.manual_seed(1)
            values.append(model.loss(**batch)['loss'].item())
        return values

    expected = losses()
    assert expected[0] == expected[2] != expected[1]
    compile_model(model, backend=graphs)
    assert losses() == pytest.approx(expected, rel=1e-6) and graphs.frame_count == 1


def test_masks_that_the_pipeline_draws(cached):
    """The cache's importance maps are what the pipeline form of the masking draws from; the model takes its masks."""
    config, folder, _ = cached
    cfg = cached_config(config, folder)
    steps = Config.fromfile(CONFIG).train_dataloader.dataset.pipeline[1:]
    assert steps[0].type == 'mmmilan.SemanticAwareMasking'
    cfg.train_dataloader.dataset.pipeline[1:] = steps
    cache, visible, every = TargetCache(folder), [], []
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    for i in range(24):
        records = [dataset[Draw(0, epoch, i)]['data_samples'] for epoch in (0, 1, 2)]
        assert all(int((~sample.mask).sum()) == 4 for sample in records)
        assert torch.equal(torch.as_tensor(records[0].mask), torch.as_tensor(records[2].mask))  # of the same crop
        importance = cache.read(0, i)['importance'].astype(float)
        visible.append(importance[~np.asarray(records[0].mask)].mean())
        every.append(importance.mean())
    assert np.mean(visible) > np.mean(every)  # the important patches are drawn more often
    seen = []
    model = MODELS.build(cfg.model)
    reconstruct = model.reconstruct
    model.reconstruct = lambda images, patches, *rest: seen.append(patches) or reconstruct(images, patches, *rest)
    data = model.data_preprocessor(batch_of(cfg, 0), training=True)
    assert torch.isfinite(model.loss(**data)['loss'])
    for patches, sample in zip(seen[0][0], data['data_samples'], strict=True):
        assert patches.tolist() == np.flatnonzero(~np.asarray(sample.mask.cpu())).tolist()


def test_features_and_importance_in_8_bits():
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    features = torch.randn(3, 5, 64) * torch.logspace(-3, 3, 5)[:, None]
    importance = torch.rand(3, 4).softmax(-1)
    importance[0, 0] = 1e-9
    records = encode(images, features, importance)
    decoded = torch.from_numpy(records['codes'] * records['scales'][..., None])
    error = (decoded - features).abs() / features.abs().amax(-1, keepdim=True)
    assert error.max() <= 0.5 / 127 * 1.001
    recalled = torch.from_numpy(records['importance'] * records['importance_scale'][:, None])
    assert relative_error(recalled, importance) < 5e-3 and (recalled > 0).all()


def test_a_resumed_cache_is_the_same(cached, run_tool, tmp_path):
    config, folder, _ = cached
    run_tool('cache_targets.py', config, tmp_path / 'again', '--epochs', 1)
    run_tool('cache_targets.py', config, tmp_path / 'again', '--epochs', 2)
    for name in ('manifest.json', 'epoch_0.bin', 'epoch_1.bin'):
        assert (tmp_path / 'again' / name).read_bytes() == (folder / name).read_bytes()


def test_no_teacher_is_needed(cached):
    config, folder, _ = cached
    cfg = cached_config(config, folder)
    Path(cfg.model.head.teacher.of.pretrained).unlink()
    model = MODELS.build(cfg.model)
    assert not list(model.head.teacher.parameters())
    with pytest.raises(InputError, match='come without the targets of .*; set train_dataloader.dataset.type=mmmilan.C'):
        model.loss(torch.randn(1, 3, 64, 64))


def test_evaluation_without_the_teacher(cached):
    """Other images than those of the cache have no features to compare with."""
    config, folder, _ = cached
    cfg = cached_config(config, folder)
    hook = OnlineEvaluationHook(cfg.test_dataloader.dataset)
    hook.before_train(SimpleNamespace(iter=1))
    with evaluating(MODELS.build(cfg.model)) as model:
        assert list(hook.measure(model)) == ['rankme']
    with evaluating(MODELS.build(Config.fromfile(config).model)) as model:
        assert list(hook.measure(model)) == ['cosine_class', 'cosine_patches', 'rankme']


# -- caches that do not fit


def test_another_teacher_is_refused(cached):
    config, folder, _ = cached
    cfg = cached_config(config, folder)
    cfg.model.head.teacher.of.pretrained = 'other.pt'
    with pytest.raises(
        InputError, match='The cache .* comes from the teacher .*clip.pt.*head.teacher.of names another'
    ):
        MODELS.build(cfg.model)


def test_other_crops_are_refused(cached):
    config, folder, _ = cached
    cfg = cached_config(config, folder)
    cfg.train_dataloader.dataset.pipeline[0].crop_ratio_range = (0.5, 1.0)
    with pytest.raises(InputError, match='The cache .*cache was made with the pipeline .*0.2.*make them equal'):
        DATASETS.build(cfg.train_dataloader.dataset)


def test_other_images_are_refused(cached, image_folder):
    config, folder, _ = cached
    cfg = cached_config(config, folder)
    cfg.train_dataloader.dataset.data_root = str(image_folder / 'class0')
    with pytest.raises(InputError, match='The cache .* was made of 24 images, not of the 8 in .*class0'):
        DATASETS.build(cfg.train_dataloader.dataset)


def test_an_image_that_changed_is_refused(cached):
    config, folder, _ = cached
    dataset = DATASETS.build(cached_config(config, folder).train_dataloader.dataset)
    path = folder / 'epoch_0.bin'
    records = np.fromfile(path, dataset.cache.dtype)
    records[0], records[5] = records[5].copy(), records[0].copy()  # each whole, but of another image
    records.tofile(path)
    with pytest.raises(InputError, match='0.jpg has changed since .*cache was made; restore the image'):
        for i in (0, 5):
            dataset[Draw(0, 0, i)]


def test_damaged_caches_are_refused(cached):
    config, folder, _ = cached
    path, size = folder / 'epoch_1.bin', TargetCache(folder).dtype.itemsize
    content = bytearray(path.read_bytes())
    content[3 * size + 17] ^= 1
    path.write_bytes(content)
    TargetCache(folder).read(1, 2)
    with pytest.raises(InputError, match='Record 3 of .*epoch_1.bin is damaged; make the cache again'):
        TargetCache(folder).read(1, 3)
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f'epoch_1.bin has {24 * size - 1} bytes instead of {24 * size}'):
        TargetCache(folder)
    (folder / 'manifest.json').unlink()
    with pytest.raises(InputError, match='holds no readable manifest.json; make a cache with tools/cache_targets.py'):
        cached_config(config, folder) and MODELS.build(cached_config(config, folder).model)


def test_a_sampler_without_epochs_is_refused(cached):
    config, folder, _ = cached
    dataset = DATASETS.build(cached_config(config, folder).train_dataloader.dataset)
    with pytest.raises(InputError, match='set train_dataloader.sampler.type=mmmilan.ReproducibleSampler'):
        dataset[0]


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
    with pytest.raises(SystemExit, match='has no model.head.teacher; take a config with one'):
        run_tool('cache_targets.py', pixels, tmp_path / 'pixels', '--epochs', 1)
    assert json.loads((folder / 'manifest.json').read_text())['epochs'] == 2
