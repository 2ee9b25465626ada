"""Classification from a pretraining checkpoint: semantic-aware probing, k-NN, robustness, exact loading, CIFAR-10."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmpretrain.structures import DataSample
from sklearn.neighbors import KNeighborsClassifier
from timm.data import ImageNetInfo
from torch import Tensor, nn

from helpers import ROOT, read_scalars, real_data, run_script_on_ranks
from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.checkpoints.layouts import convert
from mmmilan.errors import InputError
from mmmilan.evaluation.knn import vote
from mmmilan.evaluation.metrics import ImageNetSubsetAccuracy
from mmmilan.registry import MODELS

BENCHMARKS = ROOT / 'configs/milan/benchmarks'
PROBING = 'vit-base-p16_milan-pre_8xb2048-semantic-aware-linear-coslr-100e_in1k.py'
KNN = 'vit-base-p16_knn_in1k.py'
FINE_TUNING = 'vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'
ARCH = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=192)  # that of milan_cfg


@pytest.fixture
def small(tmp_path):
    """Writes one of the configs in the sizes of ``milan_cfg``, for 64 pixels, with changes."""

    def write(name: str, changes: dict | None = None) -> Path:
        cfg = Config.fromfile(BENCHMARKS / name)
        cfg.model.backbone.update(arch=ARCH, img_size=64)
        if cfg.model.get('head'):
            cfg.model.head.in_channels = 48
        loaders = [cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader]
        loaders += [cfg.test_cfg.bank_dataloader] if 'bank_dataloader' in cfg.test_cfg else []
        for loader in loaders:
            loader.update(batch_size=4, num_workers=0, persistent_workers=False)
            next(step for step in loader.dataset.pipeline if 'scale' in step).scale = 64
        for loader in loaders[1:]:
            loader.dataset.pipeline[2].crop_size = 64
        cfg.optim_wrapper.type = 'OptimWrapper'
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
        cfg.default_hooks.logger.interval = 1
        cfg.work_dir = str(tmp_path / 'work')
        cfg.merge_from_dict(changes or {})
        path = tmp_path / f'{tmp_path.name}_{name}'
        cfg.dump(path)
        return path

    return write


@pytest.fixture
def raw_checkpoint(milan_cfg, tmp_path) -> Path:
    """As pretraining writes it: the encoder, the decoder, and more than weights."""
    model = MODELS.build(milan_cfg)
    model.init_weights()
    torch.save(dict(meta=dict(epoch=1), state_dict=model.state_dict(), optimizer={}), tmp_path / 'epoch_1.pth')
    return tmp_path / 'epoch_1.pth'


@pytest.fixture
def labelled_images(tmp_path) -> Path:
    """Five classes of coloured noise, 8 images each to train, and 5 (an odd number) to validate."""
    rng = np.random.default_rng(0)
    for split, count in dict(train=8, val=5).items():
        for label in range(5):
            folder = tmp_path / 'data' / split / f'class{label}'
            folder.mkdir(parents=True)
            colour = np.array([100 + 10 * label, 150 - 10 * label, 120])
            for i in range(count):
                noise = rng.normal(0, 15, 3) + rng.normal(0, 60, (64, 64, 3))
                cv2.imwrite(str(folder / f'{i}.png'), np.clip(colour + noise, 0, 255).astype(np.uint8))
    return tmp_path / 'data'


def labelled_folder(root: Path) -> dict:
    """A data set to take the place of ImageNet's validation images."""
    pipeline = Config.fromfile(BENCHMARKS / FINE_TUNING).test_dataloader.dataset.pipeline
    pipeline[1].scale = pipeline[2].crop_size = 64
    return dict(_delete_=True, type='mmmilan.ImageFolder', data_root=str(root), with_label=True, pipeline=pipeline)


def last_metrics(work_dir: Path) -> dict:
    """The numbers that the last evaluation has written."""
    (path,) = work_dir.glob('*/*.json')
    return json.loads(path.read_text().splitlines()[-1])


def scores(path: Path) -> Tensor:
    """Scores [images, classes] that tools/test.py --out has written."""
    return torch.stack([sample['pred_score'] for sample in pickle.loads(path.read_bytes())])


# -- semantic-aware probing


def attention_by_hand(official: dict[str, Tensor], images: Tensor) -> Tensor:
    """Attention [B, 16] of the class token in the last of the two blocks of the recorded CLIP, over each head."""
    clip = {key.removeprefix('clip/').removeprefix('visual.'): v for key, v in official.items() if 'clip/' in key}
    x = F.conv2d(images, clip['conv1.weight'], stride=16).flatten(2).mT
    x = torch.cat([clip['class_embedding'].expand(len(x), 1, -1), x], dim=1) + clip['positional_embedding']
    x = F.layer_norm(x, (128,), clip['ln_pre.weight'], clip['ln_pre.bias'])
    block = {key[len('transformer.resblocks.0.') :]: v for key, v in clip.items() if 'resblocks.0.' in key}
    attn = nn.MultiheadAttention(128, 2, batch_first=True)
    attn.load_state_dict({key[5:]: v for key, v in block.items() if key.startswith('attn.')})
    y = F.layer_norm(x, (128,), block['ln_1.weight'], block['ln_1.bias'])
    x = x + attn(y, y, y)[0]
    y = F.layer_norm(x, (128,), block['ln_2.weight'], block['ln_2.bias'])
    y = F.linear(y, block['mlp.c_fc.weight'], block['mlp.c_fc.bias'])
    x = x + F.linear(y * torch.sigmoid(1.702 * y), block['mlp.c_proj.weight'], block['mlp.c_proj.bias'])
    last = {key[len('transformer.resblocks.1.') :]: v for key, v in clip.items() if 'resblocks.1.' in key}
    attn.load_state_dict({key[5:]: v for key, v in last.items() if key.startswith('attn.')})
    y = F.layer_norm(x, (128,), last['ln_1.weight'], last['ln_1.bias'])
    return attn(y, y, y, need_weights=True)[1][:, 0, 1:]


@pytest.fixture
def probing_config(small, clip_file, raw_checkpoint, labelled_images):
    validation = labelled_folder(labelled_images / 'val')
    changes = {'val_dataloader.dataset': validation, 'test_dataloader.dataset': validation}
    changes |= {'train_dataloader.dataset.data_root': str(labelled_images / 'train')}
    changes |= {'model.backbone.teacher': dict(model=None, pretrained=clip_file)}
    changes |= {'model.backbone.frozen_stages': 2, 'model.backbone.init_cfg.checkpoint': str(raw_checkpoint)}
    changes |= {f'model.{part}.num_classes': 5 for part in ('head', 'data_preprocessor')}
    return small(PROBING, changes | {'model.neck.input_features': 48})


@pytest.fixture
def probe(probing_config):
    cfg = Config.fromfile(probing_config).model
    cfg.backbone.init_cfg = None
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def test_encoder_sees_the_top_half(probe, official):
    """Of a slow attention by hand; and the class token is that of an encoder of nothing but those patches."""
    images = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        importance = attention_by_hand(official, images)
    top_half = [sorted(range(16), key=row.__getitem__)[8:] for row in importance.tolist()]
    seen = []
    probe.backbone.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = {}
    for training in (True, False):  # the same patches in both
        probe.train(training)
        features[training] = probe.extract_feat(images, stage='backbone')[-1]
    assert torch.equal(features[True], features[False])

    backbone = probe.backbone
    tokens = backbone.patch_embed(images)[0] + backbone.pos_embed[:, 1:]
    for i, patches in enumerate(top_half):
        x = torch.cat([backbone.cls_token[0] + backbone.pos_embed[0, :1], tokens[i, patches]])
        torch.testing.assert_close(sorted_rows(seen[0][i]), sorted_rows(x), atol=1e-5, rtol=1e-5)
        for layer in backbone.layers:
            x = layer(x[None])[0]
        torch.testing.assert_close(features[True][i], backbone.ln1(x)[0], atol=1e-5, rtol=1e-5)


def sorted_rows(tokens: Tensor) -> Tensor:
    return tokens[tokens[:, 0].argsort()]


def test_probing_trains_the_linear_layer_alone(probe):
    samples = [DataSample().set_gt_label(i % 5) for i in range(6)]
    probe.train()
    probe.loss(torch.randn(6, 3, 64, 64), samples)['loss'].backward()
    with_gradient = {key for key, parameter in probe.named_parameters() if parameter.grad is not None}
    assert with_gradient == {'head.layers.head.weight', 'head.layers.head.bias'}
    teacher = probe.backbone.teacher.module
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    held = {p.data_ptr() for p in teacher.parameters()}
    assert len(held) > 20 and not held & {value.data_ptr() for value in probe.state_dict().values()}
    encoder = {key for key in probe.state_dict() if key.startswith('backbone.')}
    plain = MODELS.build(dict(type='mmmilan.MILANViT', arch=ARCH, img_size=64, patch_size=16))
    assert encoder == {f'backbone.{key}' for key in plain.state_dict()}  # so any checkpoint of an encoder fits


def test_probing_through_the_tools(probing_config, raw_checkpoint, run_tool, tmp_path):
    """The frozen encoder is that of pretraining to the bit, the teacher in no checkpoint, the accuracy on disk."""
    run_tool('train.py', probing_config, '--cfg-options', 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1')
    before = load_checkpoint_file(raw_checkpoint)['state_dict']
    after = load_checkpoint_file(tmp_path / 'work/epoch_1.pth')['state_dict']
    encoder = {key for key in before if key.startswith('backbone.')}
    head = {'head.layers.head.weight', 'head.layers.head.bias'}
    statistics = {f'neck.bn.{key}' for key in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert after.keys() - encoder == head | statistics
    assert all(torch.equal(after[key], before[key]) for key in encoder)
    run_tool('test.py', probing_config, tmp_path / 'work/epoch_1.pth', '--work-dir', tmp_path / 'test')
    accuracies = [record['accuracy/top1'] for record in read_scalars(tmp_path / 'work') if 'accuracy/top1' in record]
    assert accuracies == [last_metrics(tmp_path / 'test')['accuracy/top1']]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(keep_ratio=0.05), 'keep_ratio=0.05 shows 0 of 16 patches'),
        (dict(keep_ratio=1.5), 'keep_ratio=1.5 shows 24 of 16 patches'),
        (dict(img_size=96), 'teacher sees .* set teacher.input_size to'),
    ],
)
def test_probing_that_cannot_be(clip_file, changes, message):
    teacher = dict(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    cfg = dict(type='mmmilan.SemanticAwareViT', teacher=teacher, arch=ARCH, img_size=64, patch_size=16) | changes
    with pytest.raises(InputError, match=message):
        MODELS.build(cfg)


# -- k-NN


def test_vote_is_that_of_slow_references():
    rng = np.random.default_rng(0)
    bank, queries = (rng.normal(size=(n, 12)).astype(np.float32) for n in (90, 17))
    bank, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, queries))
    labels = rng.integers(0, 6, 90)
    shares = vote(*map(torch.from_numpy, (queries, bank, labels)), num_classes=6, k=20, temperature=0.07).numpy()
    for query, share in zip(queries, shares, strict=True):
        expected = np.zeros(6)
        for j in sorted(range(90), key=lambda j: -(query @ bank[j]))[:20]:
            expected[labels[j]] += np.exp(query @ bank[j] / 0.07)
        np.testing.assert_allclose(share, expected / expected.sum(), rtol=1e-3, atol=1e-6)
    sklearn = KNeighborsClassifier(20, metric='cosine', weights=lambda distance: np.exp((1 - distance) / 0.07))
    np.testing.assert_allclose(shares, sklearn.fit(bank, labels).predict_proba(queries), rtol=1e-3, atol=1e-6)
    all_of_them = vote(*map(torch.from_numpy, (queries, bank, labels)), num_classes=6, k=500, temperature=0.07)
    assert (all_of_them > 0).all()  # fewer images than neighbours: every one of them votes


@pytest.fixture
def knn_config(small, labelled_images):
    bank = {'test_cfg.bank_dataloader.dataset.data_root': str(labelled_images / 'train')}
    return small(KNN, {'test_dataloader.dataset': labelled_folder(labelled_images / 'val')} | bank)


def accuracy_by_hand(encoder: nn.Module, images: Path) -> tuple[float, float]:
    """Top-1 and top-2 of votes by a loop over the images."""

    def features(split: str) -> tuple[Tensor, list[int]]:
        paths = sorted((images / split).rglob('*.png'))
        pixels = np.stack([cv2.imread(str(path))[..., ::-1] for path in paths]).astype(np.float32)
        pixels = (pixels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
        with torch.no_grad():
            tokens = encoder(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))[-1]
        return F.normalize(tokens, dim=1), [int(path.parent.name[-1]) for path in paths]

    (bank, labels), (queries, truth) = features('train'), features('val')
    hits = np.zeros(2)
    for query, label in zip(queries, truth, strict=True):
        similarity = bank @ query
        votes = np.zeros(5)
        for j in similarity.argsort(descending=True)[:20]:
            votes[labels[j]] += float((similarity[j] / 0.07).exp())
        best = (-votes).argsort()
        hits += [best[0] == label, label in best[:2]]
    return tuple(100 * hits / len(truth))


KNN_OPTIONS = ['--cfg-options', 'test_evaluator.topk=(1,2,5)']


def test_knn_from_a_raw_pretraining_checkpoint(
    knn_config, raw_checkpoint, labelled_images, milan_cfg, run_tool, tmp_path
):
    """tools/test.py gives the accuracy of a slow reference, without a conversion."""
    encoder = MODELS.build(milan_cfg['backbone'])
    weights = torch.load(raw_checkpoint)['state_dict']
    encoder.load_state_dict({key[9:]: value for key, value in weights.items() if key.startswith('backbone.')})
    top1, top2 = accuracy_by_hand(encoder, labelled_images)
    assert 20 < top1 < top2 < 100  # better than chance, and not perfect

    run_tool('test.py', knn_config, raw_checkpoint, *KNN_OPTIONS)
    metrics = last_metrics(tmp_path / 'work')
    assert metrics['accuracy/top1'] == pytest.approx(top1, abs=1e-4)
    assert metrics['accuracy/top2'] == pytest.approx(top2, abs=1e-4)
    assert metrics['accuracy/top5'] == 100


def test_knn_on_two_processes(knn_config, raw_checkpoint, labelled_images, run_tool, tmp_path):
    """They give the votes of one process: 25 test images and 39 labelled ones, neither a multiple of two."""
    (labelled_images / 'train/class0/0.png').unlink()
    run_tool('test.py', knn_config, raw_checkpoint, '--out', tmp_path / 'one.pkl', *KNN_OPTIONS)
    options = ['--work-dir', tmp_path / 'two', '--out', tmp_path / 'two.pkl', *KNN_OPTIONS]
    run_script_on_ranks('test.py', 2, knn_config, raw_checkpoint, *options)
    one, two = last_metrics(tmp_path / 'work'), last_metrics(tmp_path / 'two')
    assert [one[f'accuracy/top{k}'] for k in (1, 2)] == [two[f'accuracy/top{k}'] for k in (1, 2)]
    one, two = scores(tmp_path / 'one.pkl'), scores(tmp_path / 'two.pkl')
    assert one.shape == two.shape == (25, 5)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_knn_of_different_classes(knn_config, raw_checkpoint, labelled_images, run_tool):
    (labelled_images / 'val/class4').rename(labelled_images / 'val/other')
    message = r'bank_dataloader have 5 classes .* the test images 5 \(class0, class1, .*; give data sets of the same'
    with pytest.raises(SystemExit, match=message):
        run_tool('test.py', knn_config, raw_checkpoint)


# -- other distributions


def synsets_of_imagenet_a() -> list[str]:
    import timm.data

    return Path(timm.data.__file__).with_name('_info').joinpath('imagenet_a_synsets.txt').read_text().split()


def test_subset_accuracy_is_the_argmax_over_the_subset():
    """The 200 classes of ImageNet-A, scored as its authors do: argmax of the logits of those classes."""
    folders = synsets_of_imagenet_a()
    assert len(folders) == 200
    names = ImageNetInfo('imagenet-1k').label_names()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(200, (300,), generator=generator)
    logits = torch.randn(300, 1000, generator=generator)
    logits[range(300), [names.index(folders[label]) for label in labels]] += 2.0
    subset = torch.stack([logits[:, names.index(folder)] for folder in folders], dim=1)
    expected = 100 * (subset.argmax(1) == labels).float().mean().item()
    expected5 = 100 * (subset.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    over_all = sum(names[row.argmax()] == folders[label] for row, label in zip(logits, labels, strict=True)) / 3

    samples = [
        DataSample().set_gt_label(int(label)).set_pred_score(row.softmax(0))
        for row, label in zip(logits, labels, strict=True)
    ]
    evaluator = Evaluator(ImageNetSubsetAccuracy())
    evaluator.dataset_meta = dict(classes=tuple(folders))
    evaluator.process(samples[:150])
    evaluator.process(samples[150:])
    metrics = evaluator.evaluate(300)
    assert metrics['accuracy/top1'] == pytest.approx(expected) and over_all < expected - 5
    assert metrics['accuracy/top5'] == pytest.approx(expected5) and expected5 > expected


def test_subset_accuracy_needs_wordnet_ids_and_imagenet_classes():
    metric = ImageNetSubsetAccuracy()
    metric.dataset_meta = dict(classes=('n01498041', 'n00000001', 'dog'))
    sample = dict(pred_score=torch.ones(1000) / 1000, gt_label=torch.tensor([0]))
    with pytest.raises(InputError, match=r'2 of the 3 class folders are not WordNet ids .* \(n00000001, dog\)'):
        metric.process({}, [sample])
    with pytest.raises(InputError, match='The model has 10 classes; .* needs the 1000'):
        metric.process({}, [sample | dict(pred_score=torch.ones(10))])


def test_imagenet_a_through_the_tool(small, image_folder, run_tool, tmp_path):
    """Images in folders named by WordNet ids, a checkpoint of fine-tuning, numbers on disk."""
    folders = synsets_of_imagenet_a()[:6]
    for i, path in enumerate(sorted(image_folder.rglob('*.jpg'))):
        target = tmp_path / 'imagenet-a' / folders[i % 6] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / 'imagenet-a/README.txt').write_text('as in the original')
    model = MODELS.build(Config.fromfile(small(FINE_TUNING)).model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'fine-tuned.pth')
    config = small('vit-base-p16_imagenet-a.py', {'test_dataloader.dataset.data_root': str(tmp_path / 'imagenet-a')})
    run_tool('test.py', config, tmp_path / 'fine-tuned.pth')
    metrics = last_metrics(tmp_path / 'work')
    assert 0 <= metrics['accuracy/top1'] <= metrics['accuracy/top5'] and metrics['accuracy/top5'] > 50  # of 6 classes


# -- exact loading by the tools


@pytest.fixture
def classifier(small, labelled_images):
    """The config of fine-tuning on five classes, and the weights of its model."""
    validation = labelled_folder(labelled_images / 'val')
    changes = {'val_dataloader.dataset': validation, 'test_dataloader.dataset': validation}
    changes |= {'train_dataloader.dataset.data_root': str(labelled_images / 'train'), 'model.backbone.init_cfg': None}
    config = small(FINE_TUNING, changes | {'model.head.num_classes': 5, 'model.data_preprocessor.num_classes': 5})
    return config, MODELS.build(Config.fromfile(config).model).state_dict()


def test_missing_weights_are_named(classifier, raw_checkpoint, run_tool):
    """A raw pretraining checkpoint has no classifier: an error of tools/test.py, and of load_from in tools/train.py."""
    config, _ = classifier
    message = (
        r'error: .*epoch_1.pth does not hold all of ImageClassifier: missing backbone.ln2.bias, backbone.ln2.weight, '
        r'head.fc.bias, head.fc.weight, left over .*and \d+ more; give a checkpoint of this config'
    )
    with pytest.raises(SystemExit, match=message):
        run_tool('test.py', config, raw_checkpoint)
    with pytest.raises(SystemExit, match=message):
        run_tool('train.py', config, '--cfg-options', f'load_from={raw_checkpoint}')


def test_one_missing_weight_is_enough(classifier, run_tool, tmp_path):
    config, weights = classifier
    del weights['backbone.layers.1.attn.qkv.bias']
    torch.save(dict(state_dict=weights), tmp_path / 'part.pth')
    with pytest.raises(SystemExit, match='missing backbone.layers.1.attn.qkv.bias, left over none'):
        run_tool('test.py', config, tmp_path / 'part.pth')


def test_class_count_names_the_option(classifier, run_tool, tmp_path):
    config, weights = classifier
    weights |= {'head.fc.weight': torch.zeros(1000, 48), 'head.fc.bias': torch.zeros(1000)}
    torch.save(dict(state_dict=weights), tmp_path / 'imagenet.pth')
    message = (
        r'imagenet.pth does not fit ImageClassifier: its head.fc.weight is \[1000, 48\], and \[5, 48\] in the model; '
        r'set model.data_preprocessor.num_classes and model.head.num_classes to the number of classes'
    )
    with pytest.raises(SystemExit, match=message):
        run_tool('test.py', config, tmp_path / 'imagenet.pth')
    with pytest.raises(SystemExit, match=message):
        run_tool('train.py', config, '--cfg-options', f'load_from={tmp_path}/imagenet.pth')
    weights['backbone.cls_token'] = torch.zeros(1, 1, 96)  # not the head alone is another
    torch.save(dict(state_dict=weights), tmp_path / 'imagenet.pth')
    with pytest.raises(
        SystemExit, match='imagenet.pth does not fit ImageClassifier: .*size mismatch for backbone.cls_token'
    ):
        run_tool('test.py', config, tmp_path / 'imagenet.pth')


@pytest.mark.parametrize('kind', ['as saved by DistributedDataParallel', 'weights alone', 'timm'])
def test_fine_tuned_checkpoints_of_other_origin(classifier, run_tool, kind, tmp_path):
    """They load, and give the scores of the original; what is left over is logged."""
    config, weights = classifier
    weights = {key: torch.randn_like(value) for key, value in weights.items()}
    torch.save(dict(state_dict=weights), tmp_path / 'original.pth')
    other = {
        'as saved by DistributedDataParallel': dict(state_dict={f'module.{k}': v for k, v in weights.items()}),
        'weights alone': weights | {'head.more': torch.zeros(1)},
        'timm': dict(model=convert(weights, to='timm')),
    }[kind]
    torch.save(other, tmp_path / 'other.pth')
    run_tool('test.py', config, tmp_path / 'original.pth', '--work-dir', tmp_path / 'a', '--out', tmp_path / 'a.pkl')
    run_tool('test.py', config, tmp_path / 'other.pth', '--work-dir', tmp_path / 'b', '--out', tmp_path / 'b.pkl')
    original = scores(tmp_path / 'a.pkl')
    assert torch.equal(original, scores(tmp_path / 'b.pkl'))
    assert len(set(original.argmax(1).tolist())) > 1  # they tell images apart
    unused = 'head.more' if kind == 'weights alone' else 'none'
    said = ''.join(path.read_text() for path in tmp_path.glob('[ab]/*/*.log'))  # one log if both began in one second
    assert f'weights are those of {tmp_path}/other.pth; as initialised: none; not used: {unused}.' in said


# -- CIFAR-10


@pytest.fixture
def cifar10(tmp_path) -> Path:
    """24 + 8 images of each class, out of the test split, which stands first in the archive."""
    archive = real_data('cifar10.tar.xz')
    with tarfile.open(archive, 'r|xz') as files:
        for member in files:
            _, split, label, name = PurePosixPath(member.name).parts
            if split != 'test':
                break
            if (number := int(Path(name).stem)) < 32:
                path = tmp_path / 'cifar10' / ('train' if number < 24 else 'val') / label / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files.extractfile(member).read())
    return tmp_path / 'cifar10'


def test_fine_tuning_on_cifar10(cifar10, small, tiny_config, run_tool, tmp_path, monkeypatch):
    """Pretrained and fine-tuned by tools/train.py, from the file that it wrote, and tested by tools/test.py."""
    pretraining = {'train_dataloader.dataset.data_root': str(cifar10), 'train_dataloader.batch_size': 64}
    quick = {'train_dataloader.num_workers': 0, 'train_cfg.max_epochs': 1, 'optim_wrapper.type': 'OptimWrapper'}
    run_tool('train.py', tiny_config(pretraining | quick | dict(param_scheduler=None)), '--work-dir', tmp_path / 'pre')
    checkpoint = tmp_path / 'pre/epoch_1.pth'

    for key, value in dict(DATA_ROOT=cifar10, CLASSES=10, BATCH_SIZE=32, EPOCHS=10).items():
        monkeypatch.setenv(key, str(value))
    steps = [dict(type='mmmilan.LoadImage'), dict(type='Resize', scale=(64, 64)), dict(type='RandomFlip', prob=0.5)]
    pipeline = [*steps, dict(type='PackInputs')]  # so few images and steps need no more augmentation
    config = small('vit-base-p16_milan-pre_custom.py', {'train_dataloader.dataset.pipeline': pipeline})
    options = [
        'train_dataloader.batch_size=32',
        'val_dataloader.batch_size=32',
        'train_cfg.val_interval=10',
        'default_hooks.checkpoint.interval=10',
        f'model.backbone.init_cfg.checkpoint={checkpoint}',
        'model.train_cfg.augments=None',
        'optim_wrapper.optimizer.lr=0.1',  # for a batch of 1024
    ]
    run_tool('train.py', config, '--cfg-options', *options)
    records = read_scalars(tmp_path / 'work')
    losses = [record['loss'] for record in records if 'loss' in record]
    assert len(losses) == 10 * 7  # 240 images in batches of 32
    assert losses[0] == pytest.approx(np.log(10), abs=0.05)
    assert np.mean(losses[-7:]) < np.mean(losses[:7]) - 0.1
    accuracies = [record['accuracy/top1'] for record in records if 'accuracy/top1' in record]
    assert len(accuracies) == 1

    before = load_checkpoint_file(checkpoint)['state_dict']
    after = load_checkpoint_file(tmp_path / 'work/epoch_10.pth')['state_dict']
    key = 'backbone.layers.0.ffn.layers.0.0.weight'
    assert 0.5 < F.cosine_similarity(before[key].flatten(), after[key].flatten(), dim=0) < 0.9999  # it began there

    run_tool('test.py', config, tmp_path / 'work/epoch_10.pth', '--work-dir', tmp_path / 'test')
    assert last_metrics(tmp_path / 'test')['accuracy/top1'] == pytest.approx(accuracies[-1], abs=1e-3)
