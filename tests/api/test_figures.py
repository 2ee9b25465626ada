"""The paper's figures from checkpoints of several kinds."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmpretrain.models import VisionTransformer

from helpers import ROOT
from mmmilan.api.figures import figures, load_compared_model, sample_classes
from mmmilan.checkpoints.layouts import convert
from mmmilan.cli import main
from mmmilan.errors import InputError
from mmmilan.models.vit import last_attention
from mmmilan.registry import MODELS
from mmmilan.teachers.base import IMAGENET_MEAN, IMAGENET_STD
from mmmilan.visualization.pictures import draw_tsne


@pytest.fixture
def models(tiny_config, tmp_path) -> tuple[str, dict[str, Path]]:
    """A config, and four files: a pretraining checkpoint, and encoders in the layouts of MAE, mmpretrain and timm."""
    config = tiny_config()
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    files = {name: tmp_path / f'{name}.pth' for name in ('milan', 'mae', 'openmmlab', 'timm')}
    weights = model.state_dict()
    torch.save(dict(state_dict=weights), files['milan'])
    for name, to in (('mae', 'official'), ('openmmlab', 'openmmlab'), ('timm', 'timm')):
        torch.manual_seed(len(name))
        model.backbone.init_weights()
        encoder = {f'backbone.{key}': value for key, value in model.backbone.state_dict().items()}
        torch.save(dict(model=convert(encoder, to, encoder_only=True)), files[name])
    return str(config), files


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_all_figures(models, image_folder, tmp_path):
    """The command writes the same files twice, whatever the time and the state of the random generators."""
    config, files = models
    names = [str(files['milan']), 'teacher']
    for out in ('a', 'b'):
        torch.manual_seed(len(out))
        main(['figures', str(image_folder), *names, str(tmp_path / out), '--config', config, '--seed', '3'])
    written = digest(tmp_path / 'a')
    expected = {f'figure{i}{ending}' for i in (2, 3, 4, 5) for ending in ('.png', '.pdf')} | {'index.html'}
    assert set(written) == expected and digest(tmp_path / 'b') == written
    for i in (2, 3, 4, 5):
        assert cv2.imread(str(tmp_path / f'a/figure{i}.png')).std() > 10, i
        assert (tmp_path / f'a/figure{i}.pdf').read_bytes().startswith(b'%PDF')
    page = (tmp_path / 'a/index.html').read_text()
    assert page.count('<img alt="') == 4 and 'silhouette' in page and 'Left out' not in page
    assert 'milan, teacher' in page
    assert not re.search(r'(src|href)="(?!data:|#|https)', page)


@pytest.mark.slow
def test_a_teacher_that_has_moved(models, image_folder, tmp_path):
    config, files = models
    teacher = Path(Config.fromfile(config).model.head.teacher.pretrained)
    teacher = teacher.rename(tmp_path / 'moved.pt')
    with pytest.raises(InputError, match='--teacher'):
        figures(image_folder, [files['milan'], 'teacher'], tmp_path / 'a', config=config)
    page = figures(image_folder, [files['milan'], 'teacher'], tmp_path / 'b', config=config, teacher=teacher)
    assert 'Left out' not in page.read_text() and len(digest(tmp_path / 'b')) == 9


@torch.no_grad()
def test_features_and_attention_of_an_encoder(models):
    """Class token and attention are those of timm's ViT with the same weights."""
    config, files = models
    images = torch.randn(2, 3, 64, 64)
    features, attention = load_compared_model(config, str(files['timm']), 'cpu')(images)
    vit = timm.create_model(
        'vit_tiny_patch16_224', img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=0
    ).eval()
    vit.load_state_dict(torch.load(files['timm'])['model'])
    vit.blocks[-1].attn.fused_attn = False
    seen = []
    vit.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = vit.forward_features(images)
    assert torch.allclose(features, tokens[:, 0], atol=1e-4)
    assert torch.allclose(attention, seen[0].mean(1)[:, 0, 1:], atol=1e-5)
    own = load_compared_model(config, str(files['milan']), 'cpu')
    assert torch.allclose(own(images)[1], last_attention(own.backbone, images), atol=1e-6)


@torch.no_grad()
def test_layouts_are_the_same_model(models):
    """Files of one encoder in the layouts of MAE, mmpretrain and timm give the same output."""
    config, files = models
    weights = load_compared_model(config, str(files['timm']), 'cpu').backbone.state_dict()
    weights = {f'backbone.{key}': value for key, value in weights.items()}
    images = torch.randn(2, 3, 64, 64)
    expected = load_compared_model(config, str(files['timm']), 'cpu')(images)
    for name, to in (('mae', 'official'), ('openmmlab', 'openmmlab')):
        assert not torch.equal(load_compared_model(config, str(files[name]), 'cpu')(images)[0], expected[0])
        torch.save(dict(model=convert(weights, to, encoder_only=True)), files[name])
        features, attention = load_compared_model(config, str(files[name]), 'cpu')(images)
        assert torch.equal(features, expected[0]) and torch.equal(attention, expected[1])


@torch.no_grad()
def test_other_sources(models, clip_file):
    config, _ = models
    images = torch.randn(2, 3, 64, 64)
    teacher = MODELS.build(Config.fromfile(config).model.head.teacher)
    features, importance = teacher(images)
    drawn = load_compared_model(config, 'teacher', 'cpu')(images)
    assert torch.equal(drawn[0], features[:, 0]) and torch.equal(drawn[1], importance)
    drawn = load_compared_model(config, clip_file, 'cpu')(images)  # sees its own pixels, the config's teacher does not
    teacher.teacher_mean_std = 'own'
    teacher.take_images(IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(drawn[0], teacher(images)[0][:, 0]) and not torch.equal(drawn[0], features[:, 0])
    with pytest.raises(InputError, match='The teacher timm:vit_of_nobody is unknown'):
        load_compared_model(config, 'timm:vit_of_nobody', 'cpu')
    with pytest.raises(InputError, match='The teacher open_clip:ViT-Z:openai is unknown'):
        load_compared_model(config, 'open_clip:ViT-Z:openai', 'cpu')


def test_mean_of_patch_tokens_where_it_was_trained(tiny_config, tmp_path):
    """A fine-tuned ViT of mmpretrain: the input of its linear head is the normed mean of the patch tokens."""
    arch = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=192)
    cfg = Config.fromfile(tiny_config())
    backbone = dict(type='VisionTransformer', arch=arch, img_size=64, out_type='avg_featmap', final_norm=False)
    cfg.model = dict(type='ImageClassifier', backbone=backbone)
    cfg.dump(tmp_path / 'finetuned.py')
    vit = VisionTransformer(**{key: value for key, value in backbone.items() if key != 'type'})
    vit.init_weights()
    torch.nn.init.normal_(vit.ln2.weight)
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in vit.state_dict().items()}), tmp_path / 'finetuned.pth')
    vit.eval()
    images = torch.randn(2, 3, 64, 64)
    source = load_compared_model(str(tmp_path / 'finetuned.py'), str(tmp_path / 'finetuned.pth'), 'cpu')
    assert torch.allclose(source(images)[0], vit(images)[-1], atol=1e-5)


def test_silhouette():
    """It is near 1 for two tight classes and near 0 for one cloud; t-SNE does not change it."""
    labels = np.arange(40) % 2
    tight = np.eye(8)[labels] + 1e-3 * np.random.default_rng(0).normal(size=(40, 8))
    figure = draw_tsne({'tight': tight, 'cloud': np.random.default_rng(1).normal(size=(40, 8))}, labels, ['a', 'b'])
    scores = [float(axes.get_xlabel().split()[-1]) for axes in figure.axes]
    assert scores[0] > 0.99 and abs(scores[1]) < 0.1


def test_classes_are_sampled():
    labels = np.repeat(np.arange(30), 10)
    chosen = sample_classes(labels, 20, 4, np.random.default_rng(5))
    assert len(chosen) == 80 and (np.unique(labels[chosen], return_counts=True)[1] == 4).all()
    assert not np.array_equal(chosen, sample_classes(labels, 20, 4, np.random.default_rng(6)))


def test_without_classes_or_decoder(models, image_folder, tmp_path, log):
    """A flat folder has no figure 2, an encoder alone no figure 5; the page and the log say so."""
    config, files = models
    flat = tmp_path / 'flat'
    flat.mkdir()
    for i in range(3):
        (flat / f'{i}.jpg').write_bytes(next(image_folder.rglob(f'{i}.jpg')).read_bytes())
    path = figures(flat, files['timm'], tmp_path / 'out', config=config)
    assert set(digest(tmp_path / 'out')) == {'figure3.png', 'figure3.pdf', 'index.html'}
    for text in ('Figure 2 is left out', 'Figure 5 is left out: no checkpoint has its decoder'):
        assert text in path.read_text() and text in log.text


def test_what_cannot_be_drawn(models, image_folder, tmp_path):
    config, files = models

    def error(*checkpoints, images=image_folder) -> str:
        with pytest.raises(InputError) as caught:
            figures(images, checkpoints, tmp_path / 'out', config=config)
        return str(caught.value)

    assert error() == 'checkpoints is empty; give at least one.'
    assert 'nowhere does not exist' in error(str(files['mae']), images=tmp_path / 'nowhere')
    assert 'is neither a file nor a URL nor a model of the zoo' in error('nothing')
    assert 'is named twice' in error(str(files['mae']), str(files['mae']))
    (tmp_path / 'clip-only.pth').write_bytes(b'')
    assert 'clip-only.pth' in error(str(tmp_path / 'clip-only.pth'))


def test_one_image_a_class():
    features = np.eye(4, dtype=np.float32)
    for labels, has_silhouette in (([0, 1, 2, 3], False), ([0, 0, 1, 2], True)):
        figure = draw_tsne(dict(ours=features + 0.1), np.array(labels), list('abcd')[: max(labels) + 1])
        assert ('silhouette' in figure.axes[0].get_xlabel()) == has_silhouette


def save_with_config(config: Config, path: Path) -> str:
    """A checkpoint of random weights, with its config in it."""
    model = MODELS.build(config.model)
    torch.save(dict(meta=dict(cfg=config.pretty_text), state_dict=model.state_dict()), path)
    return str(path)


@pytest.fixture
def paper_four(tiny_config, benchmark_config, tmp_path) -> dict[str, str]:
    """The models of the paper's figure 2: MAE in its own layout, CLIP, MILAN, and MILAN fine-tuned."""
    config = Config.fromfile(tiny_config())
    folder = tmp_path / 'checkpoints'
    folder.mkdir()
    milan = save_with_config(config, folder / 'milan.pth')
    encoder = {k: v for k, v in torch.load(milan)['state_dict'].items() if k.startswith('backbone.')}
    torch.save(dict(model=convert(encoder, 'official', encoder_only=True)), folder / 'mae.pth')
    finetuning = Config.fromfile(benchmark_config('vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'))
    finetuning.model.data_preprocessor.update(mean=[127.5] * 3, std=[127.5] * 3)
    return dict(
        mae=str(folder / 'mae.pth'),
        teacher='teacher',
        milan=milan,
        finetuned=save_with_config(finetuning, folder / 'finetuned.pth'),
    )


@pytest.mark.slow
def test_the_four_models_of_figure_2(paper_four, image_folder, tmp_path):
    """Each brings its own norm and head, whichever is first, and the images as it was trained with them."""
    names = list(paper_four.values())
    page = figures(image_folder, names, tmp_path / 'out').read_text()
    assert page.count('<img alt="') == 4 and 'mae, teacher, milan, finetuned' in page
    assert 'Figure 5: what milan sees' in page
    images = torch.randn(2, 3, 64, 64)
    for config in paper_four['milan'], paper_four['finetuned']:  # of which no head fits the other's file
        loaded = {key: load_compared_model(config, name, 'cpu') for key, name in paper_four.items() if key != 'teacher'}
        assert [loaded[key].mean for key in ('mae', 'milan', 'finetuned')] == [False, False, True]
    alone = load_compared_model(paper_four['finetuned'], paper_four['finetuned'], 'cpu')
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    among = load_compared_model(paper_four['milan'], paper_four['finetuned'], 'cpu')
    with torch.no_grad():
        torch.testing.assert_close(
            among(images)[0], alone((images * std + mean - 127.5) / 127.5)[0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize('layout', ['official', 'timm', 'openmmlab'])
def test_a_fine_tuned_file_without_config(paper_four, layout, tmp_path):
    """The norm in the file says how its features are made, where the given config is that of pretraining."""
    weights = {k: v for k, v in torch.load(paper_four['finetuned'])['state_dict'].items() if k.startswith('backbone.')}
    head = {'head.weight': torch.zeros(3, 48), 'head.bias': torch.zeros(3)}
    folder = tmp_path / 'foreign'
    folder.mkdir()
    torch.save(dict(model=convert(weights, layout, encoder_only=True) | head), folder / 'file.pth')
    images = torch.randn(2, 3, 64, 64)
    foreign = load_compared_model(paper_four['milan'], str(folder / 'file.pth'), 'cpu')
    with torch.no_grad():
        own = load_compared_model(paper_four['finetuned'], paper_four['finetuned'], 'cpu')(images)
        assert foreign.mean and torch.equal(foreign(images)[0], own[0])


@pytest.mark.slow
def test_maskclip(image_folder, tmp_path):
    """It has no loss of patches, so there is no figure 5, in one sentence."""
    config = Config.fromfile(ROOT / 'configs/demo/maskclip_vit-tiny-p8_scenes.py')
    name = save_with_config(config, tmp_path / 'maskclip.pth')
    page = figures(image_folder, [name], tmp_path / 'out').read_text()
    assert page.count('<img alt="') == 3 and 'is a MaskCLIP, which has no loss of patches' in page
    with pytest.raises(InputError, match='has no teacher to compare'):
        figures(image_folder, [name, 'teacher'], tmp_path / 'again')
