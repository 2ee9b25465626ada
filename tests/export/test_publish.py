"""tools/publish_model.py: its files are true, and other libraries prepare images and compute features as we do."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import modelindex
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from mmengine.config import Config
from PIL import Image

import mmmilan
from helpers import ROOT
from mmmilan.checkpoints.io import load_checkpoint_file, save_checkpoint_file
from mmmilan.checkpoints.zoo import find_model
from mmmilan.errors import InputError
from mmmilan.export.preprocessing import Preprocessing, read_preprocessing

PRETRAINED = 'milan_vit-base-p16_16xb256-amp-coslr-400e_in1k'
FINE_TUNED = 'vit-base-p16_milan-pre_8xb128-coslr-100e_in1k'
CONFIGS = {
    'milan': find_model(PRETRAINED).config,
    'class-token': find_model(FINE_TUNED).config,
    'mean-token-whole': find_model(FINE_TUNED).config,  # evaluated on the whole short side, as at 384 pixels
    'maskclip': ROOT / 'configs/maskclip/maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py',
}
SMALL = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=96)
CLASSES = ('cat', 'dog', 'newt')
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SHAPES = ((300, 200), (200, 300), (200, 500))  # width, height


@pytest.fixture
def trained(tmp_path):
    """Writes config and checkpoint of a small model as training leaves them."""

    def write(kind: str, data_root: str | None = None, rectangle: bool = False) -> tuple[Path, Path]:
        config = Config.fromfile(CONFIGS[kind])
        size, patches = ((32, 48), (4, 6)) if rectangle else (32, 16)
        config.model.backbone.update(arch=SMALL, img_size=size, patch_size=8)
        if kind == 'milan':
            config.model.neck.update(num_patches=patches, embed_dim=48, decoder_depth=1)
        elif kind == 'maskclip':
            neck = dict(num_patches=patches, embed_dim=48, decoder_embed_dim=16, decoder_num_heads=2)
            config.model.neck.update(neck, predict_feature_dim=48)
            config.model.update(
                embed_dim=24, text=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
            )
            config.model.head.update(feature_dim=48, num_codewords=16)
            config.model.language.update(decoder_num_heads=2)
        else:
            config.model.head.update(num_classes=3, in_channels=48)
        if kind == 'class-token':
            config.model.backbone.update(out_type='cls_token', final_norm=True)
            config.model.head = dict(type='VisionTransformerClsHead', num_classes=3, in_channels=48)
        pipeline = config.test_dataloader.dataset.pipeline
        resize, crop = pipeline[1:3]
        resize.scale, crop.crop_size = 32 if kind in ('maskclip', 'mean-token-whole') else 36, 32
        if rectangle:
            pipeline[1:3] = [dict(type='Resize', scale=(48, 32), backend='pillow', interpolation='bicubic')]
        config.train_dataloader.dataset.data_root = data_root or config.train_dataloader.dataset.data_root
        path = tmp_path / f'{kind}.py'
        config.dump(path)
        model = mmmilan.get_model(path, encoder_only=kind == 'milan')
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2 + 0.1
        meta = dict(epoch=3, cfg=config.pretty_text)
        if model.__class__.__name__ == 'ImageClassifier' and model.with_head:
            meta['dataset_meta'] = dict(classes=CLASSES)
        checkpoint = dict(state_dict=model.state_dict(), meta=meta, optimizer=dict(state={0: torch.zeros(1000)}))
        save_checkpoint_file(checkpoint, tmp_path / f'{kind}.pth')
        return path, tmp_path / f'{kind}.pth'

    return write


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Smooth images that are not square."""
    paths = []
    for i, size in enumerate(SHAPES):
        pixels = np.random.default_rng(i).integers(0, 255, (5, 7, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f'{i}.png'), cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC))
        paths.append(str(tmp_path / f'{i}.png'))
    return paths


def publish(run_tool, trained, tmp_path, kind: str, *options: str, **settings) -> SimpleNamespace:
    config, checkpoint = trained(kind, **settings)
    run_tool('publish_model.py', config, checkpoint, tmp_path / 'out', '--hub-dir', tmp_path / 'hub', *options)
    (path,) = (tmp_path / 'out').glob('*.pth')
    card = path.with_suffix('.md').read_text()
    hub_card = (tmp_path / 'hub/README.md').read_text()
    (entry,) = yaml.safe_load(path.with_suffix('.yml').read_text())['Models']
    header = yaml.safe_load(hub_card.split('---')[1])
    return SimpleNamespace(path=path, card=card, entry=entry, header=header, hub_card=hub_card, hub=tmp_path / 'hub')


def snippets(card: str) -> str:
    return '\n'.join(re.findall(r'```python\n(.*?)```', card, re.S))


def test_encoder(run_tool, trained, tmp_path, images):
    """MILAN on ImageNet: content and hashes of the files."""
    seen = publish(run_tool, trained, tmp_path, 'milan', '--url', 'https://example.com/')
    sha256 = hashlib.sha256(seen.path.read_bytes()).hexdigest()
    assert seen.path.stem == f'milan-{sha256[:8]}'
    slim = load_checkpoint_file(seen.path)
    assert set(slim) == {'state_dict', 'meta'} and set(slim['meta']) == {'epoch'}
    twin = load_checkpoint_file(seen.path.with_suffix('.safetensors'))['state_dict']
    trained_weights = load_checkpoint_file(tmp_path / 'milan.pth')['state_dict']
    assert slim['state_dict'].keys() == twin.keys() == trained_weights.keys()
    assert all(torch.equal(twin[key], value) for key, value in trained_weights.items())

    parameters = sum(value.numel() for value in trained_weights.values())
    metadata = {'Parameters': parameters, 'SHA256': sha256, 'Epochs': 3, 'Training Data': 'ImageNet-1k'}
    assert seen.entry['Metadata'] == metadata and seen.entry['In Collection'] == 'MILAN'
    assert seen.entry['Weights'] == f'https://example.com/{seen.path.name}' and seen.entry['Results'] is None
    assert seen.entry['Config'] == f'{seen.path.stem}.py'  # not the name of a config in the zoo
    assert modelindex.load(str(seen.path.with_suffix('.yml'))).models[0].name == 'milan'
    assert 'Pretrained by MILAN: [MILAN: Masked Image' in seen.card and 'Training data: ImageNet-1k.' in seen.card
    assert sha256 in seen.card and f'{parameters:,} parameters' in seen.card
    assert seen.header == {
        'library_name': 'timm',
        'pipeline_tag': 'image-feature-extraction',
        'tags': ['milan'],
        'datasets': ['imagenet-1k'],
    }
    # the card's snippet works in the folder of the files, and no file names a folder of this machine
    values = dict(__name__='snippet')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(seen.path.parent)
        exec(snippets(seen.card), values)
        ours = mmmilan.FeatureExtractor(values['model'])(images)
    assert str(tmp_path) not in seen.card + seen.hub_card + seen.path.with_suffix('.py').read_text()
    assert torch.equal(ours, mmmilan.FeatureExtractor(tmp_path / 'milan.py', tmp_path / 'milan.pth')(images))
    assert_same_features(ours, seen.hub, images, 'AutoModel')

    before = {path.name: path.read_bytes() for path in seen.path.parent.iterdir()}  # publishing again changes nothing
    run_tool('publish_model.py', tmp_path / 'milan.py', tmp_path / 'milan.pth', tmp_path / 'again')
    again = {path.name: path.read_bytes() for path in (tmp_path / 'again').iterdir()}
    assert again.keys() == before.keys()
    assert all(again[name] == content for name, content in before.items() if not name.endswith('.yml'))  # has the URL


@torch.no_grad()
def test_classifier_of_own_data(run_tool, trained, tmp_path, images):
    """The card calls it a classifier with its class names, and does not claim training on ImageNet."""
    options = ('--metric', 'Top 1=81.5', '--dataset', 'Newts')
    seen = publish(run_tool, trained, tmp_path, 'class-token', *options, data_root='/data/newts/train')
    assert seen.header == {'library_name': 'timm', 'pipeline_tag': 'image-classification', 'tags': ['milan']}
    assert 'Training data: not stated.' in seen.card and 'magenet' not in seen.card.lower() + seen.hub_card.lower()
    assert 'Its encoder was pretrained by MILAN' in seen.card and '| Top 1 (Newts) | 81.5 |' in seen.card
    assert 'Training Data' not in seen.entry['Metadata']
    assert seen.entry['Results'] == [dict(Task='Image Classification', Dataset='Newts', Metrics={'Top 1': 81.5})]
    assert 'AutoModelForImageClassification' in seen.hub_card and '/data/newts' not in seen.hub_card
    results = mmmilan.ImageClassificationInferencer(str(seen.path))(images)
    assert all(result['pred_class'] in CLASSES for result in results)
    ours = torch.from_numpy(np.stack([result['pred_scores'] for result in results]))
    theirs = assert_same_features(ours, seen.hub, images, 'AutoModelForImageClassification', softmax=True)
    assert tuple(theirs.pretrained_cfg['label_names']) == CLASSES


@torch.no_grad()
def test_classifier_that_sees_the_whole_short_side(run_tool, trained, tmp_path, images):
    """No border is cut off, as at 384 pixels. Transformers has no place for the mean token."""
    seen = publish(run_tool, trained, tmp_path, 'mean-token-whole', '--training-data', 'Newts', '--name', 'newt')
    assert seen.entry['Name'] == 'newt' and seen.entry['Metadata']['Training Data'] == 'Newts'
    assert 'datasets' not in seen.header and 'transformers' not in seen.hub_card
    assert not (seen.hub / 'transformers.safetensors').exists()
    results = mmmilan.ImageClassificationInferencer(str(seen.path))(images)
    ours = torch.from_numpy(np.stack([result['pred_scores'] for result in results]))
    theirs = assert_same_features(ours, seen.hub, images, None, softmax=True)
    assert theirs.pretrained_cfg['crop_pct'] == 1.0


@torch.no_grad()
def test_rectangular_encoder(run_tool, trained, tmp_path, images):
    """Whole images resized to 32 x 48 pixels, whatever their proportions."""
    seen = publish(run_tool, trained, tmp_path, 'milan', rectangle=True)
    ours = mmmilan.FeatureExtractor(str(seen.path))(images)
    theirs = assert_same_features(ours, seen.hub, images, 'AutoModel')
    assert theirs.patch_embed.img_size == (32, 48) and theirs.pretrained_cfg['input_size'] == (3, 32, 48)


@torch.no_grad()
@pytest.mark.parametrize('rectangle', [False, True], ids=['square', 'rectangle'])
def test_image_text_model(run_tool, trained, tmp_path, images, rectangle):
    """MaskCLIP: the card names its paper and data, and open_clip gives the same embeddings."""
    import open_clip

    seen = publish(run_tool, trained, tmp_path, 'maskclip', rectangle=rectangle)
    assert seen.entry['In Collection'] == 'MaskCLIP' and seen.entry['Metadata']['Training Data'] == 'YFCC15M'
    assert 'arxiv.org/abs/2208.12262' in seen.card and '2208.06049' not in seen.card
    assert seen.header == {
        'library_name': 'open_clip',
        'pipeline_tag': 'zero-shot-image-classification',
        'tags': ['maskclip'],
    }
    ours = mmmilan.get_model(seen.path, encoder_only=False)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{seen.hub}')
    theirs.eval()
    extract = mmmilan.FeatureExtractor(mmmilan.get_model(seen.path))
    seen_images = torch.cat(list(extract.batches(images, 1)))
    expected = F.normalize(ours.encode_image(seen_images), dim=1)
    actual = F.normalize(theirs.encode_image(torch.stack([preprocess(Image.open(path)) for path in images])), dim=1)
    assert_alike(actual, expected)


def assert_same_features(
    ours: torch.Tensor, hub: Path, paths: list[str], auto: str | None, softmax: bool = False
) -> torch.nn.Module:
    """timm, and transformers by its class ``auto``, give ``ours``, each with its own transforms. Returns timm's."""
    import timm
    import transformers

    images = [Image.open(path).convert('RGB') for path in paths]
    model = timm.create_model(f'local-dir:{hub}', pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        theirs = model(torch.stack([prepare(image) for image in images]))
        assert_alike(theirs.softmax(1) if softmax else theirs, ours)
        if auto:
            processor = transformers.AutoImageProcessor.from_pretrained(hub)
            options = {} if softmax else dict(add_pooling_layer=False)
            other = getattr(transformers, auto).from_pretrained(hub, **options).eval()
            outputs = other(**processor(images, return_tensors='pt'))
            assert_alike(outputs.logits.softmax(1) if softmax else outputs.last_hidden_state[:, 0], ours)
            if softmax:
                assert [other.config.id2label[i] for i in range(3)] == list(CLASSES)
    return model


def assert_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Errors are below a thousandth of the smallest distance between two images."""
    assert (actual - expected).norm(dim=1).max() < 1e-3 * torch.pdist(expected).min()


def test_metric_without_data_set(run_tool, trained, tmp_path):
    with pytest.raises(SystemExit, match='error: --metric needs its data set; name it with --dataset.'):
        run_tool('publish_model.py', *trained('milan'), tmp_path / 'out', '--metric', 'Top 1=81.5')


@pytest.mark.parametrize(('resize', 'size'), [(256, 224), (384, 384), (438, 384), (232, 224), (235, 192)])
def test_timms_crop_gives_the_same_short_side(resize, size):
    settings = Preprocessing(resize, (size, size), 'bicubic', [0.5] * 3, [0.5] * 3).timm()
    assert int(size / settings['crop_pct']) == resize


def test_pipelines_that_other_libraries_cannot_express(trained):
    config, _ = trained('milan')
    model = mmmilan.get_model(config)
    pipeline = model._config.test_dataloader.dataset.pipeline
    pipeline[2].crop_size = 24
    with pytest.raises(InputError, match=r'gives images of \(24, 24\) but img_size=\(32, 32\); make them equal'):
        read_preprocessing(model._config, model)
    pipeline[1:3] = [dict(type='Resize', scale=(32, 32), interpolation='area')]
    assert read_preprocessing(model._config, model) == Preprocessing(None, (32, 32), 'bilinear', MEAN, STD)
    pipeline[1]['interpolation'] = 'lanczos'
    with pytest.raises(InputError, match="The interpolation 'lanczos' of the test pipeline cannot be told"):
        read_preprocessing(model._config, model)
    pipeline[1:2] = [dict(type='RandomCrop', crop_size=32)]
    with pytest.raises(InputError, match=r'The test pipeline \(LoadImage, RandomCrop, PackInputs\) cannot be told'):
        read_preprocessing(model._config, model)


def test_crops_that_other_libraries_cannot_express():
    with pytest.raises(InputError, match='timm cannot be told to resize the short side and crop 32 x 48 pixels; give'):
        Preprocessing(64, (32, 48), 'bicubic', MEAN, STD).timm()
    with pytest.raises(InputError, match='open_clip cannot be told to resize the short side and crop 32 x 48 pixels'):
        Preprocessing(32, (32, 48), 'bicubic', MEAN, STD).open_clip()
    with pytest.raises(InputError, match='resizes the short side to 32 pixels .* the test pipeline to 36; set the sc'):
        Preprocessing(36, (32, 32), 'bicubic', MEAN, STD).open_clip()
    with pytest.raises(InputError, match="open_clip has no interpolation 'nearest'"):
        Preprocessing(32, (32, 32), 'nearest', MEAN, STD).open_clip()
