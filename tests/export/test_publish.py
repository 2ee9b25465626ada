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
from PIL import Image

import mmmilan
from helpers import rest_slow
from mmmilan.checkpoints.io import load_checkpoint_file

CLASSES = ('cat', 'dog', 'newt')
SHAPES = ((300, 200), (200, 300), (200, 500))  # width, height


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
    """Train and publish a small model; returns where the files are, and their parsed content."""
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


@pytest.fixture
def encoder(run_tool, trained, tmp_path) -> SimpleNamespace:
    """A published MILAN of ImageNet."""
    return publish(run_tool, trained, tmp_path, 'milan', '--url', 'https://example.com/')


def test_files_and_metadata_of_an_encoder(encoder, tmp_path):
    """Weights, their hash, and the numbers and origin in the metafile and on both cards."""
    sha256 = hashlib.sha256(encoder.path.read_bytes()).hexdigest()
    assert encoder.path.stem == f'milan-{sha256[:8]}'
    slim = load_checkpoint_file(encoder.path)
    assert set(slim) == {'state_dict', 'meta'} and set(slim['meta']) == {'epoch'}
    twin = load_checkpoint_file(encoder.path.with_suffix('.safetensors'))['state_dict']
    weights = load_checkpoint_file(tmp_path / 'milan.pth')['state_dict']
    assert slim['state_dict'].keys() == twin.keys() == weights.keys()
    assert all(torch.equal(twin[key], value) for key, value in weights.items())

    parameters = sum(value.numel() for value in weights.values())
    metadata = {'Parameters': parameters, 'SHA256': sha256, 'Epochs': 3, 'Training Data': 'ImageNet-1k'}
    assert encoder.entry['Metadata'] == metadata and encoder.entry['In Collection'] == 'MILAN'
    assert encoder.entry['Weights'] == f'https://example.com/{encoder.path.name}' and encoder.entry['Results'] is None
    assert encoder.entry['Config'] == f'{encoder.path.stem}.py'  # not the name of a config in the zoo
    assert modelindex.load(str(encoder.path.with_suffix('.yml'))).models[0].name == 'milan'
    assert 'Pretrained by MILAN: [MILAN: Masked Image' in encoder.card
    assert 'Training data: ImageNet-1k.' in encoder.card and 'Limitations: ' in encoder.card
    assert sha256 in encoder.card and f'{parameters:,} parameters' in encoder.card
    assert encoder.header == {
        'library_name': 'timm',
        'pipeline_tag': 'image-feature-extraction',
        'tags': ['milan'],
        'datasets': ['imagenet-1k'],
    }


def test_a_run_is_published_under_the_name_of_its_folder(run_tool, trained, tmp_path):
    """``pretrain`` writes config.py, which names nothing."""
    config, checkpoint = trained('milan')
    run = tmp_path / 'runs/photos'
    run.mkdir(parents=True)
    config.rename(run / 'config.py')
    run_tool('publish_model.py', run / 'config.py', checkpoint, tmp_path / 'out', '--hub-dir', tmp_path / 'hub')
    (path,) = (tmp_path / 'out').glob('*.pth')
    (entry,) = yaml.safe_load(path.with_suffix('.yml').read_text())['Models']
    assert path.name.startswith('photos-') and entry['Name'] == 'photos'
    assert '# photos' in (tmp_path / 'hub/README.md').read_text().splitlines()


def test_snippet_of_the_card_works_in_the_folder_of_the_files(encoder, tmp_path, images):
    """It gives the features of the trained model, as timm and transformers do. No file names a folder of its origin."""
    values = dict(__name__='snippet')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(encoder.path.parent)
        exec(snippets(encoder.card), values)
        ours = mmmilan.FeatureExtractor(values['model'])(images)
    assert str(tmp_path) not in encoder.card + encoder.hub_card + encoder.path.with_suffix('.py').read_text()
    assert torch.equal(ours, mmmilan.FeatureExtractor(tmp_path / 'milan.py', tmp_path / 'milan.pth')(images))
    assert_same_features(ours, encoder.hub, images, 'AutoModel')


def test_publishing_twice_gives_the_same_files(encoder, run_tool, tmp_path):
    before = {path.name: path.read_bytes() for path in encoder.path.parent.iterdir()}
    run_tool('publish_model.py', tmp_path / 'milan.py', tmp_path / 'milan.pth', tmp_path / 'again')
    again = {path.name: path.read_bytes() for path in (tmp_path / 'again').iterdir()}
    assert again.keys() == before.keys()
    assert all(again[name] == content for name, content in before.items() if not name.endswith('.yml'))  # has the URL


@torch.no_grad()
def test_classifier_of_own_data(run_tool, trained, tmp_path, images):
    """The card calls it a classifier with its class names, and does not claim training on ImageNet."""
    options = ('--metric', 'Top 1=81.5', '--dataset', 'Newts')
    published = publish(
        run_tool, trained, tmp_path, 'class-token', *options, classes=CLASSES, data_root='/data/newts/train'
    )
    assert published.header == {'library_name': 'timm', 'pipeline_tag': 'image-classification', 'tags': ['milan']}
    assert (
        'Training data: not stated.' in published.card
        and 'magenet' not in published.card.lower() + published.hub_card.lower()
    )
    assert 'Its encoder was pretrained by MILAN' in published.card and '| Top 1 (Newts) | 81.5 |' in published.card
    assert 'Training Data' not in published.entry['Metadata']
    assert published.entry['Results'] == [dict(Task='Image Classification', Dataset='Newts', Metrics={'Top 1': 81.5})]
    assert 'AutoModelForImageClassification' in published.hub_card and '/data/newts' not in published.hub_card
    results = mmmilan.ImageClassificationInferencer(str(published.path))(images)
    assert all(result['pred_class'] in CLASSES for result in results)
    ours = torch.from_numpy(np.stack([result['pred_scores'] for result in results]))
    theirs = assert_same_features(ours, published.hub, images, 'AutoModelForImageClassification', softmax=True)
    assert tuple(theirs.pretrained_cfg['label_names']) == CLASSES


def test_names_that_are_not_those_of_the_head(run_tool, trained, tmp_path):
    """They are refused, as by the commands, and nothing is written for the Hub."""
    config, checkpoint = trained('class-token', CLASSES)
    content = load_checkpoint_file(checkpoint)
    content['meta']['dataset_meta']['classes'] = CLASSES[:2]
    torch.save(content, checkpoint)
    with pytest.raises(SystemExit, match='names 2 classes, but its head has 3'):
        run_tool('publish_model.py', config, checkpoint, tmp_path / 'out', '--hub-dir', tmp_path / 'hub')
    assert not (tmp_path / 'hub').exists()


@torch.no_grad()
def test_classifier_that_sees_the_whole_short_side(run_tool, trained, tmp_path, images):
    """No border is cut off, as at 384 pixels. Transformers has no place for the mean token."""
    options = ('--training-data', 'Newts', '--name', 'newt')
    published = publish(run_tool, trained, tmp_path, 'mean-token-whole', *options, classes=CLASSES)
    assert published.entry['Name'] == 'newt' and published.entry['Metadata']['Training Data'] == 'Newts'
    assert 'datasets' not in published.header and 'transformers' not in published.hub_card
    assert not (published.hub / 'transformers.safetensors').exists()
    results = mmmilan.ImageClassificationInferencer(str(published.path))(images)
    ours = torch.from_numpy(np.stack([result['pred_scores'] for result in results]))
    theirs = assert_same_features(ours, published.hub, images, None, softmax=True)
    assert theirs.pretrained_cfg['crop_pct'] == 1.0


@torch.no_grad()
def test_rectangular_encoder(run_tool, trained, tmp_path, images):
    """Whole images resized to 32 x 48 pixels, whatever their proportions."""
    published = publish(run_tool, trained, tmp_path, 'milan', rectangle=True)
    ours = mmmilan.FeatureExtractor(str(published.path))(images)
    theirs = assert_same_features(ours, published.hub, images, 'AutoModel')
    assert theirs.patch_embed.img_size == (32, 48) and theirs.pretrained_cfg['input_size'] == (3, 32, 48)


@torch.no_grad()
@pytest.mark.parametrize('rectangle', rest_slow([False, True], True), ids=['square', 'rectangle'])
def test_image_text_model(run_tool, trained, tmp_path, images, rectangle):
    """MaskCLIP: the card names its paper and data, and open_clip gives the same embeddings."""
    import open_clip

    published = publish(run_tool, trained, tmp_path, 'maskclip', rectangle=rectangle)
    assert published.entry['In Collection'] == 'MaskCLIP' and published.entry['Metadata']['Training Data'] == 'YFCC15M'
    assert 'arxiv.org/abs/2208.12262' in published.card and '2208.06049' not in published.card
    assert published.header == {
        'library_name': 'open_clip',
        'pipeline_tag': 'zero-shot-image-classification',
        'tags': ['maskclip'],
    }
    ours = mmmilan.get_model(published.path, encoder_only=False)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{published.hub}')
    theirs.eval()
    extract = mmmilan.FeatureExtractor(mmmilan.get_model(published.path))
    seen_images = extract.inputs(images)
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


@pytest.mark.parametrize('metric', ['85.4', '=85.4', ' =85.4', 'Top 1=', 'Top 1=high', 'Top 1', 'Top 1=nan'])
def test_metrics_that_are_no_name_and_value(run_tool, trained, tmp_path, metric):
    with pytest.raises(SystemExit, match=f'error: --metric {metric} is not NAME=VALUE; give'):
        run_tool('publish_model.py', *trained('milan'), tmp_path / 'out', '--metric', metric, '--dataset', 'Newts')
    assert not (tmp_path / 'out').exists()


def test_metric_without_data_set(run_tool, trained, tmp_path):
    with pytest.raises(SystemExit, match='error: --metric needs its data set; name it with --dataset.'):
        run_tool('publish_model.py', *trained('milan'), tmp_path / 'out', '--metric', 'Top 1=81.5')
