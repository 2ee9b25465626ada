"""Few groups of parameters, and an optimizer shared out over processes, train as MMEngine's do."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from helpers import ROOT, run_script_on_ranks
from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.registry import MODELS


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
    run_script_on_ranks('train.py', processes, tiny_config(base))
    zero = base | {
        'optim_wrapper.optimizer': cfg.optim_wrapper.optimizer.to_dict(),
        'default_hooks.checkpoint': cfg.default_hooks.checkpoint.to_dict(),
        'work_dir': str(tmp_path / 'zero'),
    }
    run_script_on_ranks('train.py', processes, tiny_config(zero), '--resume', tmp_path / 'work/epoch_1.pth')
    expected, actual = (load_checkpoint_file(tmp_path / name / 'epoch_2.pth') for name in ('work', 'zero'))
    for name, value in expected['state_dict'].items():
        torch.testing.assert_close(actual['state_dict'][name], value, rtol=1e-5, atol=1e-6)
    states = expected['optimizer']['state']
    assert set(actual['optimizer']['state']) == set(states)
    for i, state in states.items():
        torch.testing.assert_close(actual['optimizer']['state'][i]['exp_avg'], state['exp_avg'], rtol=1e-4, atol=1e-7)
