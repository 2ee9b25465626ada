"""Try the dense installation, run by tools/check_install.sh: a config, and three tasks by one command each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import mmmilan

sys.path.append(str(Path(__file__).parents[2] / 'tools/demo'))
from scenes import write_scenes  # noqa: E402

CONFIG = """
_base_ = 'mmmilan::demo/mask-rcnn_vit-tiny-p8_scenes.py'
model = dict(backbone=dict(init_cfg=None))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                        dataset=dict(data_root='scenes', indices=4))
val_cfg = None
val_dataloader = None
val_evaluator = None
param_scheduler = None
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1)
"""
ARCH = 'dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)'
OUTPUTS = dict(classification='predictions.csv', detection='predictions.json', segmentation='index.html')


def call(*words: object) -> str:
    """Run a program; returns what it printed."""
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def main() -> None:
    assert Path(mmmilan.__file__).is_relative_to(sys.prefix), mmmilan.__file__
    write_scenes(Path('scenes'), 10, 10, image_size=96)
    Path('detector.py').write_text(CONFIG)
    assert 'OneDL' not in call(sys.executable, Path(mmmilan.__file__).parent / '.mim/tools/train.py', 'detector.py')
    assert torch.load('work_dirs/detector/epoch_1.pth', weights_only=False)['meta']['iter'] == 2
    print('dense: two steps of Mask R-CNN')
    command = Path(sys.executable).with_name('mmmilan')
    for task, output in OUTPUTS.items():
        options = ('--task', task, '--arch', ARCH, '--img-size', 64, '--epochs', 1, '--batch-size', 2)
        call(command, 'finetune', 'scenes', task, *options)
        assert Path(task, 'report.html').is_file()
        call(command, 'predict', 'scenes/val', Path(task, 'model.pth'), f'{task}-predicted')
        assert Path(f'{task}-predicted', output).is_file()
        print(f'dense: {task} from labelled images to predictions')


if __name__ == '__main__':
    main()
