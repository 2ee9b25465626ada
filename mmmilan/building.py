"""Mistakes in a config, found before anything is built from it; what fails none the less is in ``failures.py``."""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from numbers import Integral, Real
from typing import Any, NamedTuple

from mmengine import registry as roots
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import LogProcessor, Runner
from mmengine.runner.loops import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, ValLoop
from mmengine.visualization import Visualizer
from torch.utils.data import DataLoader

from mmmilan.components import SCOPES, Kinds, arguments_of, described, fits, lookup, names_like, source_of
from mmmilan.errors import InputError, shown, warn
from mmmilan.files import first_line

SCOPE = threading.RLock()  # held while MMEngine's default scope is another, or changes
# What MMEngine and we read at the top of a config, besides the arguments of the runner.
TOP = {'runner_type', 'strategy', 'compile', 'sync_bn', 'find_unused_parameters', 'model_wrapper_cfg'}
TOP |= {'activation_checkpointing', 'efficient_conv_bn_eval', 'custom_imports', 'env_variables', 'tta_model'}
TOP |= {'tta_pipeline', 'default_scope', 'dataset_type'}
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
# The registry of what is built at a key: at the top of a config, anywhere in it, in a loader or an evaluator.
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
IN_LOADER = ANYWHERE | dict(sampler=roots.DATA_SAMPLERS, batch_sampler=roots.DATA_SAMPLERS, collate_fn=roots.FUNCTIONS)
IN_EVALUATOR = ANYWHERE | dict(metrics=roots.METRICS)
# The class of a part without a type.
DEFAULT = dict(
    optim_wrapper=OptimWrapper,
    val_cfg=ValLoop,
    test_cfg=TestLoop,
    visualizer=Visualizer,
    log_processor=LogProcessor,
    val_evaluator=Evaluator,
    test_evaluator=Evaluator,
)
# What MMEngine takes at a key beside the arguments of the class.
ALSO = dict(
    optim_wrapper={'optimizer', 'paramwise_cfg', 'constructor'},
    param_scheduler={'convert_to_iter_based', 'epoch_length'},
    train_cfg={'by_epoch'},
    default_hooks={'priority'},
    custom_hooks={'priority'},
) | dict.fromkeys(LOADERS, {'num_batch_per_epoch', 'disable_subprocess_warning'})
# Parts that are no components, and what is read of them; and parts of which other things may be read too.
TRUTH, WHOLE, NUMBER, DICT = map(frozenset, ({bool}, {int}, {float}, {dict}))
KEYS = dict(
    env_cfg=dict(cudnn_benchmark=TRUTH, mp_cfg=DICT, dist_cfg=DICT, resource_limit=WHOLE),
    auto_scale_lr=dict(enable=TRUTH, base_batch_size=NUMBER),
    randomness=dict(seed=WHOLE, diff_rank_seed=TRUTH, deterministic=TRUTH),
    arch=dict(embed_dims=WHOLE, num_layers=WHOLE, num_heads=WHOLE, feedforward_channels=WHOLE),
    clip_grad=dict.fromkeys(('max_norm', 'clip_value'), NUMBER)
    | dict.fromkeys(('type', 'norm_type', 'error_if_nonfinite', 'foreach'), frozenset()),
)
# Numbers that mean the same wherever they stand: outside of these ranges nothing is trained, or something else.
ABOVE_0 = ('max_epochs', 'max_iters', 'val_interval', 'batch_size', 'T_max', 'max_norm', 'clip_value', 'patch_size')
ABOVE_0 += ('decoder_embed_dim', 'accumulative_counts')
FROM_0 = ('num_workers', 'decoder_depth', 'weight_decay')
SHARES = ('drop_rate', 'drop_path_rate', 'attn_drop_rate', 'layer_decay_rate', 'label_smooth_val', 'prob', 'flip_prob')
# What commands set that write a config of their own.
OWN = dict(work_dir='by its folder (--out)', launcher='itself', experiment_name='itself')
LARGEST = 65536  # of the sizes of an arch
MULTIPLIERS = ('norm_decay_mult', 'bias_lr_mult', 'bias_decay_mult', 'dwconv_decay_mult', 'flat_decay_mult')
MULTIPLIERS += ('dcn_offset_lr_mult', 'layer_decay_rate')
SOME_KEYS = dict(
    paramwise_cfg=dict.fromkeys(MULTIPLIERS, NUMBER) | dict(bypass_duplicate=TRUTH, custom_keys=DICT, num_layers=WHOLE),
)
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

    @property
    def top(self) -> str:
        """The name of the part; of one in a list of parts, that of the list."""
        return re.sub(r'(\.\d+)+$', '', self.name)


class Reader(NamedTuple):
    """What reads a part of a config: its name, the keys that it takes, and if it may read others."""

    title: str
    known: Mapping[str, Kinds]
    is_open: bool


class Fault(NamedTuple):
    """A key that nothing reads, or a value of the wrong type; ``refused`` if building fails with it."""

    key: str
    reason: str
    refused: bool


# -- what a user changes


def change_config(cfg: Config, changes: Mapping[str, Any], arguments: Iterable[str] = ()) -> None:
    """Merge what the user gives beside a config into it, and check that everything is read that is in the config now.

    Args:
        cfg: The config, changed in place.
        changes: Nested or dotted keys, e.g. ``{'model.backbone.img_size': 96}``.
        arguments: Names of what the caller takes besides, as other ways to write a key.

    Raises:
        InputError: a change changes nothing or does not fit; or a component does not exist, or does not take a key or
            its value. Names the key and the nearest right one.
    """
    options = list(dotted(changes))
    for option in options:
        check_top(cfg, option, arguments)
        check_inside(cfg, option)
        open_parts(cfg, option)
    for key, value in changes.items():
        try:
            cfg.merge_from_dict({key: copy.deepcopy(value)})  # MMEngine removes `_delete_` from its argument
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = ' '.join(first_line(error).split())[:200]
            raise InputError(f'{key} cannot be set ({reason}); correct it, or set the part above it.') from error
    check_config(cfg, options)


def open_parts(cfg: Config, option: str) -> None:
    """Make a dict of each None on the way to an option, which MMEngine would refuse to merge with one."""
    part = cfg
    for name in option.split('.')[:-1]:
        if not isinstance(part, (Config, dict)) or name not in part:
            return
        if part[name] is None:
            part[name] = {}
        part = part[name]


def dotted(changes: Mapping[str, Any], prefix: str = '') -> Iterator[str]:
    """The dotted keys of changes of a config, nested or not."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and value and '_delete_' not in value and 'type' not in value:
            yield from dotted(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}'


def check_top(cfg: Config, option: str, arguments: Iterable[str] = ()) -> None:
    """Raise an :class:`InputError` if nothing reads the first name of an option."""
    name, _, rest = option.partition('.')
    name = name.replace('-', '_')
    if arguments and name in OWN:
        raise InputError(f'{option} is set by the command {OWN[name]}; leave it out.')
    if name == 'data_preprocessor' and name in (cfg.get('model') or {}):
        raise InputError(f'Nothing reads {option}, as the model has its own; change model.{option}.')
    known = {*arguments_of(Runner)[0]} - {'cfg'} | TOP
    if name in known:
        return
    copies = [key for key, value in values_of(cfg) if name in cfg and value == cfg[name] and key != name]
    if copies and isinstance(cfg[name], (list, Mapping)):
        right = f'{copies[0]}.{rest}' if rest else copies[0]
        raise InputError(f'Nothing reads {option}: its value was copied when the config was read; change {right}.')
    arguments = [each for each in arguments if each != 'changes']
    deeper = [key for key, _ in values_of(cfg) if key.rpartition('.')[2] == name]
    if deeper and not rest and not difflib.get_close_matches(name, arguments):
        raise InputError(f'Nothing reads {option}; the nearest name is {min(deeper, key=len)}.')
    raise InputError(f'Nothing reads {option}; {remedy(name, [*arguments, *sorted(known)], rest=rest)}')


def check_inside(cfg: Config, option: str) -> None:
    """Raise an :class:`InputError` for a new key of a dict that is no component, if it looks like one that is there."""
    part: Any = cfg.to_dict()
    names = option.split('.')
    for depth, name in enumerate(names):
        if not isinstance(part, Mapping):
            return
        if name not in part:
            near = difflib.get_close_matches(name, map(str, part), n=1, cutoff=ALIKE)
            if near and depth and 'type' not in part:
                raise InputError(f'Nothing reads {option}; the nearest name is {".".join([*names[:depth], near[0]])}.')
            return
        part = part[name]


def remedy(name: str, known: Iterable[str], prefix: str = '', rest: str = '') -> str:
    """The nearest right name, or all of them."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f'the nearest name is {prefix}{near[0]}{"." * bool(rest)}{rest}.'
    return f'known are {", ".join(known[:40])}.' if known else 'leave it out.'


# -- what is in a config


def check_config(cfg: Config, options: Iterable[str] = ()) -> None:
    """Check that what is built from a config takes all that is in it; warn of harmless keys of a file.

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
    with in_scope(scope):
        for fault in faults_of(cfg):
            own = any(f'{fault.key}.'.startswith(f'{each}.') or each.startswith(f'{fault.key}.') for each in options)
            if fault.refused or own:
                raise InputError(fault.reason)
            warn(fault.reason)


def faults_of(cfg: Config) -> Iterator[Fault]:
    """The keys of a config that nothing reads, the values of a wrong type, and the types that do not exist."""
    arguments = arguments_of(Runner)[0]
    for name in set(cfg) - {*arguments} - TOP:
        near = difflib.get_close_matches(name, {*arguments} | TOP, n=1, cutoff=0.9)
        copied = any(value == cfg[name] and key.split('.')[0] != name for key, value in values_of(cfg))
        if near and not copied:  # else it is a variable of the file
            yield Fault(name, f'Nothing reads {name} of the config; the nearest name is {near[0]}.', False)
    yield from _wrong_values(dict(cfg), '', Reader('the runner', {**arguments, 'compile': TRUTH | DICT}, True))
    for name, value in values_of(cfg):
        if name.rpartition('.')[2] == 'data_preprocessor' and is_of_shares(value):
            reason = (
                f'{name} has mean={value["mean"]} and std={value["std"]}, of values from 0 to 1, where images have 0 '
                'to 255; multiply both by 255.'
            )
            yield Fault(name, reason, True)
    hooks = cfg.get('default_hooks')
    for name in set(hooks if isinstance(hooks, Mapping) else ()) - set(DEFAULT_HOOKS):
        if near := difflib.get_close_matches(name, DEFAULT_HOOKS, n=1, cutoff=ALIKE):
            reason = f'default_hooks has no {name}; the nearest name is default_hooks.{near[0]}.'
            yield Fault(f'default_hooks.{name}', reason, False)
    for name in [*AT_TOP, *KEYS, *LOADERS]:
        for part in _parts(cfg.get(name), name, name, AT_TOP.get(name), name in AT_TOP):
            yield from _faults_in(part)


def is_of_shares(preprocessor: Any) -> bool:
    """Whether mean and standard deviation of a data preprocessor are of values from 0 to 1; 0 and 1 change nothing."""
    both = [preprocessor.get(name) for name in ('mean', 'std')] if isinstance(preprocessor, Mapping) else []
    if not both or not all(isinstance(each, (list, tuple)) and each for each in both):
        return False
    numbers = [x for each in both for x in each if isinstance(x, Real)]
    return any(both[0]) and max(map(abs, numbers), default=2) <= 1


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


def _parts(
    value: Any, name: str, key: str, registry: Registry | None, typed: bool, owners: tuple[Mapping[str, Any], ...] = ()
) -> Iterator[Part]:
    """Every dict in a value that is built, or that something reads keys of."""
    if isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _parts(inner, f'{name}.{i}', key, registry, typed, owners)
    if not isinstance(value, Mapping):
        return
    if registry is roots.METRICS and 'metrics' in value:
        registry = roots.EVALUATOR
    holder = name == 'default_hooks' or (registry is roots.METRICS and 'type' not in value)
    if not holder:
        yield Part(name, value, registry, typed, owners)
    owners = (*owners, value) if 'type' in value else owners
    table = IN_LOADER if key in LOADERS else IN_EVALUATOR if registry is roots.EVALUATOR else ANYWHERE
    for inner_key, inner in value.items():
        known = inner_key in table
        below = table[inner_key] if known else registry
        yield from _parts(inner, f'{name}.{inner_key}', str(inner_key), below, known or holder, owners)


def _faults_in(part: Part) -> Iterator[Fault]:
    try:
        reader = _reader_of(part)
    except LookupError as error:
        yield Fault(f'{part.name}.type', error.args[0], True)
        return
    if reader is None:
        return
    yield from _wrong_values(part.value, f'{part.name}.', reader)
    if reader.known is KEYS['arch']:
        own = part.owners and str(part.owners[-1]['type']).startswith('mmmilan.')
        check_arch(part.value, part.name, divisor=4 if own else 1)
    names = set(part.value) - set(reader.known) - {'type', '_scope_', '_delete_', '_reversed_'}
    names -= set() if part.typed else _read_by_owners(part, names)
    for name in names:
        if not reader.is_open or difflib.get_close_matches(str(name), reader.known, n=1, cutoff=ALIKE):
            by = f'{reader.title} takes no {name}' if reader.title else 'nothing reads it'
            reason = f'{part.name}.{name}: {by}; {remedy(name, reader.known, f"{part.name}.")}'
            yield Fault(f'{part.name}.{name}', reason, bool(reader.title) and not reader.is_open)


def check_arch(arch: Mapping[str, Any], name: str = 'arch', divisor: int = 4) -> None:
    """Raise an :class:`InputError` if a ViT cannot have the sizes that a dict ``name`` gives.

    Sine-cosine positions, which our ViTs have, need a width that is a multiple of 4.
    """
    for key, value in arch.items():
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if key in KEYS['arch'] and not (is_whole and 1 <= value <= LARGEST):
            raise InputError(f'{name}.{key}={shown(value)} does not fit; give a whole number from 1 to {LARGEST}.')
    width, heads = arch.get('embed_dims', 0), arch.get('num_heads', 1)
    if width % heads:
        raise InputError(
            f'{name}.embed_dims={width} is not a multiple of {name}.num_heads={heads}; choose one that is.'
        )
    if width % divisor:
        raise InputError(f'{name}.embed_dims={width} is not a multiple of {divisor}; choose one that is.')


def arch_sizes(arch: str | Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a ViT of mmpretrain by their name, or as they are.

    Raises:
        InputError: mmpretrain has no ViT of this name, or a size is missing or wrong.
    """
    from mmpretrain.models import VisionTransformer

    if isinstance(arch, str):
        if arch not in VisionTransformer.arch_zoo:
            raise InputError(
                f'The arch {arch!r} is unknown; choose one of deit-tiny, deit-small, base, large, huge, or give a dict.'
            )
        return dict(VisionTransformer.arch_zoo[arch])
    if missing := {'embed_dims', 'num_layers', 'num_heads', 'feedforward_channels'} - set(arch):
        raise InputError(f'The arch lacks {", ".join(sorted(missing))}; give them all.')
    check_arch(arch)
    return dict(arch)


def _wrong_values(values: Mapping[str, Any], prefix: str, reader: Reader) -> Iterator[Fault]:
    for name, value in values.items():
        kinds = reader.known.get(name, frozenset())
        if name != 'type' and not fits(value, kinds):
            taker = f'{reader.title} takes' if reader.title else 'give'
            reason = f'{prefix}{name}={shown(value)} does not fit; {taker} {described(kinds)}.'
            yield Fault(f'{prefix}{name}', reason, True)
        elif rule := _out_of_range(name, value):
            yield Fault(f'{prefix}{name}', f'{prefix}{name}={shown(value)} is out of range; give {rule}.', True)


def _out_of_range(name: str, value: Any) -> str:
    """What a number should be that is out of the range of its name; '' if it is not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return ''
    if name in ABOVE_0 and not value > 0:
        return 'a number above 0'
    if name in FROM_0 and not value >= 0:
        return '0 or more'
    return 'a number from 0 to 1' if name in SHARES and not 0 <= value <= 1 else ''


def _reader_of(part: Part) -> Reader | None:
    """What reads a part; None if it cannot be known.

    Raises:
        LookupError: there is no such type.
    """
    key = part.top.rpartition('.')[2]
    if key in KEYS | SOME_KEYS and 'type' not in part.value:
        title = 'PyTorch' if key == 'clip_grad' else ''  # to which it is passed
        return Reader(title, KEYS.get(key) or SOME_KEYS[key], key in SOME_KEYS)
    builder = _builder_of(part)
    if not callable(builder):
        return None
    known, is_open = arguments_of(builder)
    if not known and not part.typed:  # a mixin, whose keys its owner passes to a method
        return None
    also = ALSO.get(part.top, set()) | ({'priority'} if part.registry is roots.HOOKS else set())
    also |= {'requires_grad'} if key.endswith('norm_cfg') else set()  # of which mmcv takes whether it is trained
    return Reader(getattr(builder, '__name__', str(builder)), {**known, **dict.fromkeys(also, frozenset())}, is_open)


def _builder_of(part: Part) -> Callable | None:
    """The class or function that is built from a part; None if it cannot be known.

    Raises:
        LookupError: it does not exist; says so in a sentence.
    """
    kind = part.value.get('type')
    if part.name in LOADERS:
        return DataLoader
    if kind is None and part.top == 'train_cfg':
        return EpochBasedTrainLoop if part.value.get('by_epoch', True) else IterBasedTrainLoop
    if kind is None and (part.top in DEFAULT or not part.typed):
        return DEFAULT.get(part.top)
    if kind is None and part.registry is roots.WEIGHT_INITIALIZERS and 'checkpoint' in part.value:
        return None  # mmdet's PVT takes it
    if kind is None:
        near = difflib.get_close_matches(part.name, [f'default_hooks.{name}' for name in DEFAULT_HOOKS], n=1)
        raise LookupError(f'{part.name} has no type; {f"the nearest name is {near[0]}" if near else "give it one"}.')
    if not isinstance(kind, str):
        if not callable(kind):
            raise LookupError(f'{part.name}.type={kind!r} is not a name; give the name of a class.')
        return kind
    names: list[str] = []
    choices = [part.registry] if part.typed else [part.registry, roots.MODELS, roots.TRANSFORMS, roots.TASK_UTILS]
    for choice in choices if part.registry is not None else ():
        scope = 'mmengine' if choice is roots.FUNCTIONS else part.value.get('_scope_')  # no package has its own
        with choice.switch_scope_and_registry(scope) as registry:
            if found := lookup(registry, kind):
                return found
            names += names_like(registry, kind)
    if part.registry is not None and kind.count('.') < 2 and (part.typed or kind.partition('.')[0] in SCOPES):
        raise LookupError(f'{part.name}.type={kind!r} does not exist; {remedy(kind, names)}')
    return None  # some components look names up elsewhere


def _read_by_owners(part: Part, names: set[str]) -> set[str]:
    """Those of the keys of a component inside others that the others read, by their source.

    mmdet's DETR, for one, takes ``bg_cls_weight`` out of the config of its loss before it builds the loss.
    """
    read: set[str] = set()
    for owner in part.owners if names else ():
        builder = _builder_of(Part('', owner, part.registry, False))
        if inspect.isclass(builder):
            source = source_of(builder)
            read |= {name for name in names if re.search(rf'[\'"]{re.escape(name)}[\'"]', source)}
    return read


# -- what it is built with


@contextmanager
def in_scope(scope: str | Config = 'mmpretrain') -> Iterator[None]:
    """A context in which a type without a scope is looked up in a library, or where a config means it.

    MMEngine has one such scope for the whole process, so one thread at a time is in such a context.
    """
    if isinstance(scope, Config):
        scope = scope.get('default_scope') or 'mmpretrain'
    with SCOPE, DefaultScope.overwrite_default_scope(scope):
        yield


def check_operators(cfg: Config) -> None:
    """Check that mmcv has its operators if the config is one of mmdet or mmseg, which import them.

    Raises:
        InputError: it was built without them.
    """
    if not {'mmdet', 'mmseg'}.isdisjoint((cfg.get('default_scope'), cfg.model.get('_scope_'))):
        require_operators()


def require_operators() -> None:
    """Raise an :class:`InputError` if mmcv was built without its operators."""
    if find_spec('mmcv._ext') is None:
        raise InputError(
            'Detection and segmentation need mmcv with its operators, but this mmcv was built without them; install it '
            'as docs/installation.md says (dense).'
        )
