"""Check that a run can be resumed from a checkpoint."""

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
    """Compare the training state in a checkpoint with the runner's, before any of it is loaded.

    File names in the state are moved into the runner's own work dir, so that a run never deletes another run's files.

    Raises:
        InputError: the checkpoint holds only weights, or the state of other parameters, another optimizer or schedule.
    """
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    counts = [meta.get(name) if isinstance(meta, dict) else None for name in ('epoch', 'iter')]
    if not isinstance(hub, dict) or not all(type(count) is int and count >= 0 for count in counts):
        raise InputError(
            f'{source} holds only weights and no training state, so it cannot be resumed; start a new run from it with '
            '--cfg-options load_from=FILE.'
        )
    if type(meta.get('seed', 0)) is not int:
        raise InputError(f'{source}: its seed is {meta["seed"]!r} and not an integer; give another checkpoint.')
    within = [meta.get(name, 0) for name in ('steps_of_epoch', 'epoch_length')]
    if not all(type(count) is int and count >= 0 for count in within) or within[0] > within[1]:
        raise InputError(f'{source}: it was saved at step {within[0]!r} of {within[1]!r} of an epoch; give another.')
    warn_if_finished(runner, meta, source)
    if isinstance(runner.train_loop, EpochLoop):
        begin_within_epoch(runner, meta)
    checkpoint['message_hub'] = clean_message_hub(hub, Path(runner.work_dir))
    if 'optimizer' not in checkpoint:
        print_log(
            f'{source} has no optimizer state: the optimizer starts anew.', logger='current', level=logging.WARNING
        )
    elif isinstance(runner.optim_wrapper, OptimWrapper):
        fault = optimizer_fault(runner.optim_wrapper, checkpoint['optimizer'])
        if fault:
            raise InputError(f'{source}: its optimizer state {fault}; resume with the config that it was trained with.')
    if 'param_schedulers' not in checkpoint:
        print_log(f'{source} has no schedules: they start anew.', logger='current', level=logging.WARNING)
    elif isinstance(runner.param_schedulers, list):
        check_schedules(runner.param_schedulers, checkpoint, source)


def begin_within_epoch(runner: Runner, meta: dict[str, Any]) -> None:
    """Skip the steps of the epoch that are done, if the epoch still has the same length."""
    done, length = meta.get('steps_of_epoch', 0), len(runner.train_loop.dataloader)
    if done and meta['epoch_length'] != length:
        message = f'An epoch had {meta["epoch_length"]} steps and now has {length}: this epoch starts again.'
        print_log(message, logger='current', level=logging.WARNING)
    elif done:
        runner.train_loop.done = done


def warn_if_finished(runner: Runner, meta: dict[str, Any], source: str) -> None:
    """Warn if the run has no steps left."""
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    done, whole = (meta['epoch'], runner.max_epochs) if by_epoch else (meta['iter'], runner.max_iters)
    if done >= whole:
        name = 'max_epochs' if by_epoch else 'max_iters'
        message = f'{source} is from a finished run and no steps are left; raise train_cfg.{name} (now {whole}).'
        print_log(message, logger='current', level=logging.WARNING)


def clean_message_hub(hub: dict[str, Any], work_dir: Path) -> dict[str, dict]:
    """The entries that MMEngine reads, with file names moved into the work dir."""
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
    """Why an optimizer cannot load a state; '' if it can. Settings that the state lacks are added to it."""
    if not isinstance(state, dict) or not isinstance(state.get('state'), dict):
        return 'is not that of an optimizer'
    scaler = state.get('loss_scaler', {})
    if not isinstance(scaler, dict) or not all(map(is_number, scaler.values())):
        return 'has a loss scaler with an entry that is not a number'
    return groups_fault(wrapper, state) or moments_fault(wrapper.optimizer.param_groups, state)


def groups_fault(wrapper: OptimWrapper, state: dict[str, Any]) -> str:
    """Why the parameter groups of a state do not fit; '' if they do."""
    groups = wrapper.optimizer.param_groups
    saved = state.get('param_groups')
    if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved):
        return 'has no groups of parameters'
    if [len(group.get('params', ())) for group in saved] != [len(group['params']) for group in groups]:
        return 'has other groups of parameters'
    if wrapper.base_param_settings is not None:  # MMEngine's group of the learning rate before layer decay
        groups = [*groups, wrapper.base_param_settings]
        saved = [*saved, state.setdefault('base_param_settings', {'params': groups[-1]['params']})]
    for own, other in zip(groups, saved, strict=True):
        if not isinstance(other, dict):
            return 'has no group of the base learning rate'
        for key in own.keys() - {'params', 'param_names'}:
            if not is_same_kind(own[key], other.setdefault(key, own[key])):
                return f'has {key}={other[key]!r}, where this run has {own[key]!r}'
    return ''


def moments_fault(groups: list[dict], state: dict[str, Any]) -> str:
    """Why the moments in a state do not fit the parameters; '' if they do."""
    numbers = [number for group in state['param_groups'] for number in group['params']]
    parameters = dict(zip(map(str, numbers), (p for group in groups for p in group['params']), strict=True))
    names = [values.keys() for values in state['state'].values() if isinstance(values, dict)]
    for number, values in state['state'].items():
        parameter = parameters.get(str(number))
        fault = 'is in no group' if parameter is None else moment_fault(parameter, values)
        if not fault and values.keys() != names[0]:
            fault = f'has {", ".join(map(str, values))} and not {", ".join(map(str, names[0]))}'
        if fault:
            return f'of parameter {number} {fault}'
    return ''


def moment_fault(parameter: nn.Parameter, values: Any) -> str:
    """Why the moments of one parameter do not fit: each is a number, or a tensor of one element or its shape."""
    if not isinstance(values, dict):
        return f'is a {type(values).__name__} and not a dict'
    for name, value in values.items():
        if not isinstance(value, Tensor):
            if value is not None and not is_number(value):
                return f'has {name}={value!r}'
        elif value.shape != parameter.shape and value.numel() != 1:
            return f'has {name} of shape {list(value.shape)}, where the parameter has {list(parameter.shape)}'
        elif not value.is_floating_point() or not value.isfinite().all():
            return f'has {name} that is not finite or not floating-point'
    return ''


def check_schedules(schedulers: list, checkpoint: dict[str, Any], source: str) -> None:
    """Compare the schedules one by one; drop entries that the runner's schedules do not have."""
    saved = checkpoint['param_schedulers']
    if not isinstance(saved, list) or not all(isinstance(state, dict) for state in saved):
        raise InputError(f'{source}: its schedules are a {type(saved).__name__}; give another checkpoint.')
    if len(saved) != len(schedulers):
        message = f'{source} has {len(saved)} schedules, the config {len(schedulers)}: only the first are resumed.'
        print_log(message, logger='current', level=logging.WARNING)
    for scheduler, state in zip(schedulers, saved, strict=False):
        own = scheduler.state_dict()
        for key in own.keys() & state.keys():
            if not is_same_kind(own[key], state[key]):
                raise InputError(
                    f'{source}: its {type(scheduler).__name__} has {key}={state[key]!r}, where this run has '
                    f'{own[key]!r}; resume with the config that it was trained with.'
                )
        for key in state.keys() - own.keys():
            del state[key]


def is_same_kind(own: Any, other: Any) -> bool:
    """Whether a setting can replace another: a number a number, a list one of the same length."""
    if own is None or isinstance(own, bool):
        return other is None or isinstance(other, (bool, str)) or is_number(other)
    if isinstance(own, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(own) == len(other) and all(map(is_same_kind, own, other))
    if isinstance(own, dict):
        return isinstance(other, dict)
    return is_number(other) if is_number(own) else isinstance(other, type(own))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, or a tensor of one finite number."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and math.isfinite(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
