"""The config of pretraining on one's own images, set by environment variables."""

from __future__ import annotations

import pytest
import timm
import torch
from mmengine.config import Config

from helpers import ROOT, read_scalars
from mmmilan.checkpoints.io import load_checkpoint_file

CONFIG = ROOT / 'configs/milan/milan_vit-base-p16_custom.py'
# A smaller encoder, decoder and teacher than the config's, so that a test can train them.
SMALL = (
    'model.backbone.arch=deit-tiny model.neck.embed_dim=192 '
    'model.neck.decoder_depth=1 model.neck.predict_feature_dim=24'
)


@pytest.mark.parametrize('epochs', [1, 2, 50])
def test_three_things_to_set(monkeypatch, epochs):
    monkeypatch.setenv('DATA_ROOT', '/data/mine')
    monkeypatch.setenv('BATCH_SIZE', '96')
    monkeypatch.setenv('EPOCHS', str(epochs))
    cfg = Config.fromfile(CONFIG)
    assert cfg.train_dataloader.dataset.data_root == '/data/mine'
    assert cfg.train_dataloader.batch_size == 96
    assert cfg.train_cfg.max_epochs == epochs
    warmup, cosine = cfg.param_scheduler
    assert warmup.end == cosine.begin == max(1, epochs // 10)
    assert cosine.end >= epochs and cosine.begin < cosine.end


@pytest.mark.slow
def test_training_starts_from_a_given_vit(run_tool, image_folder, clip_file, tmp_path, monkeypatch):
    torch.manual_seed(1)
    vit = timm.create_model('deit_tiny_patch16_224')
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    for key, value in dict(DATA_ROOT=image_folder, BATCH_SIZE=8, EPOCHS=1, CHECKPOINT=tmp_path / 'vit.pth').items():
        monkeypatch.setenv(key, str(value))
    teacher = (
        f'model.head.teacher.model=None model.head.teacher.pretrained={clip_file} model.head.teacher.input_size=224'
    )
    quick = 'train_dataloader.num_workers=0 train_dataloader.persistent_workers=False default_hooks.logger.interval=1'
    options = f'{SMALL} {teacher} {quick} optim_wrapper.type=OptimWrapper'.split()
    run_tool('train.py', CONFIG, '--work-dir', tmp_path / 'work', '--cfg-options', *options)

    steps = read_scalars(tmp_path / 'work')
    assert len(steps) == 3  # 24 images
    assert max(step['lr'] for step in steps) <= 2.4e-3 * 8 / 4096 * 1.001
    weights = load_checkpoint_file(tmp_path / 'work/epoch_1.pth')['state_dict']
    before, after = vit.blocks[0].mlp.fc1.weight, weights['backbone.layers.0.ffn.layers.0.0.weight']
    assert 0 < (before - after).abs().max() < 1e-4  # three small steps away
    assert torch.equal(vit.pos_embed, weights['backbone.pos_embed'])


def test_from_scratch(monkeypatch):
    monkeypatch.setenv('CHECKPOINT', 'None')
    assert Config.fromfile(CONFIG).model.backbone.init_cfg is None
