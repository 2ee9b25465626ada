"""Mistakes in a config, found before anything is built from it or named by their key when building fails."""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import inspect
import logging
import re
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

from mmcv.transforms import BaseTransform
from mmengine import registry as roots
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import LogProcessor, Runner
from mmengine.runner.loops import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, ValLoop
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from mmmilan.errors import InputError
from mmmilan.files import first_line

# What MMEngine and we read at the top of a config, besides the arguments of the runner.
TOP = {'runner_type', 'strategy', 'compile', 'sync_bn', 'find_unused_parameters', 'model_wrapper_cfg'}
TOP |= {'activation_checkpointing', 'efficient_conv_bn_eval', 'custom_imports', 'env_variables', 'tta_model'}
TOP |= {'tta_pipeline', 'default_scope', 'dataset_type'}
# The registry of what is built at a key, at the top of a config or anywhere in it.
AT_TOP = dict(
    model=roots.MODELS,
    tta_model=roots.MODELS,
    optim_wrapper=roots.OPTIM_WRAPPERS,
    param_scheduler=roots.PARAM_SCHEDULERS,
    default_hooks=roots.HOOKS,
    custom_hooks=roots.HOOKS,
    train_cfg=roots.LOOPS,
    val_cfg=roots.LOOPS,
    test_cfg=roots.LOOPS,
    val_evaluator=roots.METRICS,
    test_evaluator=roots.METRICS,
    visualizer=roots.VISUALIZERS,
    log_processor=roots.LOG_PROCESSORS,
)
ANYWHERE = dict(
    dataset=roots.DATASETS,
    pipeline=roots.TRANSFORMS,
    optimizer=roots.OPTIMIZERS,
    vis_backends=roots.VISBACKENDS,
    init_cfg=roots.WEIGHT_INITIALIZERS,
)
IN_LOADER = dict(sampler=roots.DATA_SAMPLERS, batch_sampler=roots.DATA_SAMPLERS)
# What MMEngine takes at a key beside the arguments of the class, and the class if there is no `type`.
ALSO = dict(
    optim_wrapper={'optimizer', 'paramwise_cfg', 'constructor'},
    param_scheduler={'convert_to_iter_based', 'epoch_length'},
    train_cfg={'by_epoch'},
)
DEFAULT = dict(
    optim_wrapper=OptimWrapper, val_cfg=ValLoop, test_cfg=TestLoop, visualizer=Visualizer, log_processor=LogProcessor
)
OF_LOADER = {'num_batch_per_epoch', 'disable_subprocess_warning'}
# Parts that are no components, and what is read of them; and parts of which other things may be read too.
KEYS = dict(
    env_cfg={'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    auto_scale_lr={'enable', 'base_batch_size'},
    randomness={'seed', 'diff_rank_seed', 'deterministic'},
    arch={'embed_dims', 'num_layers', 'num_heads', 'feedforward_channels'},
)
SOME_KEYS = dict(
    paramwise_cfg={'norm_decay_mult', 'bias_lr_mult', 'bias_decay_mult', 'dwconv_decay_mult', 'flat_decay_mult'}
    | {'dcn_offset_lr_mult', 'bypass_duplicate', 'custom_keys', 'layer_decay_rate', 'num_layers'},
    clip_grad={'type', 'max_norm', 'norm_type', 'error_if_nonfinite', 'foreach', 'clip_value'},
)
SCOPES = ('mmmilan', 'mmpretrain', 'mmdet', 'mmseg', 'mmengine')
DEFAULT_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
ALIKE = 0.85  # of a misspelt key and the right one, where a part may have other keys


class Part(NamedTuple):
    """A dict of a config: its dotted name, the registry that its `type` is looked up in, whether it needs one, and the
    components around it."""

    name: str
    value: Mapping[str, Any]
    registry: Registry | None
    typed: bool
    owners: tuple[Mapping[str, Any], ...] = ()


class Unread(NamedTuple):
    """A key that nothing reads; ``refused`` if building fails with it."""

    key: str
    reason: str
    refused: bool


def change_config(cfg: Config, changes: Mapping[str, Any], arguments: Iterable[str] = ()) -> None:
    """Merge what the user gives beside a config into it, and check that everything is read that is in the config now.

    Args:
        cfg: The config, changed in place.
        changes: Nested or dotted keys, e.g. ``{'model.backbone.img_size': 96}``.
        arguments: Names of what the caller takes besides, as other ways to write a key.

    Raises:
        InputError: a change changes nothing or does not fit; or a component does not exist, or does not take a key.
            Names the key and the nearest right one.
    """
    options = list(dotted(changes))
    for option in options:
        check_top(cfg, option, arguments)
        check_inside(cfg, option)
    for key, value in changes.items():
        try:
            cfg.merge_from_dict({key: copy.deepcopy(value)})  # MMEngine removes `_delete_` from its argument
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = ' '.join(first_line(error).split())[:200]
            raise InputError(f'{key} cannot be set ({reason}); correct it, or set the part above it.') from error
    check_config(cfg, options)


def check_config(cfg: Config, options: Iterable[str] = ()) -> None:
    """Check that everything in a config is read by what is built from it; warn of harmless keys of a file.

    Args:
        cfg: The config, with the options merged in.
        options: Dotted keys that the user gave beside the config, such as ``model.backbone.arch``. All must be read.

    Raises:
        InputError: as :func:`change_config`.
    """
    if not isinstance(cfg.get('model'), Mapping):
        raise InputError('The config has no model; set model to a dict with its type.')
    scope = cfg.get('default_scope') or 'mmpretrain'
    if not isinstance(scope, str):
        raise InputError(f'default_scope={scope!r} is not a name; set it to that of a package, such as mmpretrain.')
    with DefaultScope.overwrite_default_scope(scope):
        for unread in unread_keys(cfg):
            own = any(f'{unread.key}.'.startswith(f'{each}.') or each.startswith(f'{unread.key}.') for each in options)
            if unread.refused or own:
                raise InputError(unread.reason)
            print_log(unread.reason, logger='current', level=logging.WARNING)


def check_top(cfg: Config, option: str, arguments: Iterable[str] = ()) -> None:
    """Raise an :class:`InputError` if nothing reads the first name of an option."""
    name, _, rest = option.partition('.')
    name = name.replace('-', '_')
    known = {*inspect.signature(Runner.__init__).parameters} - {'self', 'cfg'} | TOP
    if name in known:
        return
    copies = [key for key, value in values_of(cfg) if name in cfg and value == cfg[name] and key != name]
    if copies and isinstance(cfg[name], (list, Mapping)):
        raise InputError(
            f'Nothing reads {option}: its value was copied when the config was read; change '
            f'{".".join([copies[0], *rest.split(".")] if rest else [copies[0]])}.'
        )
    arguments = [each for each in arguments if each != 'changes']
    deeper = [key for key, _ in values_of(cfg) if key.rpartition('.')[2] == name]
    if deeper and not rest and not difflib.get_close_matches(name, arguments):
        raise InputError(f'Nothing reads {option}; the nearest name is {min(deeper, key=len)}.')
    raise InputError(f'Nothing reads {option}; {remedy(name, [*arguments, *known], rest=rest)}')


def check_inside(cfg: Config, option: str) -> None:
    """Raise an :class:`InputError` for a new key of a dict that is no component, if it looks like one that is there."""
    part: Any = cfg.to_dict()
    for depth, name in enumerate(option.split('.')):
        if not isinstance(part, Mapping):
            return
        if name not in part:
            nearest = difflib.get_close_matches(name, map(str, part), n=1, cutoff=ALIKE)
            if nearest and depth and 'type' not in part:
                prefix = '.'.join(option.split('.')[:depth])
                raise InputError(f'Nothing reads {option}; the nearest name is {prefix}.{nearest[0]}.')
            return
        part = part[name]


def remedy(name: str, known: Iterable[str], prefix: str = '', rest: str = '') -> str:
    """The nearest right name, or all of them."""
    known = list(dict.fromkeys(known))
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f'the nearest name is {prefix}{nearest[0]}{"." * bool(rest)}{rest}.'
    return f'known are {", ".join(known[:40])}.' if known else 'leave it out.'


def values_of(value: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    """Everything in a part of a config with its dotted name, the part itself first."""
    if name:
        yield name, value
    if isinstance(value, Config):
        value = value.to_dict()
    elif isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        yield from values_of(inner, f'{name}.{key}' if name else str(key))


def parts_of(cfg: Config) -> Iterator[Part]:
    """Every dict of a config that is built, or that something reads keys of."""
    for name in [*AT_TOP, *KEYS, 'train_dataloader', 'val_dataloader', 'test_dataloader']:
        yield from _parts(cfg.get(name), name, name, AT_TOP.get(name), name in AT_TOP)


def _parts(
    value: Any, name: str, key: str, registry: Registry | None, typed: bool, owners: tuple[Mapping[str, Any], ...] = ()
) -> Iterator[Part]:
    if isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _parts(inner, f'{name}.{i}', key, registry, typed, owners)
    if not isinstance(value, Mapping):
        return
    holder = name in ('default_hooks',) or (registry is roots.METRICS and 'type' not in value)
    if not holder:
        yield Part(name, value, registry, typed, owners)
    owners = (*owners, value) if 'type' in value else owners
    for inner_key, inner in value.items():
        table = ANYWHERE | (IN_LOADER if key.endswith('dataloader') else {})
        if inner_key in table:
            yield from _parts(inner, f'{name}.{inner_key}', inner_key, table[inner_key], True, owners)
        else:
            yield from _parts(inner, f'{name}.{inner_key}', str(inner_key), registry, holder, owners)


def unread_keys(cfg: Config) -> Iterator[Unread]:
    """The keys of a config that nothing reads, and the types that do not exist."""
    known = {*inspect.signature(Runner.__init__).parameters} | TOP
    for name in set(cfg) - known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.88)
        if nearest and not _is_copied(cfg, name):
            yield Unread(name, f'Nothing reads {name} of the config; the nearest name is {nearest[0]}.', False)
    hooks = cfg.get('default_hooks')
    for name in set(hooks if isinstance(hooks, Mapping) else ()) - set(DEFAULT_HOOKS):
        nearest = difflib.get_close_matches(name, DEFAULT_HOOKS, n=1, cutoff=ALIKE)
        if nearest:
            reason = f'default_hooks has no {name}; the nearest name is default_hooks.{nearest[0]}.'
            yield Unread(f'default_hooks.{name}', reason, False)
    for part in parts_of(cfg):
        yield from _unread_in(part)


def _is_copied(cfg: Config, name: str) -> bool:
    """Whether a value at the top of a config is a variable of the file, whose copy stands where it is read."""
    return any(value == cfg[name] and key.split('.')[0] != name for key, value in values_of(cfg))


def _unread_in(part: Part) -> Iterator[Unread]:
    top = re.sub(r'(\.\d+)+$', '', part.name)  # of a list of parts, the list
    key, title, also = top.rpartition('.')[2], '', ALSO.get(top, set())
    if key in KEYS | SOME_KEYS and 'type' not in part.value:
        known, is_open = KEYS.get(key) or SOME_KEYS[key], key in SOME_KEYS
    else:
        builder = _builder_of(part, top)
        if isinstance(builder, str):
            yield Unread(f'{part.name}.type', builder, True)
        if not callable(builder):
            return
        known, is_open = arguments_of(builder)
        if not known and not part.typed:  # a mixin, whose keys its owner passes to a method
            return
        title = getattr(builder, '__name__', str(builder))
        also = also | (OF_LOADER if builder is DataLoader else set())
        if part.registry is roots.HOOKS:
            also = also | {'priority'}
        if key.endswith('norm_cfg'):  # mmcv's `build_norm_layer` sets whether it is trained
            also = also | {'requires_grad'}
        if not part.typed:
            also = also | _read_by_owners(part, set(part.value) - known)
    for name in set(part.value) - known - also - {'type', '_scope_', '_delete_', '_reversed_'}:
        if not is_open or difflib.get_close_matches(str(name), known, n=1, cutoff=ALIKE):
            reason = _sentence(part.name, name, known | ALSO.get(top, set()), title)
            yield Unread(f'{part.name}.{name}', reason, bool(title) and not is_open)


def _read_by_owners(part: Part, names: set[str]) -> set[str]:
    """Those of the keys of a component inside others that the others read, by their source.

    mmdet's DETR, for one, takes ``bg_cls_weight`` out of the config of its loss before it builds the loss.
    """
    read: set[str] = set()
    for owner in part.owners if names else ():
        builder = _builder_of(Part('', owner, part.registry, False), '')
        if inspect.isclass(builder):
            read |= {name for name in names if re.search(rf'[\'"]{re.escape(name)}[\'"]', _source_of(builder))}
    return read


@functools.cache
def _source_of(builder: type) -> str:
    """The source of a class and its bases, and of the modules of OpenMMLab that they are in."""
    modules = {inspect.getmodule(each) for each in builder.__mro__ if each.__module__.startswith(SCOPES)}
    return '\n'.join(inspect.getsource(module) for module in modules if module)


def _sentence(part: str, name: str, known: Iterable[str], title: str = '') -> str:
    reader = f'{title} takes no {name}' if title else 'nothing reads it'
    return f'{part}.{name}: {reader}; {remedy(name, known, f"{part}.")}'


def _builder_of(part: Part, top: str) -> Callable | str | None:
    """The class or function that is built from a part; None if it cannot be known, a sentence if it does not exist."""
    kind = part.value.get('type')
    if part.name.endswith('_dataloader'):
        return DataLoader
    if kind is None and top == 'train_cfg':
        return EpochBasedTrainLoop if part.value.get('by_epoch', True) else IterBasedTrainLoop
    if kind is None and (top in DEFAULT or not part.typed):
        return DEFAULT.get(top)
    if kind is None:
        nearest = difflib.get_close_matches(part.name, [f'default_hooks.{name}' for name in DEFAULT_HOOKS], n=1)
        return f'{part.name} has no type; {f"the nearest name is {nearest[0]}" if nearest else "give it one"}.'
    if not isinstance(kind, str):
        return kind if callable(kind) else f'{part.name}.type={kind!r} is not a name; give the name of a class.'
    if part.registry is None:
        return None
    choices = [part.registry] if part.typed else [part.registry, roots.MODELS, roots.TRANSFORMS, roots.TASK_UTILS]
    names: list[str] = []
    for choice in choices:
        with choice.switch_scope_and_registry(part.value.get('_scope_')) as registry:
            found = lookup(registry, kind)
            if found is not None:
                return found
            names += _names_in(registry, kind)
    if kind.count('.') < 2 and (part.typed or kind.partition('.')[0] in SCOPES):
        return f'{part.name}.type={kind!r} does not exist; {remedy(kind, names)}'
    return None  # some components look names up elsewhere


def lookup(registry: Registry, kind: str) -> Callable | None:
    """The registered class of a name; never imports a name that is not registered."""
    scope, _, name = kind.rpartition('.')
    registry.import_from_location()
    if scope and scope != registry.scope:
        found = registry.get(kind) if scope in SCOPES else None
        return found if callable(found) else None
    while registry is not None:
        if name in registry.module_dict:
            return registry.module_dict[name]
        registry = registry.parent
    return None


def _names_in(registry: Registry, kind: str) -> list[str]:
    """Names that could stand in place of a wrong one: with its scope, or those of the current scope and its parents."""
    scope = kind.rpartition('.')[0]
    if scope:
        root = registry._get_root_registry()
        child = root._children.get(scope)
        return [f'{scope}.{name}' for name in child.module_dict] if child else []
    names: list[str] = []
    while registry is not None:
        names += registry.module_dict
        registry = registry.parent
    return names


@functools.cache
def arguments_of(builder: Callable) -> tuple[frozenset[str], bool]:
    """The arguments of a class or function, through ``**kwargs`` to base classes, and if it takes others."""
    found: set[str] = set()
    for each in builder.__mro__ if inspect.isclass(builder) else [builder]:
        function = vars(each).get('__init__') if inspect.isclass(each) else each
        if function is None or each in (object, nn.Module):
            continue
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # written in C
            return frozenset(found), True
        found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {'self'}
        rest = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        if not rest:
            break
        if not _passes_on(function, rest[0]):
            return frozenset(found), True
    return frozenset(found), False


def _passes_on(function: Callable, name: str) -> bool:
    """Whether all that ``__init__`` does with its ``**kwargs`` is to pass them to ``super().__init__``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    uses = sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))
    passed = sum(
        keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == name
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == '__init__'
        and _is_next(node.func.value, function)
        for keyword in node.keywords
    )
    return uses == passed > 0


def _is_next(node: ast.expr, function: Callable) -> bool:
    """Whether an expression is ``super()`` of the class of a method, not of a base class, which skips some."""
    first = node.args[0] if isinstance(node, ast.Call) and node.args else None
    return not isinstance(first, ast.Name) or first.id == function.__qualname__.split('.')[-2]


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


def in_scope(cfg: Config) -> AbstractContextManager:
    """A context in which a type without a scope is looked up where the config means it, as MMEngine's runner does."""
    return DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmpretrain')


def check_operators(cfg: Config) -> None:
    """Check that mmcv has its operators if the config is one of mmdet or mmseg, which import them.

    Raises:
        InputError: it was built without them.
    """
    scopes = (cfg.get('default_scope'), cfg.model.get('_scope_'))
    if not {'mmdet', 'mmseg'}.isdisjoint(scopes) and find_spec('mmcv._ext') is None:
        raise InputError(
            'Detection and segmentation need mmcv with its operators, but this mmcv was built without them; install it '
            'as docs/installation.md says (dense).'
        )


@contextmanager
def build_errors() -> Iterator[None]:
    """Turn what goes wrong while parts of a config are built into an ``InputError`` that names the part.

    The stack trace is logged at level debug. Errors that are raised elsewhere, such as in a step of training, pass.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        sentence = build_failure(error)
        if sentence is None:
            raise
        print_log(''.join(traceback.format_exception(error)), logger='current', level=logging.DEBUG)
        raise InputError(sentence) from error


def build_failure(error: Exception) -> str | None:
    """What part of which config failed to build, and why; None if the error was raised elsewhere."""
    config, failed = None, []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        variables = frame.f_locals
        config = config or next((value for value in variables.values() if isinstance(value, Config)), None)
        name = frame.f_code.co_name
        if name in BUILDERS and '/mmengine/' in frame.f_code.co_filename:
            failed.append(variables.get(BUILDERS[name]))
        elif name == '__call__' and isinstance(variables.get('self'), BaseTransform):
            failed.append(dict(type=type(variables['self']).__name__))
    if not failed:
        return None
    for part in reversed(failed):  # the deepest one that the config has; others are parts of parts
        name = name_of(part, config or {})
        if name is not None:
            return describe(error, name, part)
    return describe(error, '', failed[-1])


def name_of(part: Any, config: Mapping[str, Any]) -> str | None:
    """The dotted name of the dict of a config that is most like a part, which may have lost or gained keys."""
    best, name = 0, None
    for key, value in values_of(config) if isinstance(part, Mapping) else ():
        if isinstance(value, Mapping) and _last(value.get('type')) == _last(part.get('type')):
            alike = sum(each in value and value[each] == part[each] for each in part)
            if alike > best or (name is None and 'type' in part):
                best, name = alike, key
    return name


def _last(kind: Any) -> Any:
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind


def describe(error: Exception, name: str, part: Any) -> str:
    """A sentence on what cannot be built."""
    kind = part.get('type') if isinstance(part, Mapping) else None
    title = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    message = ' '.join(first_line(error).split()).rstrip('.;')
    place = ' '.join(each for each in (name or 'The config', f'({title})' if title else '') if each)
    if match := re.search(r'missing \d+ required .*arguments?: (.*)', message):
        missing = re.findall(r"'(\w+)'", match[1])
        return f'{place} lacks {" and ".join(missing)}; set {f"{name}." if name else ""}{missing[0]}.'
    if match := re.search(r"unexpected keyword argument '(\w+)'", message):
        return f'{place} takes no {match[1]}; {_remedy_of(part, match[1], name)}'
    said = f'{type(error).__name__}: {message}' if message != type(error).__name__ else message
    return f'{place} cannot be built ({said[:300]}); correct its values.'


def _remedy_of(part: Any, name: str, prefix: str) -> str:
    return remedy(name, set(part) - {'type'} if isinstance(part, Mapping) else (), f'{prefix}.' if prefix else '')


def dotted(changes: Mapping[str, Any], prefix: str = '') -> Iterator[str]:
    """The dotted keys of changes of a config, nested or not."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and value and '_delete_' not in value and 'type' not in value:
            yield from dotted(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}'
