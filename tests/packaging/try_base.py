"""Try the base installation in an environment that has nothing else: run by tools/check_install.sh.

Two steps of pretraining from a config of the wheel, then features of images by the checkpoint.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import mmengine.hub
import numpy as np
import open_clip
import torch
from PIL import Image

import mmmilan

CONFIG = """
_base_ = 'mmmilan::milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
arch = dict(_delete_=True, embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=192)
model = dict(
    backbone=dict(arch=arch, img_size=64),
    neck=dict(num_patches=16, embed_dim=48, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4,
              predict_feature_dim=24),
    head=dict(teacher=dict(model=None, pretrained='clip.pt')),
)
pipeline = [
    dict(type='mmmilan.LoadImage'),
    dict(type='mmpretrain.RandomResizedCrop', scale=64),
    dict(type='mmpretrain.PackInputs'),
]
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, collate_fn=dict(type='default_collate'),
                        dataset=dict(data_root='images', pipeline=pipeline))
test_pipeline = [
    dict(type='mmmilan.LoadImage'),
    dict(type='mmpretrain.ResizeEdge', scale=64, edge='short'),
    dict(type='mmpretrain.CenterCrop', crop_size=64),
    dict(type='mmpretrain.PackInputs'),
]
test_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False,
                       dataset=dict(data_root='images', pipeline=test_pipeline))
param_scheduler = None
train_cfg = dict(max_epochs=1)
"""


def main() -> None:
    assert Path(mmmilan.__file__).is_relative_to(sys.prefix), mmmilan.__file__
    assert importlib.util.find_spec('mmdet') is None
    mmengine.hub.get_config('mmmilan::milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py')
    torch.manual_seed(0)
    clip = open_clip.transformer.VisionTransformer(64, 16, width=128, layers=2, heads=2, mlp_ratio=4, output_dim=24)
    weights = {f'visual.{key}': value for key, value in clip.state_dict().items()}
    # by these numbers a file of OpenAI is known, and so QuickGELU
    numbers = dict(input_resolution=64, context_length=77, vocab_size=49408)
    torch.save(weights | {key: torch.tensor(value) for key, value in numbers.items()}, 'clip.pt')
    Path('images').mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (72, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f'images/{i}.png')
    Path('own.py').write_text(CONFIG)
    train = Path(mmmilan.__file__).parent / '.mim/tools/train.py'
    run = subprocess.run([sys.executable, train, 'own.py'], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'OneDL' not in run.stdout + run.stderr
    checkpoint = Path('work_dirs/own/epoch_1.pth')
    assert torch.load(checkpoint, weights_only=False)['meta']['iter'] == 2
    features = mmmilan.FeatureExtractor('own.py', pretrained=checkpoint)(['images/0.png', 'images/1.png'])
    assert features.shape == (2, 48) and features.isfinite().all()
    assert (features[0] - features[1]).norm() > 1e-3 * features.norm()
    print('base: import, mmmilan:: as base, two steps of pretraining, features')


if __name__ == '__main__':
    main()
