"""Features of many images in a file, and the encoder as an ONNX file."""

from __future__ import annotations

import importlib.util
import os
import tarfile

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmmilan
from helpers import ROOT, build_model, load_trusted, relative_error, rest_slow
from mmmilan.api.models import build_embedder, get_model
from mmmilan.checkpoints.io import save_checkpoint_file
from mmmilan.datasets.image_folder import list_images
from mmmilan.errors import InputError
from mmmilan.evaluation.feature_files import is_features, read_features
from mmmilan.registry import MODELS


@pytest.fixture
def checkpoint(tiny_config, milan_cfg, tmp_path):
    """A small model in a file, with its config beside it."""
    model = MODELS.build(milan_cfg)
    model.init_weights()
    folder = tmp_path / 'own'
    folder.mkdir()
    tiny_config().rename(folder / 'config.py')
    save_checkpoint_file(dict(state_dict=model.state_dict()), folder / 'milan.pth')
    return folder / 'milan.pth'


@pytest.fixture
def images(tmp_path):
    """Five images in nested folders, one of which does not decode, and a tar shard of two."""
    rng = np.random.default_rng(0)
    files = [tmp_path / 'images' / name for name in ('b.png', 'a/0.jpg', 'a/1.jpg', 'c/broken.jpg', 'c/d/2.png')]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 255, (80, 70, 3), dtype=np.uint8))
    files[3].write_bytes(files[3].read_bytes()[:500])
    with tarfile.open(tmp_path / 'shard.tar', 'w') as tar:
        for path in files[:2]:
            tar.add(path, path.name)
    return tmp_path / 'images'


def test_features_of_a_folder(images, checkpoint, tmp_path, log):
    path = mmmilan.embed(images, checkpoint, tmp_path / 'f.npz', patches=True, batch_size=2)
    file = dict(np.load(path))
    assert [name.removeprefix(f'{images}/') for name in file['paths']] == [
        'a/0.jpg', 'a/1.jpg', 'b.png', 'c/broken.jpg', 'c/d/2.png',
    ]  # fmt: skip
    assert file['ok'].tolist() == [True, True, True, False, True]
    assert f'Left out: {images}/c/broken.jpg' in log.text and '1 of 5 images were left out' in log.text
    assert file['class_token'].shape == file['mean_token'].shape == (5, 48) and file['class_token'].dtype == np.float32
    assert file['patch_tokens'].shape == (5, 16, 48) and file['embedding'].shape == (5, 24)
    for name in ('class_token', 'mean_token', 'patch_tokens', 'embedding'):
        assert np.isnan(file[name]).reshape(5, -1).all(1).tolist() == [False, False, False, True, False]
    read = [str(name) for name, ok in zip(file['paths'], file['ok'], strict=True) if ok]
    for name, out_type in (('class_token', 'cls_token'), ('mean_token', 'avg_featmap')):
        expected = mmmilan.FeatureExtractor(checkpoint, out_type=out_type)(read)
        assert relative_error(torch.from_numpy(file[name][file['ok']]), expected) < 1e-6
    assert np.allclose(file['patch_tokens'][0].mean(0), file['mean_token'][0], atol=1e-3)


def test_the_embedding_is_the_decoders_own_prediction(checkpoint):
    """It is the prediction of the whole decoder for an image without a mask."""
    whole = get_model(checkpoint, encoder_only=False)
    embedder = build_embedder(get_model(checkpoint), checkpoint)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = whole.embed_joint(images)[:, 0]
        assert relative_error(embedder(images)['embedding'], expected) < 1e-6


def test_the_embedding_of_maskclip(maskclip_file):
    content = load_trusted(maskclip_file)
    whole = MODELS.build(content['meta']['model']).eval()
    whole.load_state_dict(content['state_dict'])
    embedder = build_embedder(whole, maskclip_file)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(embedder(images)['embedding'], whole.encode_image(images)) < 1e-6


@pytest.mark.parametrize(('neck', 'has_embedding'), [('MAEDecoder', False), ('LinearProjection', True)])
def test_only_decoders_that_leave_tokens_apart_embed(neck, has_embedding, milan_cfg, tmp_path):
    """MAE's decoder mixes the tokens in its blocks, so the class token alone is no input for it."""
    milan_cfg['neck']['type'] = f'mmmilan.{neck}'
    if neck == 'LinearProjection':
        milan_cfg['neck'] = dict(type='mmmilan.LinearProjection', embed_dim=48, predict_feature_dim=24)
    config = Config(dict(model=milan_cfg))
    path = tmp_path / 'milan.pth'
    torch.save(dict(state_dict=build_model(milan_cfg).state_dict(), meta=dict(cfg=config.pretty_text)), path)
    config.dump(tmp_path / 'config.py')
    model = MODELS.build(dict(milan_cfg)).eval()
    embedder = build_embedder(model, path)
    with torch.no_grad():
        assert ('embedding' in embedder(torch.randn(2, 3, 64, 64))) == has_embedding


@pytest.mark.parametrize(
    'name', rest_slow(['mask-rcnn_vit-tiny-p8_scenes', 'upernet_vit-tiny-p8_scenes'], 'upernet_vit-tiny-p8_scenes')
)
def test_detectors_and_segmentors_have_maps_and_no_tokens(name, images, tmp_path):
    config = Config.fromfile(ROOT / f'configs/demo/{name}.py')
    config.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    save_checkpoint_file(dict(state_dict=model.state_dict(), meta=dict(cfg=config.pretty_text)), tmp_path / 'a.pth')
    with pytest.raises(InputError, match='a DenseViT, gives feature maps and no tokens of an image; give'):
        mmmilan.embed(images, tmp_path / 'a.pth', tmp_path / 'f.npz')
    with pytest.raises(InputError, match='gives feature maps and no tokens'):
        mmmilan.FeatureExtractor(tmp_path / 'a.pth')
    assert not list(tmp_path.glob('f.*'))


def test_order_of_a_list_and_shards(images, checkpoint, tmp_path):
    given = [images / 'b.png', images / 'a/1.jpg', tmp_path / 'shard.tar']
    file = np.load(mmmilan.embed(given, checkpoint, tmp_path / 'f.npz'))
    names = [name.split('@')[0] for name in file['paths']]
    assert names[:2] == [str(path) for path in given[:2]]
    assert names[2:] == [f'tar://{tmp_path}/shard.tar/{name}' for name in ('b.png', '0.jpg')]
    assert np.array_equal(file['class_token'][0], file['class_token'][2]) and file['ok'].all()


def test_parquet(images, checkpoint, tmp_path, monkeypatch):
    """It is written in groups of rows as they come; what cannot be used stands in its place, at the end too."""
    parquet = pytest.importorskip('pyarrow.parquet')
    monkeypatch.setattr('mmmilan.evaluation.feature_files.GROUP_BYTES', 1)
    (images / 'z.jpg').write_bytes(b'no image')
    path = mmmilan.embed(images, checkpoint, tmp_path / 'groups.parquet', batch_size=2, patches=True)
    file = np.load(mmmilan.embed(images, checkpoint, tmp_path / 'all.npz', batch_size=2, patches=True))
    assert parquet.ParquetFile(path).num_row_groups == 4
    assert file['ok'].tolist() == [True, True, True, False, True, False]
    groups = parquet.read_table(path).to_pydict()
    for name, rows in file.items():
        read = np.array(groups[name], rows.dtype)
        assert np.array_equal(read, rows.reshape(read.shape), equal_nan=rows.dtype.kind == 'f'), name
    table = parquet.read_table(mmmilan.embed(images, checkpoint, tmp_path / 'f.parquet')).to_pydict()
    file = np.load(mmmilan.embed(images, checkpoint, tmp_path / 'f.npz'))
    assert table['paths'] == file['paths'].tolist() and table['ok'] == file['ok'].tolist()
    assert np.array_equal(np.array(table['class_token'], np.float32), file['class_token'], equal_nan=True)


def test_names_that_are_not_utf8(images, checkpoint, tmp_path):
    """They come back as they were: Parquet has them as bytes."""
    pytest.importorskip('pyarrow')
    os.rename(images / 'c', os.fsdecode(os.fsencode(images) + b'/caf\xe9'))
    readable = [path for path in list_images(images) if 'broken' not in path]
    for ending in ('parquet', 'npz', 'PARQUET', 'NPZ'):
        path = mmmilan.embed(images, checkpoint, tmp_path / f'f.{ending}')
        assert is_features(path) and read_features(path, ['class_token'])[0] == readable


def test_label_maps_are_not_embedded(images, checkpoint, tmp_path, log):
    """But those of a folder that is named itself are."""
    (images / 'a').rename(images / 'c/images')
    (images / 'c/d').rename(images / 'c/masks')
    (images / 'c/broken.jpg').unlink()
    found = np.load(mmmilan.embed(images, checkpoint, tmp_path / 'f.npz'))['paths']
    assert [name.removeprefix(f'{images}/') for name in found] == ['b.png', 'c/images/0.jpg', 'c/images/1.jpg']
    assert f'Left out of {images}: 1 in folders of label maps and the like (c/masks).' in log.text
    found = np.load(mmmilan.embed(images / 'c/masks', checkpoint, tmp_path / 'g.npz'))['paths']
    assert found.tolist() == [f'{images}/c/masks/2.png']


def test_what_cannot_be_embedded(images, checkpoint, tmp_path):
    for source, out, message in (
        (images, 'f.csv', 'does not end in .npz or .parquet'),
        (images / 'none.jpg', 'f.npz', 'none.jpg does not exist'),
        (images / 'c/broken.jpg', 'f.npz', 'Of 1 image none can be used'),
    ):
        with pytest.raises(InputError, match=message):
            mmmilan.embed(source, checkpoint, tmp_path / out)
    assert not list(tmp_path.glob('f.*'))


def test_onnx_without_its_packages(checkpoint, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if 'onnx' in name else find_spec(name))
    with pytest.raises(InputError, match='pip install onnx onnxscript onnxruntime'):
        mmmilan.export_onnx(checkpoint, tmp_path / 'a.onnx')


@pytest.mark.slow
def test_onnx(checkpoint, images, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    path = mmmilan.export_onnx(checkpoint, tmp_path / 'a.onnx')
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    assert names == ['class_token', 'mean_token', 'patch_tokens', 'embedding']
    file = np.load(mmmilan.embed(images, checkpoint, tmp_path / 'f.npz', patches=True))
    extract = mmmilan.FeatureExtractor(checkpoint)
    inputs = [
        extract.prepare(extract.load(dict(img_path=str(images / name))))['inputs'] for name in ('a/0.jpg', 'b.png')
    ]
    rgb = torch.stack(inputs).flip(1).float() / 255
    for name, output in zip(names, session.run(None, {'images': rgb.numpy()}), strict=True):
        bound = 1e-3 if name == 'patch_tokens' else 1e-5  # written in float16
        assert relative_error(torch.from_numpy(output), torch.from_numpy(file[name][[0, 2]])) < bound, name

    # a file that does not compute the same is not left behind
    monkeypatch.setattr('mmmilan.export.onnx.BOUND', -1.0)
    with pytest.raises(InputError, match='was not written: its class_token differs'):
        mmmilan.export_onnx(checkpoint, tmp_path / 'b.onnx')
    assert not (tmp_path / 'b.onnx').exists()
