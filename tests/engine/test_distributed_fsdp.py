"""A model in shards over two processes trains, is saved and resumed as a whole one is."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from mmengine._strategy import BaseStrategy
from mmengine.config import Config
from mmengine.registry import STRATEGIES
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.distributed.tensor import DTensor

from helpers import ROOT, assert_identical, assert_same_weights, read_scalars
from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.checkpoints.loading import load_weights
from mmmilan.engine.compilation import compile_model
from mmmilan.engine.distributed import transformer_blocks
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from processes import run_group, run_script_on_ranks

FSDP = Config.fromfile(ROOT / 'configs/milan/milan_vit-large-p16_16xb256-amp-coslr-400e-fsdp_in1k.py')
DDP = dict(type='DDPStrategy', model_wrapper=dict(type='MMDistributedDataParallel', device_ids=None))


def prepare(strategy: dict, cfg: dict, folder: str) -> BaseStrategy:
    """A strategy with the model, and an optimizer that clips gradients to less than their norm."""
    optimizer = dict(type='AdamW', lr=1e-2, weight_decay=0.05, fused=True)
    wrapper = dict(FSDP.optim_wrapper, type='OptimWrapper', optimizer=optimizer, clip_grad=dict(max_norm=0.01))
    strategy = STRATEGIES.build(strategy | dict(work_dir=folder, experiment_name='fsdp', log_kwargs=dict(log_level=40)))
    torch.manual_seed(dist.get_rank())  # rank 0's weights are sent to all
    strategy.prepare(cfg, optim_wrapper=wrapper)
    return strategy


def train(strategy: BaseStrategy, steps: range) -> list[float]:
    """Norms of the gradients of some steps, each process with its own images."""
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        images = torch.randn(4, 3, 64, 64, generator=generator)
        masks = [torch.randperm(16, generator=generator) >= 4 for _ in images]
        data = dict(inputs=images, data_samples=[DataSample().set_mask(mask) for mask in masks])
        strategy.model.train_step(data, strategy.optim_wrapper)
        norms.append(float(strategy.optim_wrapper.message_hub.get_scalar('train/grad_norm').current()))
    return norms


def whole_weights(strategy: BaseStrategy) -> dict[str, Tensor]:
    state = strategy.model.state_dict()
    return {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in state.items()}


def work(folder: str, cfg: dict) -> None:
    state = dict(ddp=[], fsdp=[])
    ddp = prepare(DDP, cfg, folder)
    state['ddp_norms'] = train(ddp, range(3))
    ddp.save_checkpoint(f'{folder}/ddp.pth')

    cfg['backbone']['with_cp'] = cfg['neck']['with_cp'] = True  # as the config has it
    fsdp = prepare(FSDP.strategy.to_dict(), cfg, folder)
    state['fsdp_norms'] = train(fsdp, range(3))
    state['sharded'] = {name: isinstance(p, DTensor) for name, p in fsdp.model.named_parameters()}
    fsdp.save_checkpoint(f'{folder}/fsdp.pth', extra_ckpt=dict(meta=dict(iter=3)))
    dist.barrier()
    train(fsdp, range(3, 5))
    state['uninterrupted'] = whole_weights(fsdp)

    resumed = prepare(FSDP.strategy.to_dict(), cfg, folder)
    resumed.resume(f'{folder}/fsdp.pth')
    train(resumed, range(3, 5))
    state['resumed'] = whole_weights(resumed)
    state['momentum'] = max(
        v.to_local().untyped_storage().nbytes() / v.to_local().nbytes
        for s in resumed.optim_wrapper.optimizer.state.values()
        for v in s.values()
        if isinstance(v, DTensor) and v.to_local().numel()
    )

    compiled = prepare(FSDP.strategy.to_dict(), cfg, folder)
    compile_model(compiled.model, backend='aot_eager')
    state['compiled_norms'] = train(compiled, range(3))
    state['compiled'] = whole_weights(compiled)

    incomplete = load_checkpoint_file(f'{folder}/fsdp.pth')
    del incomplete['state_dict']['neck.mask_token']
    try:
        load_weights(resumed.model, incomplete, 'the file')
    except InputError as error:
        state['refused'] = str(error)
    torch.save(state, f'{folder}/rank{dist.get_rank()}.pth')


@pytest.fixture
def processes(milan_cfg, tmp_path):
    run_group(work, str(tmp_path), milan_cfg)
    return [torch.load(tmp_path / f'rank{rank}.pth') for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes(processes, milan_cfg, tmp_path):
    for state in processes:
        assert all(state['sharded'].values())
        # clipped by the norm of all shards together
        assert state['fsdp_norms'] == pytest.approx(state['ddp_norms'], rel=1e-5)
        assert state['compiled_norms'] == pytest.approx(state['ddp_norms'], rel=1e-5)
        for key, value in state['uninterrupted'].items():
            assert torch.equal(state['resumed'][key], value), key
        assert state['momentum'] == 1  # no shard keeps the whole tensor in memory
        assert 'missing neck.mask_token' in state['refused']

    ddp, fsdp = (load_checkpoint_file(tmp_path / f'{name}.pth') for name in ('ddp', 'fsdp'))
    ddp['state_dict'] = {key.removeprefix('module.'): value for key, value in ddp['state_dict'].items()}
    assert_same_weights(fsdp['state_dict'], ddp['state_dict'])
    assert_same_weights(processes[0]['compiled'], ddp['state_dict'])
    MODELS.build(milan_cfg).load_state_dict(fsdp['state_dict'])
    assert fsdp['optimizer']['param_groups'] == ddp['optimizer']['param_groups']
    assert fsdp['optimizer']['state'].keys() == ddp['optimizer']['state'].keys()
    for index, moments in ddp['optimizer']['state'].items():
        for name, value in moments.items():
            torch.testing.assert_close(fsdp['optimizer']['state'][index][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('decoder', ['PromptingDecoder', 'MAEDecoder'])
def test_blocks(milan_cfg, decoder):
    milan_cfg['neck']['type'] = f'mmmilan.{decoder}'
    model = MODELS.build(milan_cfg)
    assert transformer_blocks(model) == [*model.backbone.layers, *model.neck.decoder_blocks]


@pytest.mark.slow
def test_training(tiny_config, tmp_path):
    """By the tools, with all default hooks, compiled: a resumed run ends as an uninterrupted one, bit by bit."""
    changes = {'runner_type': FSDP.runner_type, 'strategy': FSDP.strategy.to_dict()}
    changes |= {'optim_wrapper.type': 'OptimWrapper', 'train_dataloader.num_workers': 0}
    changes |= {'default_hooks.compile.enabled': True, 'default_hooks.compile.backend': 'aot_eager'}
    run_script_on_ranks('train.py', 2, tiny_config(changes))
    losses = [record['loss'] for record in read_scalars(tmp_path / 'work')]
    assert len(losses) == 6 and losses[-1] < losses[0]
    other = tiny_config(changes | {'work_dir': str(tmp_path / 'other')})
    run_script_on_ranks('train.py', 2, other, '--resume', tmp_path / 'work/epoch_1.pth')
    assert_identical(*(load_checkpoint_file(tmp_path / folder / 'epoch_2.pth') for folder in ('other', 'work')))
