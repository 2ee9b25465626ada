"""Try the dense installation, run by tools/check_install.sh: a config, and three tasks from three formats."""

from __future__ import annotations

import json
import shutil
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
OUTPUTS = dict(classification='predictions.csv', detection='predictions.json', segmentation='maps')


def call(*words: object) -> str:
    """Run a program; returns what it printed."""
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def write_data() -> None:
    """The scenes as folders of classes, as YOLO's boxes, and as images with label maps: a folder for each task."""
    for split in ('train', 'val'):
        shutil.copytree(f'scenes/{split}', f'data/classification/{split}')
        shutil.copytree(f'scenes/{split}', f'data/segmentation/images/{split}')
        shutil.copytree(f'scenes/semantic/{split}', f'data/segmentation/masks/{split}')
        content = json.loads(Path(f'scenes/annotations/instances_{split}.json').read_text())
        places = {each['id']: place for place, each in enumerate(content['categories'])}
        for image in content['images']:
            target = Path('data/detection/images', split, f'{image["id"]}.jpg')
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f'scenes/{split}/{image["file_name"]}', target)
            width, height, rows = image['width'], image['height'], ''
            for each in content['annotations']:
                left, top, w, h = each['bbox']
                if each['image_id'] == image['id']:
                    box = (left + w / 2) / width, (top + h / 2) / height, w / width, h / height
                    rows += f'{places[each["category_id"]]} {" ".join(map(str, box))}\n'
            text = Path('data/detection/labels', split, f'{image["id"]}.txt')
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(rows)
    shutil.copy('scenes/semantic/classes.json', 'data/segmentation')
    names = [each['name'] for each in content['categories']]
    Path('data/detection/data.yaml').write_text(f'train: images/train\nval: images/val\nnames: {names}\n')


def check_inferencers(photo: str) -> None:
    """OpenMMLab's own inferencers take the models."""
    import mmdet.apis
    import mmpretrain
    import mmseg.apis
    from mmengine.registry import DefaultScope

    config, weights = ({task: f'{task}/{name}' for task in OUTPUTS} for name in ('config.py', 'model.pth'))
    assert mmdet.apis.DetInferencer(weights=weights['detection'], device='cpu')(photo)['predictions']
    segment = mmseg.apis.MMSegInferencer(config['segmentation'], weights['segmentation'], device='cpu')
    assert segment(photo)['predictions'].shape == (96, 96)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        classify = mmpretrain.ImageClassificationInferencer(
            config['classification'], weights['classification'], device='cpu'
        )
        assert len(classify(photo)[0]['pred_scores']) == 10


def main() -> None:
    assert Path(mmmilan.__file__).is_relative_to(sys.prefix), mmmilan.__file__
    write_scenes(Path('scenes'), 10, 10, image_size=96)
    Path('detector.py').write_text(CONFIG)
    assert 'OneDL' not in call(sys.executable, Path(mmmilan.__file__).parent / '.mim/tools/train.py', 'detector.py')
    assert torch.load('work_dirs/detector/epoch_1.pth', weights_only=False)['meta']['iter'] == 2
    print('dense: two steps of Mask R-CNN')
    write_data()
    command = Path(sys.executable).with_name('mmmilan')
    for task, output in OUTPUTS.items():
        options = ('--arch', ARCH, '--img-size', 64, '--epochs', 1, '--batch-size', 2)
        call(command, 'finetune', f'data/{task}', task, *options)
        assert Path(task, 'report.html').is_file()
        call(command, 'predict', 'scenes/val', Path(task, 'model.pth'), f'{task}-predicted')
        assert Path(f'{task}-predicted', output).exists()
        if task != 'detection':
            call(command, 'export-onnx', Path(task, 'model.pth'), f'{task}.onnx')
        print(f'dense: {task} from labelled images to predictions')
    check_inferencers(str(next(Path('scenes/val').rglob('*.jpg'))))
    print("dense: OpenMMLab's inferencers")


if __name__ == '__main__':
    main()
