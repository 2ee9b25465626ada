"""What fails while parts of a config are built, or in a step, in one sentence that names the part."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import Registry
from mmengine.runner.loops import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, ValLoop

from mmmilan.building import LOADERS, dotted, remedy, values_of
from mmmilan.components import lookup, names_like, type_name
from mmmilan.errors import InputError, shown
from mmmilan.files import first_line

# The data loader of each loop, of whose steps one may fail.
OF_LOOPS = {EpochBasedTrainLoop: LOADERS[0], IterBasedTrainLoop: LOADERS[0], ValLoop: LOADERS[1], TestLoop: LOADERS[2]}
# The functions in which MMEngine builds a part of a config, and the variable that holds it.
BUILDERS = dict(
    build_from_cfg='cfg',
    build_scheduler_from_cfg='cfg',
    build_dataloader='dataloader',
    build_train_loop='loop',
    build_val_loop='loop',
    build_test_loop='loop',
    build_evaluator='evaluator',
    build_optim_wrapper='optim_wrapper',
    build_param_scheduler='scheduler',
    build_visualizer='visualizer',
    set_randomness='self',
    from_cfg='cfg',
)
STEPS = ('train_step', 'val_step', 'test_step', 'measure')  # of MMEngine's models, and of OnlineEvaluationHook


def build_errors() -> AbstractContextManager:
    """Turn what goes wrong while parts of a config are built into an ``InputError`` that names the part.

    The stack trace is logged at level debug. Errors that are raised elsewhere, such as in a step of training, pass.
    """
    return in_sentences(build_failure)


def step_errors(changes: Mapping[str, Any]) -> AbstractContextManager:
    """Name the user's changes of the model if a step fails: what can be built may not be able to compute.

    Errors outside a step pass, and all of them where the model is not changed.

    Args:
        changes: Those of :func:`change_config`.
    """
    return in_sentences(partial(step_failure, changes))


@contextmanager
def in_sentences(explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Turn errors that ``explain`` has a sentence for into an ``InputError``; the stack trace is logged at debug."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print_log(''.join(traceback.format_exception(error)), logger='current', level=logging.DEBUG)
        raise InputError(sentence) from error


def step_failure(changes: Mapping[str, Any], error: Exception) -> str | None:
    """Which changes of the model a step failed with, and why; None if it is not known to be for them."""
    options = [option for option in dotted(changes) if option.startswith('model')]
    frames = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or not options or not any(name in STEPS for name in frames):
        return None
    return (
        f'The model can be built with the given {" and ".join(options)}, but its first step fails '
        f'({type(error).__name__}: {one_line(error)}); correct the value.'
    )


def one_line(error: Exception) -> str:
    """The first line of an error's message, as a part of a sentence."""
    return ' '.join(first_line(error).split()).rstrip('.;')


def build_failure(error: Exception) -> str | None:
    """What part of which config failed to build, and why; None if the error was raised elsewhere."""
    config, failed, registry, loader = None, [], None, ''
    for frame, _ in traceback.walk_tb(error.__traceback__):
        variables = frame.f_locals
        config = config or next((value for value in variables.values() if isinstance(value, Config)), None)
        loader = next((key for loop, key in OF_LOOPS.items() if isinstance(variables.get('self'), loop)), loader)
        name = frame.f_code.co_name
        if name in BUILDERS and '/mmengine/' in frame.f_code.co_filename:
            failed.append((variables.get(BUILDERS[name]), ''))
            registry = variables.get('registry')
        elif name == '__call__' and isinstance(variables.get('self'), BaseTransform):
            failed.append((dict(type=type(variables['self']).__name__), loader))
    if not failed:
        return None
    deepest = failed[-1][0]
    for part, within in reversed(failed):  # the deepest one that the config has; others are parts of parts
        name = name_of(part, config or {}, within)
        if name is not None:
            return describe(error, name, part, registry if part is deepest else None)
    return describe(error, '', deepest, registry)


def name_of(part: Any, config: Mapping[str, Any], within: str = '') -> str | None:
    """The dotted name of the dict of a config that is most like a part, which may have lost or gained keys."""
    best, name = 0, None
    for key, value in values_of(config) if isinstance(part, Mapping) else ():
        if key.startswith(within) and isinstance(value, Mapping) and type_name(value) == type_name(part):
            alike = sum(each in value and value[each] == part[each] for each in part)
            if alike > best or (name is None and 'type' in part):
                best, name = alike, key
    return name


def describe(error: Exception, name: str, part: Any, registry: Registry | None = None) -> str:
    """A sentence on what cannot be built; ``registry`` is that of the innermost part."""
    kind = part.get('type') if isinstance(part, Mapping) else None
    title = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    message = one_line(error)
    place = ' '.join(each for each in (name or 'The config', f'({title})' if title else '') if each)
    if match := re.search(r'missing \d+ required .*arguments?: (.*)', message):
        missing = re.findall(r"'(\w+)'", match[1])
        return f'{place} lacks {" and ".join(missing)}; set {f"{name}." if name else ""}{missing[0]}.'
    if match := re.search(r"unexpected keyword argument '(\w+)'", message):
        known = set(part) - {'type'} if isinstance(part, Mapping) else ()
        return f'{place} takes no {match[1]}; {remedy(match[1], known, f"{name}." if name else "")}'
    if isinstance(error, KeyError) and registry is not None and 'type' not in part:
        return f'{name or shown(part)} has no type; give it one.'
    if isinstance(error, KeyError) and registry is not None and isinstance(kind, str) and not lookup(registry, kind):
        key = f'{name}.type' if name else 'type'
        return f'{key}={kind!r} does not exist; {remedy(kind, names_like(registry, kind))}'
    said = f'{type(error).__name__}: {message}' if message != type(error).__name__ else message
    return f'{place} cannot be built ({said[:300]}); correct its values.'
