"""Try the dense installation, run by tools/check_install.sh: Mask R-CNN trains two steps on drawn scenes."""

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


def main() -> None:
    assert Path(mmmilan.__file__).is_relative_to(sys.prefix), mmmilan.__file__
    write_scenes(Path('scenes'), 10, 10, image_size=96)
    Path('detector.py').write_text(CONFIG)
    train = Path(mmmilan.__file__).parent / '.mim/tools/train.py'
    run = subprocess.run([sys.executable, train, 'detector.py'], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'OneDL' not in run.stdout + run.stderr
    assert torch.load('work_dirs/detector/epoch_1.pth', weights_only=False)['meta']['iter'] == 2
    print('dense: two steps of Mask R-CNN')


if __name__ == '__main__':
    main()
