"""Check a config that came with a file of weights before anything is built from it.

MMEngine builds whatever a config names: a name that is not registered is imported, and some registered types call
``eval``, unpickle files or delete folders. A config that a person names is trusted as a script is. One that came with
weights may name only types that the packages of OpenMMLab register themselves, and ask for no more memory than the
weights do.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from mmengine.config import Config
from torch.utils._python_dispatch import TorchDispatchMode

from mmmilan.errors import InputError
from mmmilan.files import first_line

SCOPES = ('mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'mmmilan')
# Where a registered type may be defined. A user's own type is registered by another module.
PACKAGES = {*SCOPES, 'torch', 'torchvision'}
# Registered, but they run code, read files as pickles or Python, or write and delete files where the config says.
REFUSED = re.compile(
    r'mmpretrain\.models\.(multimodal(?!.*\.Linear$)|retrievers|classifiers\.hugging_face|utils\.(huggingface|tokenizer)'
    r'|selfsup\.milan\.CLIPGenerator)\b'
    r'|mmpretrain\.(engine\.hooks\.swav_hook|evaluation\.metrics\.shape_bias_label)\b'
    r'|mmdet\.models\.(language_models|detectors\.(kd_one_stage|d2_wrapper)|dense_heads\.atss_vlfusion_head|task_modules\.tracking)\b'
    r'|mmdet\.(datasets\.(openimages|transforms\.text_transformers)'
    r'|evaluation\.metrics\.(base_video_metric|mot_challenge_metric|cityscapes_metric))\b'
    r'|mmseg\.(evaluation\.metrics\.citys_metric|utils\.tokenizer|models\.text_encoder.*\.CLIPTextEncoder)\b'
    r'|mmcv\.cnn\.rfsearch\b|mmengine\.hooks\.profiler_hook\b'
    r'|.*\.(DumpResults|DumpDetResults|DumpProposals'
    r'|DVCLiveVisBackend)$'
)
# Operators of mmcv that mmdet and mmseg find by `eval` or `getattr`, not in a registry.
OPERATORS = {
    'nms', 'soft_nms', 'nms_match', 'nms_rotated', 'nms_quadri', 'RoIAlign', 'RoIPool', 'RoIAlignRotated',
    'SimpleRoIAlign', 'DeformRoIPoolPack', 'ModulatedDeformRoIPoolPack',
}  # fmt: skip
# What mmdet's FPG and cascade RPN look up in tables of their own.
LOOKED_UP = {'conv', 'identity', 'interpolation_conv', 'last_conv', 'dilation', 'offset'}
# Keys other than `type` whose string MMEngine or a component looks up in a registry.
_NAMES_A_TYPE = re.compile(r'\w+_type|(\w+_)?constructor|(norm|act|conv)_layer|(\w+_)?fn|(\w+_)?policy')
# Keys that say where to write, or which folder to delete.
_OUTPUT = re.compile(
    r'((seg|test|img|json)_)?(out|output|outfile|save|log|result|trace|dump|collect)s?_?(dir|file|path|prefix|file_path)'
    r'|file_path|json_trace_path|(img|config|scalar)_save_(dir|file)|tmpdir|format_dir|tracking_uri|base_url|artifact_location|repo|eval_result_file|submission_prefix'
)
_CODE = ('py', 'pkl', 'pickle', 'yml', 'yaml')  # files that MMEngine reads as code
CALL = 'call'  # key of what is only said of a run: ``commands``, the lines that made it
AS_CODE = 'a kind of file that MMEngine runs as code'
_KEY = re.compile(r'[^\'"\\\n\r]*')  # what MMEngine writes to a config and reads back as it was
# Upper bounds of numbers. Beyond them a list of that length takes the memory, or as many processes are started.
_LIMITS = dict(num_workers=128, prefetch_factor=64, batch_size=1 << 16)
_COSTS_NOTHING = {'times', 'indices', 'seed', 'metainfo'}  # numbers of a data set that are no sizes
_MODEL_LIMIT, _DATA_LIMIT = 1 << 17, 1 << 14
_SPARE_BYTES = 1 << 28  # temporary tensors, buffers
_TEACHER_BYTES = 1 << 33
_OF_ANOTHER_FILE = ContextVar('of another file', default=False)


def check_foreign_config(values: Mapping[str, Any], source: str, with_data: bool = True) -> None:
    """Refuse a config that names anything but registered types, or could take the memory away.

    No module is imported but those of :data:`SCOPES`.

    Args:
        values: The config, as plain data.
        source: Its name in messages, e.g. 'the config in epoch_1.pth'.
        with_data: Its data sets will be built, whose files must not be code; else only its model and its pipelines.

    Raises:
        InputError: it does, or it needs a package that cannot be imported.
    """
    for where, what in _faults(values):
        if what.endswith(AS_CODE) and _of_data(where) and not with_data:
            continue
        raise InputError(
            f'{where.lstrip(".")} of {source} {what}, and is refused; if you trust it as a script, give a config file '
            '(.py) in its place.'
        )


def _of_data(where: str) -> bool:
    """Whether a place belongs to a data set and to none of the pipelines, which are built for every image."""
    first, *others = where.lstrip('.').split('.')
    return first.endswith(('_dataloader', '_evaluator')) and 'pipeline' not in others


def _faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where a config does what it may not, and what."""
    if not set(_packages(values.get('custom_imports'))) <= set(SCOPES):
        yield 'custom_imports', 'imports modules'
    scope = values.get('default_scope') or 'mmpretrain'
    if scope not in SCOPES:
        yield 'default_scope', f'is {scope!r}, which would be imported'
    else:
        built = {key: value for key, value in values.items() if key != CALL}
        yield from _faults_in(built, '', ('mmengine', 'mmpretrain', scope))


def _packages(custom_imports: Any) -> list[str]:
    """The packages that ``custom_imports`` names; nothing imports them."""
    names = custom_imports.get('imports') if isinstance(custom_imports, dict) else custom_imports
    names = [names] if isinstance(names, str) else names or []
    return [str(name).partition('.')[0] for name in names]


def _faults_in(value: Any, where: str, scopes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        scope = value.get('_scope_') or scopes[-1]
        if scope not in SCOPES:
            yield f'{where}._scope_', f'is {scope!r}, which would be imported'
            return
        for key, inner in value.items():
            place = f'{where}.{key}'
            what = _fault_of_key(key) or _fault_of_name(key, inner, (*scopes, scope)) or _fault_of_value(key, inner)
            if what:
                yield place, what
            yield from _faults_in(inner, place, (*scopes, scope))
    elif isinstance(value, (list, tuple, set)):
        for i, inner in enumerate(value):
            yield from _faults_in(inner, f'{where}.{i}', scopes)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        limit = _limit(where)
        if limit and abs(value) > limit:
            yield where, f'is {value}, more than {limit}'
    elif isinstance(value, str) and value.rpartition('.')[2].strip() in _CODE:
        yield where, f'is {value!r}, {AS_CODE}'


def _limit(where: str) -> int | None:
    """The largest number in this place; None where it costs nothing, as a number of epochs."""
    parts = where.split('.')
    if 'dataset' in parts and _COSTS_NOTHING & set(parts) and 'pipeline' not in parts:
        return None
    named = next((_LIMITS[part] for part in parts if part in _LIMITS), None)
    if named:
        return named
    if any(part.endswith(('pipeline', 'dataset')) for part in parts):
        return _DATA_LIMIT
    return _MODEL_LIMIT if parts[1] in ('model', 'tta_model') else None


def _fault_of_key(key: Any) -> str:
    return 'has a name that is no name of an option' if isinstance(key, str) and not _KEY.fullmatch(key) else ''


def _fault_of_value(key: Any, value: Any) -> str:
    """What is wrong with a string in the place of this key."""
    if not isinstance(value, str) or not isinstance(key, str):
        return ''
    if _OUTPUT.fullmatch(key) and value:
        return f'is {value!r}, a place to write to'
    if key == 'filename_tmpl' and not re.fullmatch(r'[\w{}.:-]*', value):
        return f'is {value!r}, a path'
    if key == 'dtype' and not re.fullmatch(r'(torch\.|np\.)?\w*', value):  # torchvision's steps run eval
        return f'is {value!r}, no dtype'
    if value == 'pickle':
        return 'is a pickle, which can run code'
    return ''


def _fault_of_name(key: Any, name: Any, scopes: tuple[str, ...]) -> str:
    """What is wrong with the name of a type."""
    if key == 'type':
        if name is None or (isinstance(name, str) and name in OPERATORS):
            return ''
        if isinstance(name, str) and name in LOOKED_UP and not _is_module(name):
            return ''
        if not isinstance(name, str):
            return f'is {name!r} and not the name of a type'
    elif not isinstance(key, str) or not isinstance(name, str) or not _NAMES_A_TYPE.fullmatch(key):
        return ''
    found = find_registered(name, scopes)
    if found is None and (key == 'type' or '.' in name or _is_module(name)):
        return f'is {name!r}, which is no registered type of {", ".join(SCOPES)}'
    if found is None:
        return ''
    if any(not is_allowed(each) for each in found):
        return f'is {name!r}, which is registered by another package or could run code or write files'
    # In a registry that lacks it, MMEngine would import a module of this name.
    return f'is {name!r}, which is a module too' if '.' not in name and _is_module(name) else ''


def _is_module(name: str) -> bool:
    """Whether ``import name`` would find a module; nothing is imported."""
    try:
        return bool(name.isidentifier() and find_spec(name))
    except (ImportError, ValueError):
        return True


def find_registered(name: str, scopes: tuple[str, ...]) -> list[Any] | None:
    """What the registries of some scopes have under a name, such as 'LayerNorm' or 'mmdet.FPN'; None if nothing.

    Raises:
        InputError: a package of these scopes cannot be imported.
    """
    scope, dot, rest = name.partition('.')
    if dot:
        if scope not in SCOPES:
            return None
        scopes, name = (scope,), rest
    for load in (False, True):
        for scope in dict.fromkeys(reversed(scopes)):
            found = [types[name] for types in _registries(scope, load) if name in types]
            if found:
                return found
    return None


def _registries(scope: str, load: bool) -> Iterator[dict[str, Any]]:
    """The types of each registry of a scope, after the import of the modules that fill it (``load``)."""
    from mmengine.registry import Registry

    package = 'mmengine' if scope == 'mmcv' else scope  # mmcv fills MMEngine's
    try:
        for registry in list(vars(import_module(f'{package}.registry')).values()):
            if isinstance(registry, Registry):
                if load:
                    registry.import_from_location()
                yield registry.module_dict
    except (ImportError, AssertionError) as error:
        raise InputError(
            f'The config in a checkpoint needs {scope}, which cannot be imported ({first_line(error)}); install it as '
            'docs/installation.md says.'
        ) from error


def is_allowed(registered: Any) -> bool:
    """Whether a registered type comes from a package of OpenMMLab or PyTorch, and runs no code and writes no files."""
    if isinstance(registered, functools.partial):
        registered = registered.func
    # a subclass does what its bases do
    names = [f'{each.__module__}.{each.__qualname__}' for each in getattr(registered, '__mro__', [registered])]
    return names[0].partition('.')[0] in PACKAGES and not any(map(REFUSED.match, names))


# -- memory


@contextmanager
def within_weights(config: Config) -> Iterator[None]:
    """Build a model in this context; if its config came with weights, it may take little more memory than they do.

    Raises:
        InputError: it asks for more.
    """
    weights = vars(config).get('_weights')  # set by `mark_foreign`
    with _Memory(*weights) if weights else nullcontext():
        yield


def mark_foreign(config: Config, source: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Note in a config the weights that it came with, for :func:`within_weights`; its copies keep the note."""
    nbytes = 4 * sum(weight.numel() for weight in weights.values())
    object.__setattr__(config, '_weights', (source, 4 * nbytes + _SPARE_BYTES, 16 * len(weights) + 2000))


@contextmanager
def of_another_file() -> Iterator[None]:
    """Build in this context what the weights beside a config do not hold, which is a teacher."""
    token = _OF_ANOTHER_FILE.set(True)
    try:
        yield
    finally:
        _OF_ANOTHER_FILE.reset(token)


class _Memory(TorchDispatchMode):
    """Counts the tensors that are made from nothing, before their memory is taken."""

    def __init__(self, source: str, nbytes: int, count: int) -> None:
        super().__init__()
        self.source, self.count = source, count
        self.nbytes = {False: nbytes, True: _TEACHER_BYTES}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(value, torch.Tensor) for value in args):
            itemsize = (kwargs.get('dtype') or torch.float32).itemsize
            sizes = [value if isinstance(value, (list, tuple)) else [value] for value in args]
            sizes = [math.prod(size) for size in sizes if all(type(number) is int for number in size)]
            elsewhere = _OF_ANOTHER_FILE.get()
            self.nbytes[elsewhere] -= max(sizes, default=0) * itemsize
            self.count -= not elsewhere
            if self.count < 0 or min(self.nbytes.values()) < 0:
                raise InputError(
                    f'The model of {self.source} is far larger than the weights beside it; give the config that they '
                    'were trained with.'
                )
        return func(*args, **kwargs)
