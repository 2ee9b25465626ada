"""What several tests use."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import Process
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmmilan.engine.distributed import end_processes
from mmmilan.models.teachers import Teacher
from mmmilan.registry import MODELS

ROOT = Path(__file__).parent.parent


def real_data(name: str) -> Path:
    """A folder or file below ``MMMILAN_TEST_DATA``; the test is skipped where it is missing."""
    folder = os.environ.get('MMMILAN_TEST_DATA')
    if not folder or not Path(folder, name).exists():
        pytest.skip(f'set MMMILAN_TEST_DATA to a folder that holds {name}')
    return Path(folder, name)


# -- tools and runs


def run_script(script: str, *args: object) -> str:
    """Runs a shell script of tools/ in processes of its own; it must succeed. What it printed."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(OMP_NUM_THREADS='1', PORT=str(port))
    environment['PATH'] = f'{Path(sys.executable).parent}:{environment["PATH"]}'
    command = ['bash', ROOT / 'tools' / script, *map(str, args)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start_ranks(target: Callable, *args: object, processes: int = 2, launcher: bool = True) -> list[Process]:
    """Forks of this process, each with the environment of a rank, that call ``target(*args)``.

    They have everything imported, which takes a new process seconds. They meet at a store of this process, as at that
    of torchrun, or without a launcher at one of rank 0, as under Slurm.
    """
    store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    port = store.port
    if not launcher:
        del store
    ranks = []
    for rank in range(processes):
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        environment['TORCHELASTIC_USE_AGENT_STORE'] = launcher
        process = multiprocessing.get_context('fork').Process(target=_be_rank, args=(environment, target, args))
        process.start()
        process.store = store if launcher else None  # for as long as it lives
        ranks.append(process)
    return ranks


def _be_rank(environment: dict[str, object], target: Callable, args: tuple) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    target(*args)


def exit_codes(ranks: list[Process], seconds: float = 60) -> list[int | None]:
    """How processes ended; None for one that had to be killed after some seconds."""
    try:
        for rank in ranks:
            rank.join(seconds)
        return [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def run_group(step: Callable, *args: object) -> None:
    """Two ranks call ``step(*args)`` in a process group of gloo; they must succeed."""
    assert exit_codes(start_ranks(_in_group, step, args), 240) == [0, 0]


def _in_group(step: Callable, args: tuple) -> None:
    dist.init_process_group('gloo')
    step(*args)
    end_processes()


def run_script_on_ranks(script: str, processes: int, *args: object) -> None:
    """Runs a script of tools/ on ranks; they must succeed."""
    ranks = start_ranks(_be_script, script, args, processes=processes)
    assert exit_codes(ranks, 240) == [0] * processes


def _be_script(script: str, args: tuple) -> None:
    sys.argv = [script, *map(str, args), '--launcher', 'pytorch']
    runpy.run_path(str(ROOT / 'tools' / script), run_name='__main__')


def read_scalars(work_dir: Path) -> list[dict]:
    """What a run in ``work_dir`` logged at each step (the last run, if there were several)."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_trusted(path: Path) -> dict:
    """A checkpoint of this test, read without care."""
    return torch.load(path, weights_only=False)


def assert_identical(actual: dict, expected: dict) -> None:
    """Weights and the optimizer's moments."""
    assert actual['state_dict'].keys() == expected['state_dict'].keys()
    for key, value in expected['state_dict'].items():
        assert torch.equal(actual['state_dict'][key], value), key
    assert actual['optimizer']['state'].keys() == expected['optimizer']['state'].keys()
    for index, state in expected['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(actual['optimizer']['state'][index][key], value), (index, key)


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-6, but for biases of keys, which have no gradient but rounding, which AdamW scales up."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        other = actual[key]
        if key.endswith(('qkv.bias', '.kv.bias')):
            parts = 3 if key.endswith('qkv.bias') else 2
            other, value = (torch.cat([*x.chunk(parts)[: parts - 2], x.chunk(parts)[-1]]) for x in (other, value))
        torch.testing.assert_close(other, value, rtol=0, atol=1e-6)


# -- configs


def own_settings(path: Path) -> dict:
    """What a config file itself sets, on top of its bases."""
    text = re.sub(r'{{\$\w+:(.*?)}}', r'\1', path.read_text())  # environment variables at their defaults
    text = re.sub(r'{{_base_\..*?}}', 'None', text)  # what is taken over from the base
    text = re.sub(r', \*\*_base_\.\w+', '', text)
    settings: dict = {}
    exec(compile(text, path, 'exec'), settings)
    return {key: value for key, value in settings.items() if not key.startswith('__')}


def restated(own: dict, inherited: dict, prefix: str = '') -> Iterator[str]:
    """Keys whose value is the inherited one."""
    for key, value in own.items():
        if key in inherited and isinstance(value, dict) and isinstance(inherited[key], dict):
            if '_delete_' not in value:
                yield from restated(value, inherited[key], f'{prefix}{key}.')
        elif key in inherited and value == inherited[key]:
            yield prefix + key


def real_model(cfg: Config) -> nn.Module:
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def check_layer_decay(
    path: str, blocks: int, decay: float, rate: float, weight_decay: float, constructor: str | None = None
) -> None:
    """lr · decay^(blocks + 1 - depth): 0 is what comes before the blocks, blocks + 1 what comes after."""
    cfg = Config.fromfile(ROOT / 'configs' / path)
    model = real_model(cfg)
    cfg.optim_wrapper.type = 'OptimWrapper'  # AmpOptimWrapper asks for a GPU
    cfg.optim_wrapper.constructor = constructor or cfg.optim_wrapper.constructor
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group['params']}
    settings = {(group['lr'], group['weight_decay']) for group in optimizer.param_groups}
    assert len(settings) == len(optimizer.param_groups) <= 2 * (blocks + 2)  # not one for each parameter
    depths = set()
    for key, parameter in model.named_parameters():
        depth = blocks + 1
        if match := re.match(r'backbone\.layers\.(\d+)\.', key):
            depth = int(match[1]) + 1
        elif key.startswith(('backbone.patch_embed.', 'backbone.cls_token', 'backbone.pos_embed')):
            depth = 0
        group = groups.pop(id(parameter))
        assert group['lr'] == pytest.approx(rate * decay ** (blocks + 1 - depth), rel=1e-9), key
        spared = parameter.ndim == 1 or 'rel_pos' in key or key.endswith(('cls_token', 'pos_embed'))
        if path.startswith('detection') and key.endswith('.bias'):  # as in MIMDet, but for those of norms
            spared = isinstance(model.get_submodule(key.removesuffix('.bias')), NORMS)
        assert group['weight_decay'] == pytest.approx(0 if spared else weight_decay), key
        depths.add(depth)
    assert not groups and depths == set(range(blocks + 2))


# -- numbers


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= bound * value.norm(), name


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def clip_reference(visual: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """open_clip's own image feature, projected tokens, and attention of the class token in the last block."""
    seen = []
    last = visual.transformer.resblocks[-1]
    hook = last.ln_1.register_forward_hook(lambda module, args, output: seen.append(output))
    visual.output_tokens = True
    pooled, tokens = visual(images)
    hook.remove()
    attention = last.attn(seen[0], seen[0], seen[0], need_weights=True, average_attn_weights=True)[1]
    return pooled, tokens @ visual.proj, attention[:, 0, 1:]


def assert_clip(teacher: Teacher, images: Tensor, visual: nn.Module, own_images: Tensor) -> None:
    features, importance = teacher(images)
    pooled, tokens, attention = clip_reference(visual, own_images)
    assert relative_error(features[:, 0], pooled) < 1e-5
    assert relative_error(features[:, 1:], tokens) < 1e-5
    assert relative_error(importance, attention) < 1e-5
    assert importance.std(1).min() > 0.1 * importance.mean()
