"""Small trained models of each kind that can be published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import mmmilan
from helpers import FINE_TUNED, PRETRAINED, ROOT
from mmmilan.checkpoints.io import save_checkpoint_file
from mmmilan.checkpoints.zoo import find_model

CONFIGS = {
    'milan': find_model(PRETRAINED).config,
    'class-token': find_model(FINE_TUNED).config,
    'mean-token-whole': find_model(FINE_TUNED).config,  # evaluated on the whole short side, as at 384 pixels
    'maskclip': ROOT / 'configs/maskclip/maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py',
}


@pytest.fixture
def trained(tmp_path):
    """Writes config and checkpoint of a small model as training leaves them; ``classes`` are those of a classifier."""

    def write(
        kind: str, classes: tuple[str, ...] = (), data_root: str | None = None, rectangle: bool = False
    ) -> tuple[Path, Path]:
        config = Config.fromfile(CONFIGS[kind])
        shrink_model(config.model, kind, len(classes), rectangle)
        shrink_images(config.test_dataloader.dataset.pipeline, kind, rectangle)
        config.train_dataloader.dataset.data_root = data_root or config.train_dataloader.dataset.data_root
        path = tmp_path / f'{kind}.py'
        config.dump(path)
        model = mmmilan.get_model(path, encoder_only=kind == 'milan')
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2 + 0.1
        meta = dict(epoch=3, cfg=config.pretty_text)
        if classes:
            meta['dataset_meta'] = dict(classes=classes)
        checkpoint = dict(state_dict=model.state_dict(), meta=meta, optimizer=dict(state={0: torch.zeros(1000)}))
        save_checkpoint_file(checkpoint, tmp_path / f'{kind}.pth')
        return path, tmp_path / f'{kind}.pth'

    return write


def shrink_model(model: Config, kind: str, num_classes: int, rectangle: bool) -> None:
    """Two blocks, 48 wide, for 32 x 32 or 32 x 48 pixels in patches of 8."""
    arch = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=96)
    size, patches = ((32, 48), (4, 6)) if rectangle else (32, 16)
    model.backbone.update(arch=arch, img_size=size, patch_size=8)
    if kind == 'milan':
        model.neck.update(num_patches=patches, embed_dim=48, decoder_depth=1)
    elif kind == 'maskclip':
        text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
        model.update(embed_dim=24, text=text)
        model.neck.update(num_patches=patches, embed_dim=48, predict_feature_dim=48)
        model.neck.update(decoder_embed_dim=16, decoder_num_heads=2)
        model.head.update(feature_dim=48, num_codewords=16)
        model.language.update(decoder_num_heads=2)
    elif kind == 'class-token':
        model.backbone.update(out_type='cls_token', final_norm=True)
        model.head = dict(type='VisionTransformerClsHead', num_classes=num_classes, in_channels=48)
    else:
        model.head.update(num_classes=num_classes, in_channels=48)


def shrink_images(pipeline: list[dict], kind: str, rectangle: bool) -> None:
    if rectangle:
        pipeline[1:3] = [dict(type='Resize', scale=(48, 32), backend='pillow', interpolation='bicubic')]
    else:
        pipeline[1].scale = 32 if kind in ('maskclip', 'mean-token-whole') else 36
        pipeline[2].crop_size = 32
