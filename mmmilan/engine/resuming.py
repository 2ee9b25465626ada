"""What a checkpoint must hold for a run to go on with it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from mmmilan.engine.loops import EpochLoop
from mmmilan.errors import InputError


def check_resumable(runner: Runner, checkpoint: dict[str, Any], source: str) -> None:
    """Compare the state of a training run with what the runner has, before any of it is used.

    Names of files in it are those of the runner's own work dir afterwards, so that a run never deletes another's.

    Raises:
        InputError: the checkpoint holds weights alone, or the state of other parameters, another optimizer or schedule.
    """
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    counts = [meta.get(name) if isinstance(meta, dict) else None for name in ('epoch', 'iter')]
    if not isinstance(hub, dict) or not all(type(count) is int and count >= 0 for count in counts):
        raise InputError(
            f'{source} holds weights alone and no state of a training run, so nothing can be resumed; start a new run '
            'from it with --cfg-options load_from=FILE.'
        )
    if type(meta.get('seed', 0)) is not int:
        raise InputError(f'{source}: its seed is {meta["seed"]!r}, no whole number; give another checkpoint.')
    within = [meta.get(name, 0) for name in ('steps_of_epoch', 'epoch_length')]
    if not all(type(count) is int and count >= 0 for count in within) or within[0] > within[1]:
        raise InputError(f'{source}: it was saved {within[0]!r} of {within[1]!r} steps into an epoch; give another.')
    say_if_finished(runner, meta, source)
    if isinstance(runner.train_loop, EpochLoop):
        begin_within_epoch(runner, meta)
    checkpoint['message_hub'] = clean_message_hub(hub, Path(runner.work_dir))
    if 'optimizer' not in checkpoint:
        print_log(
            f'{source} has no optimizer state: the optimizer begins anew.', logger='current', level=logging.WARNING
        )
    elif isinstance(runner.optim_wrapper, OptimWrapper):
        fault = optimizer_fault(runner.optim_wrapper, checkpoint['optimizer'])
        if fault:
            raise InputError(f'{source}: its optimizer state {fault}; resume with the config that it was trained with.')
    if 'param_schedulers' not in checkpoint:
        print_log(f'{source} has no schedules: they begin anew.', logger='current', level=logging.WARNING)
    elif isinstance(runner.param_schedulers, list):
        check_schedules(runner.param_schedulers, checkpoint, source)


def begin_within_epoch(runner: Runner, meta: dict[str, Any]) -> None:
    """Let the loop skip what was done of the epoch, if it is still of the same length."""
    done, length = meta.get('steps_of_epoch', 0), len(runner.train_loop.dataloader)
    if done and meta['epoch_length'] != length:
        message = f'An epoch had {meta["epoch_length"]} steps and now has {length}: this one begins again.'
        print_log(message, logger='current', level=logging.WARNING)
    elif done:
        runner.train_loop.done = done


def say_if_finished(runner: Runner, meta: dict[str, Any], source: str) -> None:
    """A run that has nothing left to do."""
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    done, whole = (meta['epoch'], runner.max_epochs) if by_epoch else (meta['iter'], runner.max_iters)
    if done >= whole:
        name = 'max_epochs' if by_epoch else 'max_iters'
        message = f'{source} is of a finished run, nothing is left to train; raise train_cfg.{name} (now {whole}).'
        print_log(message, logger='current', level=logging.WARNING)


def clean_message_hub(hub: dict[str, Any], work_dir: Path) -> dict[str, dict]:
    """The parts that MMEngine reads, with names of files moved into the work dir."""
    scalars, info, resumed = (
        {key: value for key, value in part.items() if isinstance(key, str)} if isinstance(part, dict) else {}
        for part in (hub.get(name) for name in ('log_scalars', 'runtime_info', 'resumed_keys'))
    )
    for name in ('keep_ckpt_ids', 'outdated_ckpt_ids'):
        steps = info.get(name)
        info[name] = [step for step in steps if type(step) is int] if isinstance(steps, list) else []
    for key, value in list(info.items()):
        if key.startswith(('best_ckpt', 'last_ckpt')) and value is not None:
            info[key] = str(work_dir / Path(str(value)).name)
        if key.startswith('best_score') and not is_number(value):
            del info[key]
    return dict(
        log_scalars={key: value for key, value in scalars.items() if isinstance(value, HistoryBuffer)},
        runtime_info=info,
        resumed_keys={key: value for key, value in resumed.items() if isinstance(value, bool)},
    )


def optimizer_fault(wrapper: OptimWrapper, state: Any) -> str:
    """What keeps an optimizer from taking a state; '' if nothing does. Settings that the state lacks are added."""
    groups = wrapper.optimizer.param_groups
    if not isinstance(state, dict) or not isinstance(state.get('state'), dict):
        return 'is none'
    saved = state.get('param_groups')
    if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved):
        return 'has no groups of parameters'
    if [len(group.get('params', ())) for group in saved] != [len(group['params']) for group in groups]:
        return 'is that of other groups of parameters'
    if wrapper.base_param_settings is not None:  # MMEngine's group of the learning rate before layer decay
        groups = [*groups, wrapper.base_param_settings]
        saved = [*saved, state.setdefault('base_param_settings', {'params': groups[-1]['params']})]
    for own, other in zip(groups, saved, strict=True):
        if not isinstance(other, dict):
            return 'has no group of the base learning rate'
        for key in own.keys() - {'params', 'param_names'}:
            if not alike(own[key], other.setdefault(key, own[key])):
                return f'has {key}={other[key]!r}, where this run has {own[key]!r}'
    groups, saved = wrapper.optimizer.param_groups, state['param_groups']
    numbers = [number for group in saved for number in group['params']]
    parameters = dict(zip(map(str, numbers), (p for group in groups for p in group['params']), strict=True))
    names = [values.keys() for values in state['state'].values() if isinstance(values, dict)]
    for number, values in state['state'].items():
        parameter = parameters.get(str(number))
        fault = 'is not there' if parameter is None else state_fault(parameter, values)
        if not fault and values.keys() != names[0]:
            fault = f'has {", ".join(map(str, values))} and not {", ".join(map(str, names[0]))}'
        if fault:
            return f'of parameter {number} {fault}'
    scaler = state.get('loss_scaler', {})
    return (
        '' if isinstance(scaler, dict) and all(map(is_number, scaler.values())) else 'has a loss scaler of no numbers'
    )


def state_fault(parameter: nn.Parameter, values: Any) -> str:
    """What is wrong with the state of one parameter: numbers and tensors, of one number or of the parameter's shape."""
    if not isinstance(values, dict):
        return 'is none'
    for name, value in values.items():
        if not isinstance(value, Tensor):
            if value is not None and not is_number(value):
                return f'has {name}={value!r}'
        elif value.shape != parameter.shape and value.numel() != 1:
            return f'has {name} of shape {list(value.shape)}, where the parameter has {list(parameter.shape)}'
        elif not value.is_floating_point() or not value.isfinite().all():
            return f'has {name} that is not finite or no real number'
    return ''


def check_schedules(schedulers: list, checkpoint: dict[str, Any], source: str) -> None:
    """Compare the schedules one by one; what the runner's do not have is left out."""
    saved = checkpoint['param_schedulers']
    if not isinstance(saved, list) or not all(isinstance(state, dict) for state in saved):
        raise InputError(f'{source}: its schedules are a {type(saved).__name__}; give another checkpoint.')
    if len(saved) != len(schedulers):
        message = f'{source} has {len(saved)} schedules and the config {len(schedulers)}: the first of them go on.'
        print_log(message, logger='current', level=logging.WARNING)
    for scheduler, state in zip(schedulers, saved, strict=False):
        own = scheduler.state_dict()
        for key in own.keys() & state.keys():
            if not alike(own[key], state[key]):
                raise InputError(
                    f'{source}: its {type(scheduler).__name__} has {key}={state[key]!r}, where this run has '
                    f'{own[key]!r}; resume with the config that it was trained with.'
                )
        for key in state.keys() - own.keys():
            del state[key]


def alike(own: Any, other: Any) -> bool:
    """Whether a setting can stand in another's place: a number for a number, a list for one of the same length."""
    if own is None or isinstance(own, bool):
        return other is None or isinstance(other, (bool, str)) or is_number(other)
    if isinstance(own, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(own) == len(other) and all(map(alike, own, other))
    if isinstance(own, dict):
        return isinstance(other, dict)
    return is_number(other) if is_number(own) else isinstance(other, type(own))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, which a tensor of one may be as well."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and math.isfinite(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
