"""Hostile configs in files of weights: nothing that they name is run, imported, written or taken from the memory."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import Registry
from mmpretrain.registry import MODELS
from torch import nn

import mmmilan
from helpers import ROOT, TINY_ARCH, build_model, rest_slow
from mmmilan.api.models import build_embedder
from mmmilan.checkpoints.config import own_config, parse_config
from mmmilan.checkpoints.foreign_config import SCOPES, check_foreign_config, is_allowed
from mmmilan.checkpoints.io import save_checkpoint_file
from mmmilan.errors import InputError
from weight_files import encoder

BASE = ROOT / 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'


@functools.lru_cache
def base() -> dict:
    values = Config.fromfile(BASE).to_dict()
    values['model']['backbone'] |= dict(arch=dict(TINY_ARCH), img_size=64)
    return values


def put(values: dict, place: str, value: object) -> dict:
    """A copy of a config with a value at a dotted place; missing parts are made, '+' appends to a list."""
    values = part = copy.deepcopy(values)
    *keys, last = [int(key) if key.isdigit() else key for key in place.split('.')]
    for key in keys:
        part = part.setdefault(key, {}) if isinstance(part, dict) else part[key]
    if last == '+':
        part.append(value)
    else:
        part[last] = value
    return values


def write(path: Path, values: dict, weights: dict | None = None) -> Path:
    weights = weights or {f'backbone.{key}': value for key, value in encoder().state_dict().items()}
    save_checkpoint_file({'state_dict': weights, 'meta': dict(cfg=Config(values).pretty_text, epoch=1, iter=1)}, path)
    return path


@pytest.fixture
def proof(tmp_path, monkeypatch) -> Path:
    """What a payload would make. Two modules on the path make it when they are imported."""
    proof = tmp_path / 'proof'
    code = f'import os\nos.makedirs({str(proof)!r}, exist_ok=True)\n'
    (tmp_path / 'path/hostile_scope').mkdir(parents=True)
    (tmp_path / 'path/hostile_scope/__init__.py').write_text('')
    (tmp_path / 'path/hostile_scope/registry.py').write_text(code)
    (tmp_path / 'path/hostile_module.py').write_text(code)
    (tmp_path / 'path/ResNet.py').write_text(code)  # the name of a registered type
    monkeypatch.syspath_prepend(str(tmp_path / 'path'))
    yield proof
    assert not proof.exists()
    assert not {'hostile_scope', 'hostile_scope.registry', 'hostile_module', 'ResNet'} & set(sys.modules)


def payloads(proof: Path) -> list[dict]:
    code = f'__import__("os").makedirs({str(proof)!r})'
    return [
        dict(type='os.mkdir', path=str(proof)),
        dict(type='subprocess.check_call', args=['mkdir', str(proof)]),
        dict(type='os.system', command=f'mkdir {proof}'),
        dict(type='builtins.exec', source=code),
        dict(type='mmengine.Config.fromstring', cfg_str=code, file_format='.py'),
        dict(type='mmengine.load', file=str(proof)),
        dict(type='mmdet.os.mkdir', path=str(proof)),
        dict(type='torch.load', f=str(proof)),
        dict(type='hostile_module'),
        dict(type='hostile_module.Thing'),
        dict(type='hostile_scope.Thing'),
        dict(type='ResNet'),
        dict(type='LayerNorm', _scope_='hostile_scope'),
        dict(type='mmmilan.datasets.ImageFolder'),
        dict(type=['os.mkdir']),
        dict(inner=[dict(deeper=(dict(type='os.mkdir', path=str(proof)),))]),
        dict(norm_cfg={'x': dict(type='hostile_module.Thing')}),
        dict(ema_type='hostile_module'),
        dict(init_fn='os.mkdir'),
    ]


PLACES = (
    'model', 'model.backbone', 'model.backbone.norm_cfg', 'model.backbone.layer_cfgs', 'model.neck', 'model.head',
    'model.head.teacher', 'model.masking', 'model.data_preprocessor', 'model.init_cfg', 'model.train_cfg',
    'test_dataloader', 'test_dataloader.dataset', 'test_dataloader.dataset.pipeline.0',
    'test_dataloader.dataset.pipeline.+', 'test_dataloader.sampler', 'test_dataloader.batch_sampler',
    'test_dataloader.collate_fn', 'test_dataloader.worker_init_fn', 'train_dataloader.dataset.pipeline.1',
    'test_evaluator', 'test_evaluator.metrics', 'test_cfg', 'train_cfg', 'custom_hooks.+', 'default_hooks.checkpoint',
    'optim_wrapper', 'optim_wrapper.optimizer', 'optim_wrapper.constructor_cfg', 'param_scheduler.0', 'visualizer',
    'visualizer.vis_backends.0', 'log_processor', 'strategy', 'env_cfg', 'model_wrapper_cfg', 'tta_model',
    'tta_pipeline', 'anything',
)  # fmt: skip


@pytest.mark.parametrize(
    'place',
    rest_slow(
        PLACES,
        'model',
        'model.backbone',
        'model.head.teacher',
        'test_dataloader.dataset.pipeline.+',
        'test_dataloader.collate_fn',
        'custom_hooks.+',
        'optim_wrapper',
        'anything',
    ),
)
def test_every_position(tmp_path, proof, place):
    for payload in payloads(proof):
        with pytest.raises(InputError, match='and is refused') as error:
            check_foreign_config(put(base(), place, payload), 'the config in weights.pth')
        assert ' of the config in weights.pth ' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'key, value',
    [
        ('custom_imports', dict(imports=['hostile_module'], allow_failed_imports=False)),
        ('default_scope', 'hostile_scope'),
        ('default_scope', 'os'),
        ('_scope_', 'hostile_scope'),
        ('model._scope_', 'hostile_scope'),
        ('test_dataloader.dataset._scope_', 'hostile_scope'),
        ('runner_type', 'hostile_module'),
        ('runner_type', 'os.system'),
        ('optim_wrapper.constructor', 'hostile_module.Thing'),
        # registered, and yet they run code, or write where the config says
        ('model.test_cfg', dict(nms=dict(type='__import__("os").mkdir("proof")'))),
        ('model.test_cfg', dict(nms=dict(type='print'))),
        ('model.motion', dict(type='mmdet.CameraMotionCompensation', warp_mode='__import__("os").mkdir("proof")')),
        ('model', dict(type='mmdet.KnowledgeDistillationSingleStageDetector', teacher_config='teacher.py')),
        ('model', dict(type='mmdet.LAD')),  # derived from it
        ('model.tokenizer', dict(type='AutoTokenizer', name_or_path='x', trust_remote_code=True)),
        ('model', dict(type='HuggingFaceClassifier', model_name='x')),
        ('test_dataloader.dataset.pipeline.0', dict(type='torchvision/ConvertImageDtype', dtype='uint8 or print()')),
        ('test_dataloader.dataset.ann_file', 'labels.pkl'),
        ('test_dataloader.dataset.ann_file', 'labels.yaml'),
        ('test_dataloader.dataset.pipeline.0', dict(type='mmseg.LoadBiomedicalData', decode_backend='pickle')),
        ('test_evaluator', dict(type='DumpResults', out_file_path='thesis.pkl')),
        ('test_evaluator', dict(type='Accuracy', collect_dir='photos')),
        ('test_evaluator', dict(type='mmdet.CocoMetric', outfile_prefix='/tmp/x')),
        ('test_evaluator', dict(type='mmmilan.CocoMetric', outfile_prefix='/tmp/x')),
        ('default_hooks.checkpoint', dict(type='CheckpointHook', out_dir='/tmp')),
        ('default_hooks.checkpoint', dict(type='CheckpointHook', filename_tmpl='../../epoch_{}.pth')),
        ('custom_hooks.+', dict(type='ProfilerHook', json_trace_path='x.json')),
        ('visualizer.vis_backends.0', dict(type='DVCLiveVisBackend')),
        ('visualizer.vis_backends.0', dict(type='MLflowVisBackend', tracking_uri='http://localhost')),
        ('visualizer.vis_backends.0', dict(type='LocalVisBackend', scalar_save_file='/tmp/x.json')),
        ("model.backbone.a'b", 1),  # MMEngine would write it unquoted into a config
        # more memory, or processes, than there can be
        ('test_dataloader.num_workers', 100_000),
        ('train_dataloader.batch_size', 10**9),
        ('train_dataloader.prefetch_factor', 10**6),
        ('test_dataloader.dataset.pipeline.1.scale', 10**6),
        ('test_dataloader.dataset.pipeline.1.scale', (10**6, 8)),
        ('test_dataloader.dataset.pipeline.2.crop_size', 1e9),
        ('model.backbone.arch.num_layers', 10_000_000),
        ('model.backbone.depths', [2, 10**8]),
        ('model.neck.num_patches', 10**9),
    ],
)
def test_what_else_is_refused(tmp_path, proof, key, value):
    with pytest.raises(InputError, match=r'of weights\.pth .* and is refused; if you trust it'):
        check_foreign_config(put(base(), key, value), 'weights.pth')


def test_files_of_data_that_is_not_read(tmp_path):
    """A pickle of proposals, annotations in YAML: an encoder is taken out, but no data set is built."""
    values = put(base(), 'train_dataloader', dict(dataset=dict(type='mmdet.CocoDataset', proposal_file='a.pkl')))
    values = put(values, 'test_dataloader.dataset.ann_file', 'labels.yaml') | dict(train_ann='b.yaml', out_dir='/tmp')
    path = write(tmp_path / 'weights.pth', values)
    config = own_config(path)
    assert config.train_dataloader.dataset.proposal_file == 'a.pkl' and not {'train_ann', 'out_dir'} & set(config)
    with pytest.raises(InputError, match='a kind of file that MMEngine runs as code, and is refused'):
        own_config(path, with_data=True)
    with pytest.raises(InputError, match='pipeline.0.x .* is refused'):
        own_config(write(tmp_path / 'other.pth', put(values, 'test_dataloader.dataset.pipeline.0.x', 'a.pkl')))


def test_names_that_a_neck_looks_up(monkeypatch, tmp_path):
    values = put(base(), 'model.neck', dict(type='mmdet.FPG', same_up_trans=dict(type='conv')))
    check_foreign_config(values, 'weights.pth')
    (tmp_path / 'conv.py').write_text('')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="'conv'"):
        check_foreign_config(values, 'weights.pth')


def test_mmengine_would_run_them(tmp_path):
    """The payloads above are not harmless by mistake."""
    MODELS.build(dict(type='os.mkdir', path=str(tmp_path / 'proof')))
    assert (tmp_path / 'proof').exists()


# -- entries


def run_train(path: Path, run_tool: Callable, images: Path) -> None:
    run_tool('train.py', path, '--work-dir', path.parent / 'work')


def run_test(path: Path, run_tool: Callable, images: Path) -> None:
    run_tool('test.py', path, '--work-dir', path.parent / 'work')


def run_publish(path: Path, run_tool: Callable, images: Path) -> None:
    run_tool('publish_model.py', BASE, path, path.parent / 'published')


def run_resume(path: Path, run_tool: Callable, images: Path) -> None:
    folder = path.parents[1] / 'run'
    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    (folder / path.name).rename(folder / 'epoch_1.pth')
    mmmilan.pretrain(None, folder, resume=True)


ENTRIES: dict[str, Callable[[Path, Callable, Path], object]] = {
    'get_model': lambda path, *_: mmmilan.get_model(path),
    'whole model': lambda path, *_: mmmilan.get_model(str(path), encoder_only=False),
    'FeatureExtractor': lambda path, *_: mmmilan.FeatureExtractor(path),
    'ImageClassificationInferencer': lambda path, *_: mmmilan.ImageClassificationInferencer(path),
    'predict': lambda path, _, images: mmmilan.predict(images, path, path.parent / 'predictions'),
    'build_embedder': lambda path, *_: build_embedder(nn.Linear(1, 1), path),
    'embed': lambda path, _, images: mmmilan.embed(images, path, path.parent / 'features.npz'),
    'search': lambda path, _, images: mmmilan.search(images, path, 'a boat'),
    'heat_maps': lambda path, _, images: mmmilan.heat_maps(images, path, path.parent / 'out', texts=['a boat']),
    'zero_shot': lambda path, _, images: mmmilan.zero_shot(images, path),
    'report': lambda path, _, images: mmmilan.report(images, path, path.parent / 'report.html'),
    'figures': lambda path, _, images: mmmilan.figures(images, path, path.parent / 'figures'),
    'export_onnx': lambda path, *_: mmmilan.export_onnx(path, path.parent / 'model.onnx'),
    'pretrain --resume': run_resume,
    'tools/test.py': run_test,
    'tools/train.py': run_train,
    'tools/publish_model.py': run_publish,
}


KINDS = ('weights.pth', 'weights.safetensors', 'config.py beside')
QUICK = (
    ('get_model', 'weights.pth'),
    ('whole model', 'config.py beside'),
    ('predict', 'weights.safetensors'),
    ('embed', 'weights.pth'),
    ('export_onnx', 'weights.pth'),
    ('pretrain --resume', 'weights.pth'),
    ('tools/test.py', 'config.py beside'),
    ('tools/train.py', 'weights.safetensors'),
)


@pytest.mark.parametrize('case', rest_slow(product(ENTRIES, KINDS), *QUICK), ids='-'.join)
def test_every_entry(tmp_path, proof, run_tool, image_folder, monkeypatch, case):
    entry, kind = case
    if entry == 'export_onnx':
        monkeypatch.setattr('mmmilan.export.onnx.PACKAGES', ())
    if (entry, kind) in (('tools/publish_model.py', 'config.py beside'), ('pretrain --resume', 'weights.safetensors')):
        pytest.skip('does not read it')
    folder = tmp_path / 'downloaded'
    folder.mkdir()
    for number, place in enumerate(('model', 'model.backbone', 'test_dataloader.dataset.pipeline.0', 'custom_hooks.+')):
        values = put(base(), place, payloads(proof)[number])
        if kind == 'config.py beside':
            path = folder / 'weights.pth'
            save_checkpoint_file({'state_dict': encoder().state_dict()}, path)
            (folder / 'config.py').write_text(Config(values).pretty_text)
        else:
            path = write(folder / kind, values)
        before = sorted(folder.rglob('*'))
        with pytest.raises((InputError, SystemExit), match='and is refused; if you trust it'):
            ENTRIES[entry](path, run_tool, image_folder)
        assert sorted(folder.rglob('*')) == before


def test_types_of_ones_own_need_the_config_file(tmp_path, monkeypatch):
    """They are registered by a module of the user's, which only a trusted config may import."""

    class Mine(nn.Module):
        pass

    monkeypatch.setitem(MODELS.module_dict, 'Mine', Mine)
    path = write(tmp_path / 'weights.pth', put(base(), 'model.backbone', dict(type='Mine')))
    with pytest.raises(
        InputError, match=r"model.backbone.type of .* is 'Mine'.*give a config file \(.py\) in its place"
    ):
        mmmilan.get_model(path)


# -- sizes


@pytest.mark.parametrize(
    ('place', 'value'),
    [('indices', [3, 123_456]), ('indices', 123_456), ('metainfo', dict(ids=[1 << 40])), ('seed', 1 << 40)],
)
def test_numbers_of_a_data_set_that_are_no_sizes(tmp_path, place, value):
    """A part of the images by number, ids of classes: the checkpoint of such a run is like any other."""
    path = write(tmp_path / 'epoch_1.pth', put(base(), f'train_dataloader.dataset.{place}', value))
    assert own_config(path).train_dataloader.dataset[place] == value
    with pytest.raises(InputError, match='more than 16384'):
        own_config(write(path, put(base(), f'train_dataloader.dataset.pipeline.0.{place}', 1 << 40)))


@pytest.mark.parametrize(
    'place, value',
    [
        ('model.backbone.arch.embed_dims', 9_600),
        pytest.param('model.backbone.arch.num_layers', 10_000, marks=pytest.mark.slow),
        ('model.backbone.img_size', 60_000),
        ('model.neck.decoder_embed_dim', 100_000),
        pytest.param('model.neck.decoder_depth', 5_000, marks=pytest.mark.slow),
    ],
)
def test_models_far_larger_than_their_weights(milan_cfg, tmp_path, place, value):
    weights = build_model(milan_cfg).state_dict()
    values = put(base(), 'model', milan_cfg | dict(data_preprocessor=base()['model']['data_preprocessor']))
    values = put(values, place, value)
    path = write(tmp_path / 'weights.pth', values, weights)
    with pytest.raises(InputError, match='The model of .*weights.pth is far larger than the weights beside it'):
        mmmilan.get_model(path, encoder_only='backbone' in place)


@pytest.mark.parametrize(
    'text',
    [
        'a = ' + '[' * 5000 + ']' * 5000,
        'model = {[]: 1}',
        'model = {{1}}',
        'model = 1\x00',
        'model = dict()\nfilename = "x"',
        'model = dict()\n_base_ = "x.py"',
        'model = ' + '9' * 5000,
        'model = -"a"',
        'model = 1',
        '',
    ],
)
@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
def test_texts_that_are_no_config(tmp_path, text, ending):
    path = tmp_path / f'weights.{ending}'
    save_checkpoint_file({'state_dict': {'a': torch.zeros(1)}, 'meta': dict(cfg=text)}, path)
    with pytest.raises(InputError) as error:
        mmmilan.get_model(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


# -- what passes


def honest_configs() -> list[Path]:
    ours = [path for path in sorted(ROOT.glob('configs/**/*.py')) if '_base_' not in path.parts]
    others = [
        ('mmpretrain', 'resnet/resnet50_8xb32_in1k.py'),
        ('mmpretrain', 'swin_transformer/swin-base_16xb64_in1k.py'),
        ('mmpretrain', 'milan/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py'),
        ('mmdet', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'),
        ('mmdet', 'retinanet/retinanet_r50_fpn_1x_coco.py'),
        ('mmdet', 'dino/dino-4scale_r50_8xb2-12e_coco.py'),
        ('mmseg', 'upernet/upernet_r50_4xb4-160k_ade20k-512x512.py'),
        ('mmseg', 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'),
    ]
    packages = Path(importlib.util.find_spec('mmpretrain').origin).parents[1]
    return [*ours, *(packages / package / '.mim/configs' / name for package, name in others)]


@pytest.mark.slow
def test_honest_configs_pass():
    for path in honest_configs():
        cfg = Config.fromfile(path)
        read = parse_config(cfg.pretty_text, str(path))
        assert read.to_dict() == cfg.to_dict()
        check_foreign_config(read.to_dict(), str(path))


# Calls by which a component runs code, reads pickles or deletes folders.
DANGEROUS = {
    'eval', 'exec', '__import__', 'import_module', 'rmtree', 'system', 'check_call', 'check_output', 'Popen',
    'from_pretrained', 'fromfile', 'Unpickler', 'pickle.load', 'pickle.loads', 'get_object_from_string',
}  # fmt: skip
HARMLESS = {
    'mmengine.dataset.base_dataset.BaseDataset': 'reads what it pickled itself, in memory',
    'mmengine.hooks.checkpoint_hook.CheckpointHook': 'deletes earlier checkpoints of the run',
    'mmengine._strategy.base.BaseStrategy': 'asks for platform.system',
    'mmengine.runner.runner.Runner': 'asks for platform.system',
    'mmpretrain.datasets.cifar.CIFAR10': 'compares pickles with hashes of its own before it reads them',
}


def calls(node: ast.AST) -> set[str]:
    """The names of functions that are called in a class."""
    names = set()
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            names.add(call.func.id)
        elif isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            owner = call.func.value
            names |= {call.func.attr} - {'eval', 'exec'}  # of modules
            names |= {f'{owner.id}.{call.func.attr}'} if isinstance(owner, ast.Name) else set()
    return names


@pytest.mark.slow
def test_no_registered_type_that_passes_runs_code():
    """Reads the source of every type: an upgrade of a package may bring new ones."""
    found = {}
    for scope in SCOPES:
        if scope == 'mmcv':
            continue
        for registry in list(vars(importlib.import_module(f'{scope}.registry')).values()):
            if isinstance(registry, Registry):
                registry.import_from_location()
                found |= {value: name for name, value in registry.module_dict.items() if inspect.isclass(value)}
    assert len(found) > 1000
    dangerous = {}
    for kind in {base for registered in found if is_allowed(registered) for base in registered.__mro__}:
        if kind.__module__.startswith(SCOPES):
            tree = parsed(inspect.getsourcefile(kind))
            body = next(each for each in ast.walk(tree) if getattr(each, 'name', '') == kind.__name__)
            called = calls(body) & DANGEROUS
            if called:
                dangerous[f'{kind.__module__}.{kind.__name__}'] = called
    assert dangerous.keys() <= HARMLESS.keys(), dangerous


@functools.lru_cache
def parsed(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding='utf-8'))
