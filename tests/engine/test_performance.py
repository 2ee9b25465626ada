"""Speed: what computes faster computes the same, what is counted is right, and the benchmark and the log say it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmpretrain.structures import DataSample
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import mmmilan.engine.compilation as compilation
from helpers import ROOT, read_scalars, real_data, run_script
from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.engine import CompileHook, DeferredRuntimeInfoHook, NonFiniteLossHook
from mmmilan.engine.compilation import compile_model
from mmmilan.engine.flops import counted_flops, peak_tflops
from mmmilan.errors import InputError
from mmmilan.models import MILAN
from mmmilan.registry import MODELS

# -- the benchmark

TINY = ['--arch', 'tiny', '--img-size', 64, '--batch-size', 2, '--rounds', 2, '--warmup', 0, '--device', 'cpu']
FIGURES = {'images_per_s', 'ms', 'ms_by_part', 'gflops_per_image', 'mfu', 'peak_memory_mb'}


def benchmark(run_tool, path, *args: object) -> dict:
    threads = torch.get_num_threads()
    run_tool('speed/benchmark.py', *args, '--json', path)
    torch.set_num_threads(threads)
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ('command', 'options', 'parts'),
    [
        ('step', ['--peak-tflops', 1], {'teacher', 'encoder, decoder', 'backward', 'optimizer'}),
        ('step', ['--dtype', 'bfloat16'], {'teacher', 'encoder, decoder', 'backward', 'optimizer'}),
        ('teacher', [], set()),
        ('decoder', [], {'forward', 'backward'}),
        ('detection', [], {'forward', 'backward'}),
        ('segmentation', [], {'forward', 'backward'}),
    ],
)
def test_benchmark(run_tool, tmp_path, command, options, parts):
    if command in ('detection', 'segmentation'):
        pytest.importorskip('mmseg')
    report = benchmark(run_tool, tmp_path / 'report.json', command, *TINY, *options)
    ours, *others = report['contestants'].values()
    assert list(report['contestants'])[0] == 'mmmilan' and others
    theirs = next(v for name, v in report['contestants'].items() if not name.startswith('mmmilan'))
    assert report['ratio'] == pytest.approx(ours['images_per_s'] / theirs['images_per_s'])
    assert report['machine']['device'] and report['settings']['batch_size'] == '2'
    for figures in (ours, *others):
        assert FIGURES.issubset(figures) and set(figures['ms_by_part']) == parts
        assert figures['images_per_s'] == pytest.approx(2000 / figures['ms']['median'])
        assert figures['gflops_per_image'] > 0
        low, high = figures['ms']['quartiles']
        assert low <= figures['ms']['median'] <= high
    if '--dtype' in options:
        assert [figures['precision'] for figures in others] == ['bfloat16', 'float32']
    if '--peak-tflops' in options:
        assert ours['mfu'] == pytest.approx(ours['gflops_per_image'] * ours['images_per_s'] / 1000)


def test_benchmark_of_less_computation(run_tool, tmp_path):
    """Each option is compared with mmpretrain's MILAN by its masked views, and takes fewer operations a view."""
    options = {'2-masks': 2, '4-masks-third': 4, 'fast': 2, 'alignment': 1, 'cached': 1}
    report = benchmark(run_tool, tmp_path / 'report.json', 'step', *TINY, '--options', *options)
    theirs, ours = report['contestants']['mmpretrain in float32'], report['contestants']['mmmilan']
    for name, masks in options.items():
        figures = report['contestants'][f'mmmilan, {name}']
        assert figures['masked_views_per_s'] == pytest.approx(masks * figures['images_per_s'])
        ratio = figures['masked_views_per_s'] / theirs['images_per_s']
        assert report['option_ratios'][f'mmmilan, {name}'] == pytest.approx(ratio)
        assert figures['gflops_per_image'] / masks < ours['gflops_per_image']


def test_benchmark_of_the_same_work(run_tool, tmp_path):
    """Decoders of the same size take the same operations; what ours saves in the step is in encoder and teacher."""
    decoders = benchmark(run_tool, tmp_path / 'decoder.json', 'decoder', *TINY)['contestants']
    assert decoders['mmmilan']['gflops_per_image'] == pytest.approx(decoders['mmpretrain']['gflops_per_image'])


def test_benchmark_of_data(run_tool, image_folder, tmp_path):
    with pytest.raises(SystemExit, match='error: The data command has no images; give --data-root'):
        run_tool('speed/benchmark.py', 'data', *TINY)
    report = benchmark(run_tool, tmp_path / 'report.json', 'data', *TINY, '--data-root', image_folder)
    ours, default, fast = report['contestants'].values()
    assert ours['pixel_difference'] < 0.3 < fast['pixel_difference'] and default['pixel_difference'] == 0


# -- operations


def block_flops(tokens: int, width: int, hidden: int) -> int:
    """A transformer block: 4 projections, 2 products of attention, 2 layers of the FFN."""
    return 2 * tokens * (4 * width**2 + 2 * width * hidden) + 4 * tokens**2 * width


def counted(function, *args: object) -> int:
    with counted_flops() as counter:
        function(*args)
    return counter.get_total_flops()


def test_flops_of_the_encoder(milan_cfg):
    model = MODELS.build(milan_cfg)
    images, visible = torch.randn(2, 3, 64, 64), torch.arange(4).expand(2, -1)
    embedding = 2 * 4 * (3 * 16**2) * 48  # of the visible patches alone
    assert counted(model.backbone, images, visible) == 2 * (embedding + 2 * block_flops(5, 48, 192))
    backbone = MODELS.build(milan_cfg['backbone'])

    def forward_and_backward() -> None:
        backbone(images, visible).sum().backward()

    # of each product two in the backward pass, but for the patches, which have no gradient; attention forms its
    # scores once more: 5 products for 2
    expected = embedding * 2 + 2 * (3 * block_flops(5, 48, 192) + 2 * 5**2 * 48)
    assert counted(forward_and_backward) == 2 * expected


def test_flops_of_the_decoder(milan_cfg):
    model = MODELS.build(milan_cfg)
    order = torch.arange(16).expand(2, -1)
    width, hidden, prompts, masked = 32, 128, 5, 12
    block = 2 * masked * (2 * width**2 + 2 * width * hidden)  # queries, output projection, FFN
    block += 2 * (prompts + masked) * 2 * width**2  # keys and values
    block += 4 * masked * (prompts + masked) * width
    expected = 2 * prompts * 48 * width + 2 * block + 2 * (prompts + masked) * width * 24
    assert counted(model.neck, torch.randn(2, 5, 48), order[:, :4], order[:, 4:]) == 2 * expected


def test_flops_of_the_teacher(milan_cfg):
    teacher = MODELS.build(milan_cfg).head.teacher
    width, tokens = teacher.visual.conv1.out_channels, 17
    blocks = len(teacher.visual.transformer.resblocks)
    embedding = 2 * 16 * (3 * 16**2) * width
    # one row of attention: the class token's query, carried through the keys' weights, against all tokens
    heads = teacher.visual.transformer.resblocks[0].attn.num_heads
    importance = 2 * width**2 + 2 * width**2 + 2 * heads * tokens * width
    expected = embedding + blocks * block_flops(tokens, width, 4 * width) + 2 * tokens * width * 24 + importance
    assert counted(teacher, torch.randn(2, 3, 64, 64)) == 2 * expected


def test_peak_of_known_devices(monkeypatch):
    names = {
        'NVIDIA A100-SXM4-80GB': 312,
        'NVIDIA H100 PCIe': 756.5,
        'NVIDIA H100 80GB HBM3': 989.4,
        'NVIDIA H200 NVL': 835.5,
        'NVIDIA L4': 121,
        'NVIDIA L40': 181,
        'NVIDIA A40': 149.7,
        'NVIDIA GeForce RTX 5090': 209.5,
        'NVIDIA RTX A4000': None,
        'NVIDIA GeForce RTX 4090 Laptop GPU': None,
        'NVIDIA A100-SXM4-40GB MIG 3g.20gb': None,
        'Voodoo 2': None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device, name=name: name)
        assert peak_tflops(torch.device('cuda'), torch.bfloat16) == peak, name
    assert peak_tflops(torch.device('cpu'), torch.bfloat16) is None


# -- switches that change no result


def compiled(cfg: dict, **options) -> MILAN:
    """The model of a config as a run with :class:`CompileHook` trains it."""
    model = MODELS.build(cfg)
    CompileHook(enabled=True, **options).before_train(SimpleNamespace(model=model))
    return model


def step(cfg: dict, build: Callable[[dict], MILAN] = MODELS.build) -> tuple[MILAN, float, dict[str, Tensor]]:
    """Loss and gradients of a model with fixed weights, images and masks."""
    torch.manual_seed(0)
    model = build(cfg)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    images = torch.randn(4, 3, 64, 64)
    masks = [DataSample().set_mask(torch.randperm(16) >= 4) for _ in range(4)]
    loss = model.loss(images, masks)['loss']
    loss.backward()
    return model, loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: tuple, expected: tuple) -> None:
    assert actual[1] == pytest.approx(expected[1], rel=1e-5)
    assert actual[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert (actual[2][name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_compiled_gives_the_same(milan_cfg):
    """All of ``torch.compile`` but the generation of code, which takes minutes here."""
    milan_cfg['backbone']['arch']['num_layers'] = milan_cfg['neck']['decoder_depth'] = 1
    expected = step(milan_cfg)
    actual = step(milan_cfg, partial(compiled, backend='aot_eager_decomp_partition'))
    assert_same(actual, expected)
    assert actual[0].state_dict().keys() == expected[0].state_dict().keys()


@pytest.fixture
def graphs():
    """Counts what is compiled: a function that gives the number of graphs so far and the reasons of breaks."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: (counters['stats']['unique_graphs'], list(counters['graph_break']))
    torch._dynamo.reset()


def test_the_loss_is_one_graph(milan_cfg, graphs):
    """No break, and none is compiled again; evaluation and masks of the pipeline are left to themselves."""
    model = compiled(milan_cfg, backend='eager')
    for _ in range(3):
        model.loss(torch.randn(4, 3, 64, 64), [DataSample() for _ in range(4)])['loss'].backward()
        assert graphs() == (2, [])  # the first is the trial
    model.eval()
    model.loss(torch.randn(3, 3, 64, 64))
    assert graphs() == (2, [])


@pytest.mark.parametrize('name', ['mmpretrain.VisionTransformer', 'mmmilan.DenseViT'])
def test_an_encoder_is_one_graph(name, graphs):
    """With stochastic depth, whose rates are NumPy's in mmpretrain."""
    arch = dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96)
    settings = dict(window_size=3, rel_pos_bias=True, out_indices=(0, 1, 2, 3)) if 'Dense' in name else {}
    encoder = MODELS.build(dict(type=name, arch=arch, img_size=64, drop_path_rate=0.1, **settings))
    model = nn.Module()
    model.backbone = encoder
    encoder.train()
    compile_model(model, backend='eager', fullgraph=True)
    for _ in range(3):
        sum(each.sum() for each in encoder(torch.randn(2, 3, 64, 64))).backward()
        assert graphs() == (1, [])


def test_blocks_of_a_sharded_model_are_compiled(milan_cfg, monkeypatch, graphs):
    """The hooks of FSDP stand between them."""
    monkeypatch.setattr(compilation, 'DTensor', nn.Parameter)
    model = MODELS.build(milan_cfg)
    compile_model(model, backend='eager')
    for _ in range(2):
        model.loss(torch.randn(4, 3, 64, 64))['loss'].backward()
        assert graphs() == (2, [])  # of the blocks of the encoder, and of those of the decoder


def test_compiles_on_a_gpu_alone(milan_cfg):
    model = MODELS.build(milan_cfg)
    CompileHook().before_train(SimpleNamespace(model=model))
    assert 'mean_loss' not in vars(model)


def test_where_a_step_begins(monkeypatch):
    """CUDA graphs are told, or a part would overwrite what another one needs."""
    calls = []
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin', lambda: calls.append('begin'))
    CompileHook().before_train_iter(None, 0)
    assert calls == ['begin']


def kept_for_backward(cfg: dict, build: Callable[[dict], MILAN] = MODELS.build) -> tuple[int, int]:
    """Bytes of activations that a forward pass on 64 images keeps, and FLOPs of the backward pass's matrix products."""
    torch.manual_seed(0)
    model = build(cfg)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(torch.randn(64, 3, 64, 64))['loss']
    with counted_flops() as counter:
        loss.backward()
    return sum(kept.values()), counter.get_flop_counts()['Global'][torch.ops.aten.mm]


def test_compiled_keeps_less_for_the_backward_pass(milan_cfg):
    """Norms and GELUs are computed again, products of matrices are not."""
    kept, flops = kept_for_backward(milan_cfg)
    build = partial(compiled, backend='aot_eager_decomp_partition')
    kept_compiled, flops_compiled = kept_for_backward(milan_cfg, build)
    assert kept_compiled < 0.75 * kept
    assert flops_compiled == flops


def test_no_compiler(milan_cfg, monkeypatch, log):
    """A warning, and the run goes on."""

    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError('No working C++ compiler found\nand more')

    monkeypatch.setattr(compilation.torch, 'compile', missing)
    actual = step(milan_cfg, compiled)
    monkeypatch.undo()
    assert_same(actual, step(milan_cfg))
    assert 'Not compiled, the model runs as it is: No working C++ compiler found' in log.text


@pytest.mark.parametrize('decoder', ['PromptingDecoder', 'MAEDecoder'])
def test_activation_checkpointing_gives_the_same(milan_cfg, decoder):
    milan_cfg['neck']['type'] = f'mmmilan.{decoder}'
    expected = step(milan_cfg)
    milan_cfg['backbone']['with_cp'] = milan_cfg['neck']['with_cp'] = True
    blocks = counted_calls(milan_cfg)
    assert_same(step(milan_cfg), expected)
    assert blocks == 2 * 4  # two blocks each of encoder and decoder, forward and again in the backward pass


def counted_calls(cfg: dict) -> int:
    """How often blocks of encoder and decoder run in one step."""
    calls = []
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    for block in (*model.backbone.layers, *model.neck.decoder_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.loss(torch.randn(2, 3, 64, 64))['loss'].backward()
    return len(calls)


def test_groups_of_parameters(milan_cfg):
    """Weights, norms and biases, tokens; after three fused steps the same weights as from MMEngine's many groups."""
    cfg = Config.fromfile(ROOT / 'configs/_base_/pretrain_adamw_coslr_400e.py').optim_wrapper
    cfg.type = 'OptimWrapper'
    plain = cfg.copy()
    plain.pop('constructor')
    plain.optimizer = {key: value for key, value in cfg.optimizer.items() if key != 'fused'}
    assert cfg.optimizer.fused
    weights, sizes = [], []
    for each in (cfg, plain):
        torch.manual_seed(0)
        model = MODELS.build(milan_cfg)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        wrapper = build_optim_wrapper(model, each)
        sizes.append(len(wrapper.optimizer.param_groups))
        for _ in range(3):
            wrapper.update_params(sum(p.square().sum() * (1 + i) for i, p in enumerate(model.parameters())))
        weights.append(model.state_dict())
    assert sizes[0] == 3 and sizes[1] > 50
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_zero(tiny_config, tmp_path, processes):
    """Processes that share out the optimizer's states go on where a plain run was, and end where it ends."""
    cfg = Config.fromfile(ROOT / 'configs/milan/milan_vit-large-p16_16xb256-amp-coslr-400e-zero_in1k.py')
    base = {'train_dataloader.num_workers': 0, 'train_dataloader.batch_size': 24 // processes}
    run_script('dist_train.sh', tiny_config(base), processes)
    zero = base | {
        'optim_wrapper.optimizer': cfg.optim_wrapper.optimizer.to_dict(),
        'default_hooks.checkpoint': cfg.default_hooks.checkpoint.to_dict(),
        'work_dir': str(tmp_path / 'zero'),
    }
    run_script('dist_train.sh', tiny_config(zero), processes, '--resume', tmp_path / 'work/epoch_1.pth')
    expected, actual = (load_checkpoint_file(tmp_path / name / 'epoch_2.pth') for name in ('work', 'zero'))
    for name, value in expected['state_dict'].items():
        torch.testing.assert_close(actual['state_dict'][name], value, rtol=1e-5, atol=1e-6)
    states = expected['optimizer']['state']
    assert set(actual['optimizer']['state']) == set(states)
    for i, state in states.items():
        torch.testing.assert_close(actual['optimizer']['state'][i]['exp_avg'], state['exp_avg'], rtol=1e-4, atol=1e-7)


# -- the log


def test_throughput_in_the_log(tiny_config, run_tool, tmp_path):
    hooks = [dict(type='mmmilan.ThroughputHook', peak_tflops=0.001)]
    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    logger = dict(type='LoggerHook', interval=3)  # whose lines do not depend on the time
    changes = {'custom_hooks': hooks, 'default_hooks.logger': logger, 'visualizer.vis_backends': backends}
    changes |= {'log_processor': dict(window_size=3), 'train_dataloader.num_workers': 0}
    run_tool('train.py', tiny_config(changes))
    names = ['images_per_s', 'mfu', 'data_wait', 'peak_memory_gb', 'hours_left']
    records = read_scalars(tmp_path / 'work')
    assert len(records) == 4  # two epochs of six steps
    for record in records:
        assert set(names) <= set(record)
        assert record['images_per_s'] == pytest.approx(4 / record['time'])
        assert 0 <= record['data_wait'] <= 1 and record['peak_memory_gb'] > 0.1
    flops = {record['mfu'] * 1e9 / record['images_per_s'] for record in records}
    assert max(flops) == pytest.approx(min(flops))  # of an image
    assert [record['hours_left'] > 0 for record in records] == [True, True, True, False]

    (log,) = (tmp_path / 'work').glob('*/*.log')
    lines = [line for line in log.read_text().splitlines() if 'Epoch(train)' in line]
    assert len(lines) == 4 and all(f'{name}: ' in line for name in names for line in lines)
    (events,) = (tmp_path / 'work').glob('*/vis_data/events*')
    accumulator = EventAccumulator(str(events)).Reload()
    for name in names:
        assert [event.value for event in accumulator.Scalars(name)] == pytest.approx([r[name] for r in records])


def test_no_peak_no_mfu(tiny_config, run_tool, tmp_path):
    run_tool('train.py', tiny_config({'train_cfg.max_epochs': 1, 'train_dataloader.num_workers': 0}))
    assert all('mfu' not in record and 'images_per_s' in record for record in read_scalars(tmp_path / 'work'))


def test_counting_leaves_the_run_as_it_is(tiny_config, run_tool, tmp_path):
    """Also with accumulated gradients, and with a batch of more images than are counted."""
    losses, flops = [], []
    for accumulative_counts, hooks in ((1, False), (1, True), (2, True), (2, False)):
        hooks = [dict(type='mmmilan.ThroughputHook', peak_tflops=0.001)] if hooks else []
        changes = {'custom_hooks': [dict(type='mmmilan.StepSeedHook'), *hooks], 'train_dataloader.num_workers': 0}
        changes |= {'train_dataloader.batch_size': 8, 'optim_wrapper.accumulative_counts': accumulative_counts}
        changes |= {'train_cfg.max_epochs': 1, 'param_scheduler': None}
        work_dir = tmp_path / f'{len(losses)}'
        run_tool('train.py', tiny_config(changes | {'work_dir': str(work_dir)}))
        records = read_scalars(work_dir)
        losses.append([record['loss'] for record in records])
        flops += [record['mfu'] * 1e9 / record['images_per_s'] for record in records if 'mfu' in record][:1]
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]
    assert flops[0] == pytest.approx(flops[1], rel=1e-6)


def test_losses_are_fetched_together():
    """When a line of the log is due, or the epoch ends."""
    hub = MessageHub('losses')
    runner = SimpleNamespace(hooks=[LoggerHook(interval=3)], message_hub=hub, train_dataloader=[None] * 7)
    hook, loss = DeferredRuntimeInfoHook(), torch.zeros(())
    for i in range(7):
        loss += 1  # in place, as a CUDA graph would
        hook.after_train_iter(runner, i, None, dict(loss=loss))
        fetched = hub.log_scalars['train/loss'].data[0].tolist() if 'train/loss' in hub.log_scalars else []
        assert fetched == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0][: (0, 0, 3, 3, 3, 6, 7)[i]]


def test_bad_loss_between_two_lines_of_the_log(tiny_config, run_tool, tmp_path):
    """Found at the next line, told with the step at which it was, and not saved."""
    explosion = dict(type='MultiStepLR', by_epoch=False, milestones=[8], gamma=1e40)
    changes = {'param_scheduler': [explosion], 'default_hooks.logger.interval': 50}
    changes['train_dataloader.num_workers'] = 0
    with pytest.raises(SystemExit, match=r'error: The loss is nan at iteration 10 \(epoch 2\); resume from .*epoch_1'):
        run_tool('train.py', tiny_config(changes))
    assert [path.name for path in (tmp_path / 'work').glob('*.pth')] == ['epoch_1.pth']


def test_bad_weights_are_not_saved_between_two_lines_of_the_log(tmp_path):
    runner = SimpleNamespace(iter=7, epoch=0, work_dir=str(tmp_path))
    hook = NonFiniteLossHook()
    hook.before_save_checkpoint(runner, dict(state_dict=dict(weight=torch.zeros(2), steps=torch.tensor(3))))
    with pytest.raises(InputError, match='The weights are not finite after iteration 7'):
        hook.before_save_checkpoint(runner, dict(state_dict=dict(weight=torch.tensor([0.0, torch.nan]))))


# -- the bars on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize('options', [[], ['--compile']], ids=['plain', 'compiled'])
def test_bars_on_a_gpu(run_tool, tmp_path, options):
    """The step, ViT-B/16, batch 256, bfloat16, against mmpretrain's in the same precision, as computed beforehand.

    By tools/speed/estimate.py, for an A100, the work of both is the same. mmpretrain's takes 256 ms as it is;
    ours 171 ms, and 129 compiled. At the peak ours has 13.4 GB against 17.1, some 9.9 compiled. The bars
    leave room for what the assumptions miss. The figures for docs/performance.md are written to work_dirs/speed.
    """
    path = ROOT / f'work_dirs/speed/step{"-compiled" if options else ""}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    report = benchmark(run_tool, path, 'step', *options, '--warmup', 5, '--rounds', 10)
    assert report['ratio'] >= (1.3 if options else 1.1)
    assert report['memory_ratio'] <= (0.65 if options else 0.85)
    mfu = report['contestants']['mmmilan']['mfu']
    assert mfu is None or mfu >= (0.3 if options else 0.25)  # None: a GPU whose peak is not known here


@pytest.mark.gpu
@pytest.mark.parametrize('command', ['teacher', 'decoder', 'detection', 'segmentation'])
def test_figures_on_a_gpu(run_tool, tmp_path, command):
    """Parts of the step and the encoders of dense tasks are no slower than the incumbents'."""
    path = ROOT / f'work_dirs/speed/{command}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    assert benchmark(run_tool, path, command, '--warmup', 5, '--rounds', 10)['ratio'] >= 0.95


@pytest.mark.slow
@pytest.mark.data
def test_bar_of_the_input_pipeline(run_tool, tmp_path):
    """Twice mmpretrain's default on real images; a timing, for an idle machine."""
    folder = real_data('imagenet_sample/train')
    assert benchmark(run_tool, tmp_path / 'data.json', 'data', '--data-root', folder)['ratio'] >= 2
