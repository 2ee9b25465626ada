"""Resume: progress comes from the checkpoint, everything else from the config.

Weights, moments, steps and epochs are those of the checkpoint. Schedules and the optimizer's settings are those of the
config, brought to the step at which the run stands: each step then has the learning rate that it has in a run with this
config from the start. What differs between the two configs is said once; what cannot go on is refused.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmmilan.checkpoints.config import parse_config, place_data_preprocessor
from mmmilan.checkpoints.loading import load_weights
from mmmilan.engine.loops import EpochLoop
from mmmilan.errors import InputError, shown, warn
from mmmilan.evaluation.features import evenly_spaced
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS

# Keys that belong to one call and not to a run.
OF_A_CALL = re.compile(r'(work_dir|resume|load_from|launcher|experiment_name|env_variables|model_wrapper_cfg|call)\b')
# A change of these would give the same weights, or moments, another meaning.
OF_THE_MODEL = re.compile(
    r'model\.type|model\.backbone\.(type|arch\b.*|patch_size)|model\.neck\.type|model\.(.+\.)?\w*num_heads|'
    r'optim_wrapper\.optimizer\.type'
)
OF_SCHEDULES = {'initial_lr', 'initial_momentum', 'momentum'}  # settings that schedules add to a group
# What changes in the state of a schedule.
PROGRESS = {'_global_step', 'last_step', '_last_value', 'best', 'num_bad_epochs', 'cooldown_counter'}
NAMES = 1000  # that stand for all images of a data set


def check_resumable(runner: Runner, checkpoint: dict[str, Any], source: str) -> None:
    """Compare a checkpoint with the runner, and bring it to the runner's config, before any of it is loaded.

    File names in the state are moved into the runner's own work dir, so that a run never deletes another run's files.

    Raises:
        InputError: the checkpoint holds only weights, is of another model or optimizer, or was saved within an epoch of
            other images.
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
    changes = changed_settings(meta, runner.cfg, source)
    changes |= changed_data(runner, meta, source)
    if changes:
        text = '\n    '.join(['with changes:', *in_words(changes)])
        warn(f'Resuming {source} {text}')
    set_position(runner, meta)
    warn_if_finished(runner, meta, source)
    checkpoint['message_hub'] = clean_message_hub(hub, Path(runner.work_dir))
    optimizer, continued = checkpoint.get('optimizer'), False
    if optimizer is None:
        warn(f'{source} has no optimizer state: the optimizer starts anew.')
    elif isinstance(runner.optim_wrapper, OptimWrapper):
        fault = optimizer_fault(runner.optim_wrapper, optimizer)
        if fault:
            raise InputError(f'{source}: its optimizer state {fault}; resume with the config that it was trained with.')
    if isinstance(runner.param_schedulers, list):
        continued = resume_schedules(runner, checkpoint, source)
    if optimizer is not None and isinstance(runner.optim_wrapper, OptimWrapper):
        take_settings(runner.optim_wrapper, optimizer, runner.param_schedulers if continued else [])


# -- what changes


def changed_settings(meta: dict[str, Any], cfg: Config, source: str) -> dict[str, tuple]:
    """The keys of the config that differ from those in a checkpoint: {key: (old, new)}; None is a key that is not set.

    Raises:
        InputError: the checkpoint is of another model, optimizer or kind of loop.
    """
    if not isinstance(meta.get('cfg'), str):
        return {}
    try:
        saved = parse_config(meta['cfg'], f'the config in {source}')
    except InputError as error:
        warn(f'{error} What differs from it is not known.')
        return {}
    place_data_preprocessor(saved)  # which a runner of MMEngine leaves at the top of what it saves
    old, new = (dict(settings_of(each.to_dict())) for each in (saved, cfg))
    changes = {
        key: (old.get(key), new.get(key))
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not OF_A_CALL.match(key)
    }
    for key, (was, now) in changes.items():
        if OF_THE_MODEL.fullmatch(key) and None not in (was, now):
            raise InputError(
                f'{source} is of a run with {key}={was!r}, where this one has {now!r}; resume with the config that it '
                'was trained with, or start a new run from its weights (load_from).'
            )
    for count in ('max_epochs', 'max_iters'):
        if f'train_cfg.{count}' in old and f'train_cfg.{count}' not in new:
            raise InputError(
                f'{source} is of a run with train_cfg.{count}, where this one has none; resume with a config that '
                'counts as it does.'
            )
    return changes


def settings_of(value: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    """Each value in a config with its dotted name; a list of plain values is one value."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(each, (Mapping, list, tuple)) for each in value):
        parts = enumerate(value)
    else:
        yield name, list(value) if isinstance(value, tuple) else value
        return
    for key, part in parts:
        yield from settings_of(part, f'{name}.{key}' if name else str(key))


def in_words(changes: Mapping[str, tuple]) -> list[str]:
    """Changes, {name: (old, new)}, as lines of the log show them."""
    words = {key: ['not set' if each is None else shown(each) for each in both] for key, both in changes.items()}
    return [f'{key}: {old} -> {new}' for key, (old, new) in words.items()]


def describe_data(loader: DataLoader) -> dict[str, int]:
    """What tells whether a step of an epoch has the same images: their number and names, and images in a step.

    The names are file and folder, not the whole path, so that a data set may move; 1000 names stand for all.
    """
    dataset, names = loader.dataset, []
    if hasattr(dataset, 'get_data_info'):
        for index in evenly_spaced(len(dataset), NAMES):
            path = dataset.get_data_info(index).get('img_path')
            names.append('/'.join(Path(path).parts[-2:]) if isinstance(path, str) else '')
    checksum = zlib.crc32('\n'.join(names).encode(errors='surrogateescape'))
    return dict(images=len(dataset), names=checksum, images_per_step=(loader.batch_size or 1) * get_world_size())


def changed_data(runner: Runner, meta: dict[str, Any], source: str) -> dict[str, tuple]:
    """What differs in images and their order: {name: (old, new)}. A seed that the config does not set is the run's.

    Raises:
        InputError: within an epoch, where the images that are done would not be known.
    """
    loader, seed = runner.train_loop.dataloader, meta.get('seed')
    old, new = meta.get('data'), describe_data(loader)
    changes = {}
    if isinstance(old, dict):
        changes = {key: (old[key], new[key]) for key in new if key in old and old[key] != new[key]}
    if 'names' in changes:
        checksums = changes.pop('names')
        if 'images' not in changes:
            changes['names or order of the images (checksum)'] = checksums
    length = meta.get('epoch_length', len(loader))
    if isinstance(runner.train_loop, EpochLoop) and length != len(loader):
        changes['steps in an epoch'] = (length, len(loader))
    chosen, sampler = (runner.cfg.get('randomness') or {}).get('seed'), getattr(loader, 'sampler', None)
    if seed is not None and chosen is None and getattr(sampler, 'seed', None) == runner.seed:
        sampler.seed = seed  # MMEngine gives it to the runner alone
    elif seed is not None and chosen not in (None, seed):
        changes['randomness.seed'] = (seed, chosen)
        meta['seed'] = chosen  # or MMEngine would set it
    if changes and meta.get('steps_of_epoch') and isinstance(runner.train_loop, EpochLoop):
        raise InputError(
            f'{source} was saved at step {meta["steps_of_epoch"]} of an epoch whose other steps would now have other '
            f'images ({", ".join(in_words(changes))}); resume with the data, batch size and seed of the run, or from '
            'the end of an epoch.'
        )
    return changes


# -- where the run stands


def set_position(runner: Runner, meta: dict[str, Any]) -> None:
    """Skip the steps of the epoch that are done; if epochs have another length now, count steps in the new ones."""
    loop = runner.train_loop
    if isinstance(loop, EpochLoop):
        loop.done, length = meta.get('steps_of_epoch', 0), len(loop.dataloader)
        if meta.get('epoch_length', length) != length:
            meta['iter'] = meta['epoch'] * length


def warn_if_finished(runner: Runner, meta: dict[str, Any], source: str) -> None:
    """Warn if the run has no steps left."""
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    done, whole = (meta['epoch'], runner.max_epochs) if by_epoch else (meta['iter'], runner.max_iters)
    if done >= whole:
        name = 'max_epochs' if by_epoch else 'max_iters'
        warn(
            f'{source} is from a finished run and no steps are left; raise train_cfg.{name} (now {whole}) and lengthen '
            'param_scheduler.'
        )


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
    """Why an optimizer cannot load a state; '' if it can."""
    if not isinstance(state, dict) or not isinstance(state.get('state'), dict):
        return 'is not that of an optimizer'
    scaler = state.get('loss_scaler', {})
    if not isinstance(scaler, dict) or not all(map(is_number, scaler.values())):
        return 'has a loss scaler with an entry that is not a number'
    return groups_fault(wrapper, state) or moments_fault(wrapper.optimizer.param_groups, state)


def groups_fault(wrapper: OptimWrapper, state: dict[str, Any]) -> str:
    """Why the parameter groups of a state do not fit; '' if they do."""
    groups, saved = wrapper.optimizer.param_groups, state.get('param_groups')
    if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved):
        return 'has no groups of parameters'
    if [len(group.get('params', ())) for group in saved] != [len(group['params']) for group in groups]:
        return 'has other groups of parameters'
    for own, other in zip(groups, saved, strict=True):
        # keys on one side alone may come with another version of PyTorch, or with another schedule
        missing, unknown = own.keys() - other.keys() - OF_SCHEDULES, other.keys() - own.keys() - OF_SCHEDULES
        if missing and unknown:
            return f'is of another optimizer (it has {", ".join(sorted(map(str, unknown)))})'
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


# -- schedules


def resume_schedules(runner: Runner, checkpoint: dict[str, Any], source: str) -> bool:
    """Bring the schedules of the config to the step at which the run stands.

    Where they are those of the checkpoint, their states are taken from it, else all steps are computed again.

    Returns:
        Whether they are those of the checkpoint.

    Raises:
        InputError: they are not, and one follows a metric, whose past values are not known.
    """
    schedulers, meta = runner.param_schedulers, checkpoint['meta']
    saved, optimizer = checkpoint.get('param_schedulers'), checkpoint.get('optimizer')
    continued = (
        isinstance(saved, list)
        and isinstance(optimizer, dict)
        and len(saved) == len(schedulers)
        and all(
            continues(
                scheduler, state, meta['epoch'] if scheduler.by_epoch else meta['iter'], optimizer['param_groups']
            )
            for scheduler, state in zip(schedulers, saved, strict=True)
        )
    )
    for scheduler in schedulers:
        if getattr(scheduler, 'need_val_args', False) and not continued:
            raise InputError(
                f'{source}: a schedule follows {scheduler.monitor}, so the rates of its run cannot be computed for '
                'other schedules or rates; resume with those that it was trained with.'
            )
    if not continued:
        print_log(f'The rates of the steps until {meta["iter"]} are computed for the changed schedules.', 'current')
        replay(schedulers, runner, meta['epoch'], meta['iter'])
    states = [scheduler.state_dict() for scheduler in schedulers]
    if continued:
        progress = [
            {key: state[key] for key in PROGRESS & own.keys()} for own, state in zip(states, saved, strict=True)
        ]
        states = [own | state for own, state in zip(states, progress, strict=True)]
    checkpoint['param_schedulers'] = states
    return continued


def continues(scheduler: Any, state: Any, steps: int, groups: list[dict]) -> bool:
    """Whether a state is that of a schedule with the same settings and base values, after this number of steps."""
    if not isinstance(state, dict) or state.get('_global_step') != steps:
        return False
    base = f'initial_{scheduler.param_name}'
    for own, saved in zip(scheduler.optimizer.param_groups, groups, strict=False):  # MMEngine adds one for the base
        if not is_number(saved.get(base)) or saved[base] != own.get(base):
            return False
    return all(
        is_same_kind(own, state.get(key)) and (key in PROGRESS or own == state[key])
        for key, own in scheduler.state_dict().items()
        if not callable(own)
    )


def replay(schedulers: list, runner: Runner, epochs: int, steps: int) -> None:
    """Step new schedules as the run has done, in the order in which its hook calls them."""
    by_step = [scheduler for scheduler in schedulers if not scheduler.by_epoch]
    by_epoch = [scheduler for scheduler in schedulers if scheduler.by_epoch]
    epochs, steps = min(epochs, runner.max_epochs), min(steps, runner.max_iters)  # a finished run needs no more
    runner.optim_wrapper._global_step = steps  # MMEngine warns of schedules that step before the optimizer
    length = len(runner.train_loop.dataloader)
    for step in range(1, steps + 1):
        for scheduler in by_step:
            scheduler.step()
        if step % length == 0 and step <= epochs * length:
            for scheduler in by_epoch:
                scheduler.step()


def take_settings(wrapper: OptimWrapper, state: dict[str, Any], schedulers: list) -> None:
    """Replace the settings in an optimizer's state by the optimizer's own, but for what these schedules have set."""
    kept = {scheduler.param_name for scheduler in schedulers}
    for own, saved in zip(wrapper.optimizer.param_groups, state['param_groups'], strict=True):
        settings = own | {key: saved[key] for key in kept if is_number(saved.get(key))} | {'params': saved['params']}
        if 'momentum' in kept and 'betas' in own:  # MMEngine's schedules of the momentum set the first beta
            settings['betas'] = (settings['momentum'], own['betas'][1])
        saved.clear()
        saved.update(settings)
    base = state.pop('base_param_settings', None)
    if wrapper.base_param_settings is not None:
        kept = {key: base[key] for key in kept if is_number(base.get(key))} if isinstance(base, dict) else {}
        state['base_param_settings'] = wrapper.base_param_settings | kept


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


@HOOKS.register_module()
class ExactLoadingHook(Hook):
    """Load checkpoints of any layout at ``load_from`` and ``resume``; refuse one that lacks a weight of the model.

    MMEngine itself loads the weights that fit and leaves the others random.

    Raises:
        InputError: see :func:`mmmilan.checkpoints.loading.load_weights` and :func:`check_resumable`.
    """

    priority = 'VERY_LOW'  # after hooks that change the checkpoint, as EMAHook does

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        source = runner._load_from or f'The last checkpoint in {runner.work_dir}'
        if runner._resume:
            check_resumable(runner, checkpoint, source)
        # MMEngine loads the same weights once more
        checkpoint['state_dict'] = load_weights(unwrap(runner.model), checkpoint, source)
