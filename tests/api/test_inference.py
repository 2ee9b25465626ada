"""Models of the zoo by name: download, features and classes; and the README's snippets, which use them."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmpretrain
import numpy as np
import pytest
import timm
import torch
import yaml
from mmpretrain.models import ImageClassifier, MILANPretrainDecoder, VisionTransformer
from PIL import Image

import mmmilan
from helpers import FINE_TUNED, PRETRAINED, ROOT, assert_within
from mmmilan import cli
from mmmilan.checkpoints import zoo
from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.errors import InputError
from processes import serve_http

ARCH, WIDTH = 'deit-tiny', 192
SMALL = dict(_delete_=True, embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=96)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """Models of mmpretrain, and the folder ``host`` with their files as published. A ViT-Ti keeps the files small."""
    host = tmp_path_factory.mktemp('host')
    torch.manual_seed(0)
    vit = VisionTransformer(ARCH)
    for norm in (module for module in vit.modules() if isinstance(module, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.bias, std=0.1)  # else all norms are equal
    torch.nn.init.normal_(vit.pos_embed, std=0.5)
    decoder = MILANPretrainDecoder(embed_dim=WIDTH)
    classifier = ImageClassifier(
        dict(type='VisionTransformer', arch=ARCH, out_type='avg_featmap', final_norm=False),
        head=dict(type='LinearClsHead', num_classes=1000, in_channels=WIDTH),
    )
    classifier.backbone.load_state_dict(vit.state_dict(), strict=False)
    torch.nn.init.normal_(classifier.head.fc.weight)
    vit.eval()
    classifier.eval()
    milan = {f'backbone.{key}': value for key, value in vit.state_dict().items()}
    milan |= {f'neck.{key}': value for key, value in decoder.state_dict().items()}
    milan |= {'target_generator.tokenizer.visual.proj': torch.zeros(768, 512)}
    meta = dict(epoch=400, mmengine_version='0.3.1', seed=np.int64(0))
    urls, sha256 = {}, {}
    for name, weights in {PRETRAINED: milan, FINE_TUNED: classifier.state_dict()}.items():
        path = host / f'{name}.pth'
        torch.save(dict(meta=meta, state_dict=weights), path)
        sha256[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        urls[name] = f'{name}_20221129-{sha256[name][:8]}.pth'
        path.rename(host / urls[name])
    yield dict(vit=vit, classifier=classifier, host=host, urls=urls, sha256=sha256)
    shutil.rmtree(host)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    cache = tmp_path_factory.mktemp('cache')
    yield cache
    shutil.rmtree(cache)


@pytest.fixture
def published(sources, cache, tmp_path, monkeypatch):
    """The zoo publishes the two files of ``sources``, on a mirror on loopback."""
    root = tmp_path / 'zoo'
    root.mkdir()
    models = []
    for metafile in ('metafile.yml', 'benchmarks/metafile.yml'):
        models += yaml.safe_load((ROOT / 'configs' / 'milan' / metafile).read_text())['Models']
    for model in models:
        model['Config'] = str(ROOT / model['Config'])
        if model['Name'] in sources['urls']:
            head = f', head=dict(in_channels={WIDTH})' if model['Name'] == FINE_TUNED else ''
            (root / f'{model["Name"]}.py').write_text(
                f'_base_ = {model["Config"]!r}\nmodel = dict(backbone=dict(arch={ARCH!r}){head})\n'
            )
            model['Config'] = f'{model["Name"]}.py'
            model['Weights'] = f'https://download.openmmlab.com/{sources["urls"][model["Name"]]}'
            model['Metadata']['SHA256'] = sources['sha256'][model['Name']]
    (root / 'metafile.yml').write_text(yaml.safe_dump({'Models': models}))
    (root / 'model-index.yml').write_text('Import: [metafile.yml]')
    monkeypatch.setattr(zoo, 'zoo_root', lambda: root)
    monkeypatch.setenv('MMMILAN_CACHE', str(cache))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    zoo.zoo_models.cache_clear()
    assert len(zoo.find_model(PRETRAINED).sha256) == 64  # the whole hash is known, and so checked
    with serve_http(partial(QuietHandler, directory=sources['host'])) as server:
        monkeypatch.setenv('MMMILAN_MIRRORS', server.url)
        yield sources
    zoo.zoo_models.cache_clear()


@pytest.fixture(scope='module')
def image_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for name, size in {'cat': (300, 400), 'dog': (260, 250)}.items():
        image = cv2.resize(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8), size, interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f'{name}.png'), image)
    return [str(folder / 'cat.png'), str(folder / 'dog.png')]


def normalised(path: str) -> torch.Tensor:
    """The input that the models should see, by Pillow and NumPy alone."""
    image = Image.open(path).convert('RGB')
    scale = 256 / min(image.size)
    image = image.resize([int(side * scale + 0.5) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (int(round((side - 224) / 2)) for side in image.size)
    pixels = np.asarray(image, dtype=np.float32)[top : top + 224, left : left + 224]
    pixels = (pixels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    return torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None]


@torch.no_grad()
def test_features_of_a_published_checkpoint(published, image_files, capsys):
    """From the name to the features: mirror, hash, pipeline, encoder; the CLIP in the file is left out."""
    expected = torch.cat([published['vit'](normalised(path))[0] for path in image_files])
    extract = mmmilan.FeatureExtractor(PRETRAINED)
    assert published['urls'][PRETRAINED] in capsys.readouterr().err
    features = extract(image_files, batch_size=1)
    assert_within(features, expected)
    assert 'FeatureExtractor' in capsys.readouterr().err
    bgr = [cv2.imread(path) for path in image_files]
    read = extract.inputs
    seen = read(image_files[0])
    assert_within(seen, normalised(image_files[0]))
    for same in (Path(image_files[0]), bgr[0], Image.open(image_files[0]), bgr[:1], np.stack(bgr[:1])):
        assert torch.equal(read(same), seen)
    assert torch.equal(read(bgr * 2 + bgr[:1]), torch.cat([read(bgr)] * 2 + [seen]))


def test_features_of_every_type(image_files):
    model = mmmilan.get_model(PRETRAINED, backbone=dict(arch=SMALL))
    features = {
        out_type: mmmilan.FeatureExtractor(model, out_type=out_type)(image_files)
        for out_type in (None, 'raw', 'cls_token', 'featmap', 'avg_featmap')
    }
    tokens = features['raw']
    assert tokens.shape == (2, 197, 48) and not tokens.requires_grad
    assert torch.equal(features['cls_token'], tokens[:, 0])
    assert torch.equal(features[None], tokens[:, 0])  # out_type is each extractor's own; the model keeps its default
    assert torch.equal(features['featmap'], tokens[:, 1:].transpose(1, 2).unflatten(2, (14, 14)))
    assert_within(features['avg_featmap'], tokens[:, 1:].mean(1))


@torch.no_grad()
def test_classes_by_a_published_checkpoint(published, image_files):
    scores = torch.cat([published['classifier'](normalised(path)).softmax(1) for path in image_files])
    inferencer = mmmilan.ImageClassificationInferencer(FINE_TUNED)
    results = inferencer([image_files[0], cv2.imread(image_files[1])])
    assert_within(torch.from_numpy(np.stack([result['pred_scores'] for result in results])), scores)
    assert [result['pred_label'] for result in results] == scores.argmax(1).tolist()
    names = mmpretrain.datasets.ImageNet.METAINFO['classes']
    assert [result['pred_class'] for result in results] == [names[i] for i in scores.argmax(1)]
    theirs = mmpretrain.ImageClassificationInferencer(inferencer.model)(image_files)
    assert [result['pred_label'] for result in theirs] == scores.argmax(1).tolist()
    assert_within(torch.from_numpy(theirs[0]['pred_scores']), scores[0])


def test_errors_are_one_sentence(published, tmp_path, image_files):
    with pytest.raises(InputError, match="The zoo has no model 'resnet50'; choose one of mmmilan.list_models"):
        mmmilan.get_model('resnet50')
    with pytest.raises(InputError, match='No weights of milan_vit-large.* have been published'):
        mmmilan.get_model('milan_vit-large-p16_16xb256-amp-coslr-400e_in1k', pretrained=True)
    with pytest.raises(InputError, match='none.py is not a file'):
        mmmilan.get_model(tmp_path / 'none.py')
    # the pretrained encoder is no classifier
    with pytest.raises(InputError, match=r'does not hold all of ImageClassifier: missing .*head.fc'):
        mmmilan.get_model(FINE_TUNED, pretrained=PRETRAINED)
    model = mmmilan.get_model(PRETRAINED, backbone=dict(arch=SMALL))
    with pytest.raises(InputError, match='This model has no head that predicts classes; give one'):
        mmmilan.ImageClassificationInferencer(model)(image_files)
    with pytest.raises(InputError, match="out_type='pooled' is unknown"):
        mmmilan.FeatureExtractor(model, out_type='pooled')
    extract = mmmilan.FeatureExtractor(model)
    for images, message in [
        ('none.jpg', 'none.jpg is not a file'),
        ([], 'images is empty; give at least one'),
        (np.zeros((8, 8, 3), np.float32), 'float32 .* is not an image'),
        (np.zeros((8, 8), np.uint8), r'uint8 \[8, 8\] is not an image'),
    ]:
        with pytest.raises(InputError, match=message):
            extract(images)


CLOSED = Image.new('RGB', (8, 8))
CLOSED.close()


@pytest.mark.parametrize('kind', [mmmilan.FeatureExtractor, mmmilan.ImageClassificationInferencer])
@pytest.mark.parametrize(
    ('images', 'message'),
    [
        ('', "images='' names no file"),
        (['a.jpg', ' '], "images=' ' names no file"),
        (iter(()), 'images is empty'),
        ((), 'images is empty'),
        (np.zeros((0, 8, 8, 3), np.uint8), 'images is empty'),
        (np.array([]), r'An array of float64 \[0\] is not an image'),
        (None, 'images=None is not a list of images'),
        (3, 'images=3 is not a list'),
        (b'a.jpg', "images=b'a.jpg' is not a list"),
        (dict(path='a.jpg'), 'is not a list of images'),
        (torch.zeros(2, 3, 8, 8), 'images=<Tensor> is not a list of images'),
        ([torch.zeros(3, 8, 8)], 'images=<Tensor> is not an image; give a path, a PIL image'),
        ([np.zeros((8, 8, 3), np.uint8), None], r'images\[1\]=None is not an image'),
        ([['a.jpg']], 'is not an image'),
        (CLOSED, 'An image does not decode'),
        ([CLOSED], 'An image does not decode'),
    ],
)
def test_images_that_are_none(kind, images, message):
    reader = kind.__new__(kind)
    reader.model = SimpleNamespace(with_head=True, backbone=SimpleNamespace(out_type='raw'), data_preprocessor=None)
    reader.out_type, reader.prepare = 'raw', None
    with pytest.raises(InputError, match=message) as error:
        reader(images)
    assert '\n' not in str(error.value)


def test_iterables_of_images(image_files):
    """A generator, an array of paths, a set of one and one path give the features of a list."""
    extract = mmmilan.FeatureExtractor(mmmilan.get_model(PRETRAINED, backbone=dict(arch=SMALL)), device='cpu')
    expected = extract(list(image_files))
    for images in ((file for file in image_files), np.array([str(file) for file in image_files])):
        torch.testing.assert_close(extract(images), expected, rtol=0, atol=0)
    torch.testing.assert_close(extract({image_files[0]}), expected[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize('kind', [mmmilan.FeatureExtractor, mmmilan.ImageClassificationInferencer])
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(model=''), "model='' names no file"),
        (dict(model=None), 'model=None is no model'),
        (dict(model=torch.nn.Linear(1, 1)), 'is no model; give one of mmmilan.get_model'),
        (dict(model=PRETRAINED, device='gpu'), "device='gpu' is not a device of this machine"),
        (dict(model=PRETRAINED, device='cuda:99'), "device='cuda:99' is not a device"),
        (dict(model=PRETRAINED, pretrained=''), "pretrained='' names no file"),
        (dict(modle=PRETRAINED), 'takes no modle; the nearest name is model'),
    ],
)
def test_refused_models_and_devices(kind, options, message):
    with pytest.raises(InputError, match=message):
        kind(**options)


@pytest.mark.parametrize('size', [0, -1, 2.5, True, '8', None])
def test_refused_batch_sizes(size):
    with pytest.raises(InputError, match='batch_size='):
        mmmilan.FeatureExtractor.__new__(mmmilan.FeatureExtractor)('a.jpg', batch_size=size)


def test_whole_pretraining_model(clip_file):
    """With decoder and teacher, to continue pretraining; a small file replaces the published teacher."""
    teacher = dict(model=None, pretrained=clip_file, input_size=224)
    model = mmmilan.get_model(
        PRETRAINED, encoder_only=False, head=dict(teacher=teacher), neck=dict(predict_feature_dim=24, decoder_depth=1)
    )
    assert type(model).__name__ == 'MILAN' and model.neck.decoder_pred.out_features == 24


def snippets() -> list[tuple[str, str]]:
    """The code blocks of the README's section on use: (language, code)."""
    section = re.search(r'^## Use$(.*?)(?=^## |\Z)', (ROOT / 'README.md').read_text(), re.M | re.S)
    assert section, 'the README has no section "Use"'
    return re.findall(r'^```(\w+)\n(.*?)^```', section[1], re.M | re.S)


@pytest.mark.slow
def test_the_snippets_of_the_readme_work(published, image_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in image_files:
        Image.open(path).save(f'{Path(path).stem}.jpg')
    blocks, values = snippets(), {}
    assert [language for language, _ in blocks] == ['python', 'python']
    for _, code in blocks:
        exec(code, values)
    assert values['features'].shape == (2, WIDTH)
    assert values['results'][0]['pred_class'] in mmpretrain.datasets.ImageNet.METAINFO['classes']


@pytest.mark.slow
def test_commands_on_a_model_of_the_zoo(published, image_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, label in itertools.product(('train', 'val'), range(3)):
        (tmp_path / 'my_images' / split / str(label)).mkdir(parents=True)
        Image.open(image_files[0]).rotate(90 * label).save(tmp_path / 'my_images' / split / str(label) / 'cat.jpg')
    model = 'milan_vit-base-p16_16xb256-amp-coslr-400e_in1k'
    cli.main(['finetune', 'my_images', 'runs/mine', '--start', model, '--epochs', '1'])
    cli.main(['convert', model, 'vit.safetensors', '--to', 'timm', '--encoder-only'])
    before = published['vit'].state_dict()['layers.11.attn.proj.weight']
    after = load_checkpoint_file('runs/mine/epoch_1.pth')['state_dict']['backbone.layers.11.attn.proj.weight']
    assert 0 < (after - before).abs().max() < 0.01  # one step from the weights of the zoo
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=0)
    weights = load_checkpoint_file('vit.safetensors')['state_dict']
    vit.load_state_dict(weights, strict=True)
    assert torch.equal(weights['norm.bias'], published['vit'].ln1.bias)
    shutil.rmtree(tmp_path / 'runs')
