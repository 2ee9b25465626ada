"""Classifiers and segmentors as ONNX files, and the lines of the guide that give them a photo."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.registry import TRANSFORMS

import mmmilan
from helpers import ROOT
from mmmilan.checkpoints.io import save_checkpoint_file
from mmmilan.errors import InputError
from mmmilan.export import onnx as export
from mmmilan.export import onnx_resizing as resizing
from mmmilan.export.preprocessing import Preprocessing

ARCH = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
DENSE = dict(arch=ARCH, init_cfg=None, out_indices=(0, 0, 1, 1), global_indices=(1,))
CLASSES = ('grüner Frosch', 'a, b', 'moon')


def lines_of_the_guide(session: str) -> str:
    """The example in docs/onnx.md that opens a file."""
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/onnx.md').read_text(), re.DOTALL)
    return next(block for block in blocks if session in block)


def save_photo(path: Path) -> np.ndarray:
    """A photo with edges and grain, portrait; BGR as read from its JPEG."""
    photo = resizing.photos()[1][..., ::-1]
    cv2.imwrite(str(path), photo)
    return cv2.imread(str(path))


def save_model(config: str, change, path: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """A checkpoint of random weights with a config, as training leaves it."""
    cfg = Config.fromfile(ROOT / 'configs' / config)
    change(cfg)
    cfg.dump(path.with_suffix('.py'))
    model = mmmilan.get_model(path.with_suffix('.py'))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=classes))
    save_checkpoint_file(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@pytest.fixture
def written_once(monkeypatch):
    """The second export of a model starts from the file of the first, as exporting takes seconds."""
    files, write = {}, export.write

    def write_or_copy(exported, images, path, checkpoint):
        if checkpoint not in files:
            write(exported, images, path, checkpoint)
            files[checkpoint] = f'{checkpoint}.first'
            shutil.copy(path, files[checkpoint])
        shutil.copy(files[checkpoint], path)

    monkeypatch.setattr(export, 'write', write_or_copy)


@pytest.mark.slow
def test_classifier(trained, tmp_path, monkeypatch, written_once):
    """The guide's lines give the classifier's own prediction for a raw photo, with and without resizing in the file."""
    pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    save_photo(Path('photo.jpg'))
    _, checkpoint = trained('class-token', CLASSES)
    expected = mmmilan.ImageClassificationInferencer(checkpoint)('photo.jpg')[0]['pred_scores']
    assert expected.max() < 0.999  # a saturated prediction would hide an error

    mmmilan.export_onnx(checkpoint, 'flowers.onnx')
    guide = lines_of_the_guide("'flowers.onnx'")
    exec(guide, found := {})
    assert np.abs(found['probabilities'] - expected).max() < 1e-3
    assert json.loads(found['says']['classes']) == list(CLASSES) and found['says']['task'] == 'classification'
    assert found['prepare'] == dict(
        colours='RGB',
        range=[0, 1],
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        normalised='in the model',
        short_edge=36,
        crop=[32, 32],
        interpolation='bicubic',
        library='pillow',
    )

    mmmilan.export_onnx(checkpoint, 'flowers.onnx', resize='graph', overwrite=True)
    whole = lines_of_the_guide('np.asarray(photo)[None]')
    exec(guide[: guide.index('photo =')] + whole, found := {})
    assert np.abs(found['probabilities'] - expected).max() < 1e-3
    assert found['prepare']['resized'] == 'in the model'

    # where the file does not resize as the pipeline does, it is not written
    monkeypatch.setitem(resizing.RESIZE, ('pillow', 'bicubic'), resizing.RESIZE['cv2', 'bilinear'])
    with pytest.raises(InputError, match='was not written: its probabilities differs from that of the test pipeline'):
        mmmilan.export_onnx(checkpoint, 'other.onnx', resize='graph')
    assert not Path('other.onnx').exists()


def residual(cfg: Config) -> None:
    """A classifier of three classes whose encoder is no ViT."""
    cfg.model.backbone = dict(type='ResNet', depth=18, stem_channels=8, base_channels=8)
    cfg.model.neck = dict(type='GlobalAveragePooling')
    cfg.model.head = dict(type='LinearClsHead', num_classes=3, in_channels=64)


@pytest.mark.slow
def test_an_encoder_that_is_no_vit(tmp_path):
    """Its images have the size that the test pipeline gives them."""
    onnxruntime = pytest.importorskip('onnxruntime')
    checkpoint = save_model('demo/vit-tiny-p8_finetune_scenes.py', residual, tmp_path / 'a.pth')
    session = onnxruntime.InferenceSession(mmmilan.export_onnx(checkpoint, tmp_path / 'a.onnx'))
    assert session.get_inputs()[0].shape[1:] == [3, 64, 64] and session.get_outputs()[0].shape[1:] == [3]


@pytest.mark.slow
def test_encoder(trained, tmp_path, monkeypatch):
    """It takes the image that the guide's lines make for a classifier, and gives the features of the photo."""
    pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    save_photo(Path('photo.jpg'))
    _, checkpoint = trained('milan')
    mmmilan.export_onnx(checkpoint, 'flowers.onnx')
    guide = lines_of_the_guide("'flowers.onnx'")
    exec(guide[: guide.index('probabilities =')], found := {})
    features = found['session'].run(['class_token'], {'images': found['images']})[0]
    expected = mmmilan.FeatureExtractor(checkpoint, out_type='cls_token')('photo.jpg').numpy()
    assert np.linalg.norm(features - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.slow
def test_segmentor(tmp_path, monkeypatch, written_once):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('mmseg')

    def small(cfg: Config) -> None:
        cfg.model.backbone.update(DENSE, img_size=32)
        cfg.model.decode_head.update(in_channels=[32] * 4, num_classes=3)
        cfg.model.auxiliary_head.update(in_channels=32, num_classes=3)
        cfg.model.test_cfg = dict(mode='slide', crop_size=(32, 32), stride=(21, 21))
        cfg.test_dataloader.dataset.pipeline[1] = dict(type='Resize', scale=(128, 32), keep_ratio=True)

    monkeypatch.chdir(tmp_path)
    photo = save_photo(Path('photo.jpg'))
    checkpoint = save_model('demo/upernet_vit-tiny-p8_scenes.py', small, tmp_path / 'land.pth')
    mmmilan.export_onnx(checkpoint, 'land.onnx')
    exec(lines_of_the_guide("'land.onnx'"), found := {})

    model = mmmilan.get_model(checkpoint)
    image = cv2.resize(photo, (32, 51)).transpose(2, 0, 1)
    meta = dict(ori_shape=photo.shape[:2], img_shape=image.shape[1:], padding_size=[0] * 4)
    with torch.no_grad():
        data = model.data_preprocessor(dict(inputs=[torch.from_numpy(image)]))
        expected = model.inference(data['inputs'], [meta])
    errors = np.linalg.norm(found['logits'] - expected[0].numpy(), axis=0) / np.linalg.norm(expected[0], axis=0)
    assert errors.max() < 1e-3 and found['logits'].shape == (3, 51, 32)
    assert found['says']['task'] == 'segmentation' and json.loads(found['says']['classes']) == list(CLASSES)
    labels = mmmilan.Predictor(checkpoint)('photo.jpg')[0]['map']
    assert found['labels'].shape == labels.shape == photo.shape[:2] and len(np.unique(labels)) > 1
    assert (found['labels'] == labels).mean() > 0.999  # but for pixels where two classes are as likely

    with pytest.raises(InputError, match='resizes as no operator of ONNX does; leave out resize'):
        mmmilan.export_onnx(checkpoint, 'other.onnx', resize='graph')


@pytest.mark.parametrize(('height', 'width'), [(96, 128), (160, 100), (300, 40), (50, 40), (33, 64)])
@pytest.mark.parametrize('kind', resizing.RESIZE)
@pytest.mark.parametrize('square', [True, False])
def test_resizing_in_the_graph(kind, height, width, square):
    """Few values differ from the pipeline's, and by 1 of 255 where Pillow too resizes the columns before the rows.

    For some shapes it begins with the rows: it rounds to whole numbers between the two.
    """
    onnx, onnxruntime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    library, interpolation = kind
    own = dict(backend=library, interpolation=interpolation)
    if square:
        settings = Preprocessing(37, (32, 32), interpolation, [], [], library)
        steps = [dict(type='ResizeEdge', scale=37, **own), dict(type='CenterCrop', crop_size=32)]
    else:
        settings = Preprocessing(None, (32, 48), interpolation, [], [], library)
        steps = [dict(type='Resize', scale=(48, 32), **own)]
    rng = np.random.default_rng(0)
    photo = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3)).astype(np.float32), (0, 0), 1) * 3 - 256
    photo = photo.clip(0, 255).astype(np.uint8)
    results = dict(img=photo)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        for step in steps:
            results = TRANSFORMS.build(step)(results)
    text = resizing.resizing_graph(settings, *resizing.RESIZE[kind])
    graph = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>{text}')
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=['CPUExecutionProvider'])
    prepared = session.run(None, {'images': photo[None]})[0][0].transpose(1, 2, 0) * 255
    errors = np.abs(prepared - results['img'])
    assert errors.mean() < 0.4
    rows_first = library == 'pillow' and (height / width > 1.5 or not square)
    assert errors.max() < (8 if rows_first else 1.001)


def test_what_is_not_exported(tmp_path, trained, monkeypatch):
    """A model is refused for what it is, before the exporter runs, and nothing is written."""
    pytest.importorskip('mmdet')
    monkeypatch.setattr(export, 'PACKAGES', ())

    def detector(cfg: Config) -> None:
        cfg.model.backbone.update(DENSE)
        cfg.model.neck.in_channels = [32] * 4

    def several_labels(cfg: Config) -> None:
        cfg.model.backbone.update(arch=ARCH, init_cfg=None)
        cfg.model.head = dict(type='MultiLabelLinearClsHead', num_classes=10, in_channels=32)

    def whole_images(cfg: Config) -> None:
        cfg.model.backbone.update(DENSE)
        cfg.model.decode_head.in_channels = [32] * 4
        cfg.model.auxiliary_head.in_channels = 32
        cfg.test_dataloader.dataset.pipeline[1]['keep_ratio'] = True

    def any_size(cfg: Config) -> None:
        residual(cfg)
        cfg.test_dataloader.dataset.pipeline = [dict(type='mmmilan.LoadImage'), dict(type='PackInputs')]

    def another_head(cfg: Config) -> None:
        cfg.model.backbone.update(arch=ARCH, init_cfg=None)
        cfg.model.head.in_channels = 32

    cases = (
        ('mask-rcnn_vit-tiny-p8_scenes.py', detector, 'is a detector, whose number of boxes .* use mmmilan predict'),
        ('vit-tiny-p8_finetune_scenes.py', several_labels, 'ends in a MultiLabelLinearClsHead, which is not exported'),
        ('upernet_vit-tiny-p8_scenes.py', whole_images, "takes whole images of any shape, .* dict.mode='slide'"),
        ('vit-tiny-p8_finetune_scenes.py', any_size, 'This ResNet takes images of any size, .* give the test pipeline'),
        ('vit-tiny-p8_finetune_scenes.py', another_head, 'names 3 classes, but its head has 10'),
    )
    for config, change, message in cases:
        checkpoint = save_model(f'demo/{config}', change, tmp_path / f'{change.__name__}.pth')
        with pytest.raises(InputError, match=message):
            mmmilan.export_onnx(checkpoint, tmp_path / 'a.onnx')
    assert not (tmp_path / 'a.onnx').exists()
