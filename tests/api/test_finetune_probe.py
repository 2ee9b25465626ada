"""A classifier's head that begins as the linear probe of its frozen start."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain.models import VisionTransformer
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import mmmilan
from helpers import HERE
from mmmilan.api.finetune_probe import begin_as_probe, fit_probe
from mmmilan.api.finetune_recipe import new_config
from mmmilan.datasets.split_file import write_labelled
from mmmilan.errors import InputError

ARCH = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    torch.manual_seed(0)
    vit = VisionTransformer(ARCH, img_size=32, patch_size=8)
    path = tmp_path_factory.mktemp('start') / 'encoder.pth'
    arch = f'dict({", ".join(f"{key}={value}" for key, value in ARCH.items())})'
    cfg = f"model = dict(type='ImageClassifier', backbone=dict(type='VisionTransformer', arch={arch}, img_size=32))"
    torch.save(dict(meta=dict(cfg=cfg), state_dict=vit.state_dict()), path)
    return str(path)


@pytest.fixture
def noisy(tmp_path):
    """Images of three overlapping colours, so that no probe is perfect."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(('ant', 'bee', 'cat')):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for number in range(30):
            colour = np.clip(rng.normal([90 + 40 * label, 128, 150 - 30 * label], 40), 0, 255)
            pixels = np.broadcast_to(colour, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'data' / name / f'{number}.png')
    return tmp_path / 'data'


def begun(data, folder, start: str) -> tuple[Config, dict[str, float]]:
    config, labelled = new_config(folder, dict(data=data), start=start, epochs=1, batch_size=8)
    config.val_dataloader.num_workers = 0
    write_labelled(labelled, folder)
    return config, begin_as_probe(config, folder)


@pytest.mark.slow
def test_the_untrained_model_is_the_probe(noisy, start, tmp_path):
    """What the head begins as gets as many images right as scikit-learn's classifier on the encoder's features."""
    config, frozen = begun(noisy, tmp_path / 'run', start)
    (name, accuracy) = next(iter(frozen.items()))
    token = {'class token': 'cls_token', 'mean token': 'avg_featmap'}[name.removeprefix('linear probe on the ')]
    assert config.model.backbone.out_type == token and 1 / 3 < accuracy < 1
    weights = mmmilan.finetune(noisy, tmp_path / 'run', start=start, epochs=1, batch_size=8, lr=1e-12, **HERE)
    model = mmmilan.get_model(weights).eval()
    right, paths = [], mmmilan.datasets.LabelledImages(str(tmp_path / 'run/split.json'), 'val').load_data_list()
    for each in paths:
        pixels = torch.from_numpy(np.array(Image.open(each['img_path']))).permute(2, 0, 1)[None].float()
        mean, std = (torch.tensor(config.model.data_preprocessor[key])[None, :, None, None] for key in ('mean', 'std'))
        with torch.no_grad():
            scores = model.head.fc(model.backbone((pixels - mean) / std)[-1])
        right.append(scores.argmax().item() == each['gt_label'])
    assert np.mean(right) == pytest.approx(accuracy)


@pytest.mark.parametrize('classes', [2, 3])
def test_the_folded_probe_is_that_of_scikit_learn(classes):
    rng = np.random.default_rng(0)
    labels = np.arange(120) % classes
    features = rng.normal(5 + labels[:, None] * rng.random(6), 3, (120, 6)) * np.logspace(-1, 2, 6)
    probe = fit_probe('cls_token', (features, labels), classes)
    logits = features @ probe.weight.T + probe.bias
    assert logits.shape == (120, classes)
    scaler = StandardScaler().fit(features)
    errors = []
    for strength in (1e-3, 1e-2, 1e-1, 1):
        other = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(features), labels)
        shares = torch.tensor(logits).softmax(1).numpy()
        errors.append(np.abs(shares - other.predict_proba(scaler.transform(features))).max())
    assert min(errors) < 1e-3


@pytest.mark.parametrize('counts', [(1, 1), (2, 1), (9, 1, 1), (1, 1, 1)])
def test_classes_of_one_image(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    features = np.eye(len(counts))[labels] + np.random.default_rng(0).normal(0, 0.01, (len(labels), len(counts)))
    probe = fit_probe('cls_token', (features, labels), len(counts))
    assert probe.accuracy((features, labels)) >= max(counts) / sum(counts)


@pytest.mark.parametrize('seen', [(0, 2), (1, 2, 4)])
def test_classes_without_images(seen):
    """They have their place in the head, and are predicted nowhere."""
    rng, labels = np.random.default_rng(0), np.repeat(seen, 10)
    features = np.eye(5)[labels] + rng.normal(0, 0.01, (len(labels), 5))
    probe = fit_probe('cls_token', (features, labels), 6)
    assert probe.weight.shape == (6, 5) and probe.accuracy((features, labels)) == 1
    logits = (features + rng.normal(0, 9, features.shape)) @ probe.weight.T + probe.bias
    assert set(logits.argmax(1)) == set(seen)
    shares = torch.tensor(logits).softmax(1)[:, sorted(set(range(6)) - set(seen))]
    assert 0 < shares.max() < 1 / len(labels)


def test_an_empty_folder_of_a_class(noisy, start, tmp_path):
    (noisy / 'arm').mkdir()
    config, _ = begun(noisy, tmp_path / 'run', start)
    assert config.model.head.num_classes == 4
    weight = torch.load(tmp_path / 'run/probe.pth', weights_only=False)['state_dict']['head.fc.weight']
    assert weight.any(1).tolist() == [True, False, True, True]


def test_random_weights_and_files_of_others(noisy, start, tmp_path):
    (tmp_path / 'run').mkdir()
    torch.save(dict(state_dict={}), tmp_path / 'run/probe.pth')
    with pytest.raises(InputError, match=r'probe.pth is not a probe of mmmilan'):
        begun(noisy, tmp_path / 'run', start)
    config, _ = new_config(tmp_path / 'run', dict(data=noisy), arch=ARCH, patch_size=8, img_size=32)
    assert begin_as_probe(config, tmp_path / 'run') == {}
