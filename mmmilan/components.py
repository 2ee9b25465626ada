"""What a part of a config is built by: the class of its type, its arguments, and the values that they take."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from numbers import Number
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mmengine.registry import Registry
from torch import Tensor, nn

SCOPES = ('mmmilan', 'mmpretrain', 'mmdet', 'mmseg', 'mmengine')
# Kinds of values in a config, and what a message calls them. An argument of other types takes any value.
WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text', list: 'a list', dict: 'a dict'}
Kinds = frozenset[type]
# Whose type hints are exact. Those of others often give one number or part where several are taken, or int for float.
EXACT = ('mmmilan.', 'torch.', 'mmengine.runner.')
WRONG = ('loss_scale',)  # of MMEngine's AmpOptimWrapper: str, and takes numbers too


def type_name(part: Mapping[str, Any]) -> str:
    """The name of the type of a part of a config, without its scope or module."""
    kind = part.get('type')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


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


def names_like(registry: Registry, kind: str) -> list[str]:
    """Names that could stand in place of a wrong one: with its scope, or those of the current scope and its parents."""
    scope = kind.rpartition('.')[0]
    if scope:
        child = registry._get_root_registry()._children.get(scope)
        return [f'{scope}.{name}' for name in child.module_dict] if child else []
    names: list[str] = []
    while registry is not None:
        names += registry.module_dict
        registry = registry.parent
    return names


@functools.cache
def arguments_of(builder: Callable) -> tuple[Mapping[str, Kinds], bool]:
    """The arguments of a class or function, through ``**kwargs`` to base classes, and if it takes others.

    With each argument come the kinds of values that it takes, none for any.
    """
    found: dict[str, Kinds] = {}
    for each in builder.__mro__ if inspect.isclass(builder) else [builder]:
        function = vars(each).get('__init__') if inspect.isclass(each) else each
        if function is None or each in (object, nn.Module):
            continue
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # written in C
            return found, True
        named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        found |= {each.name: _kinds_of(each, function) for each in named if each.name not in {*found, 'self'}}
        found |= dict.fromkeys(_old_names(function), frozenset())
        rest = [each.name for each in parameters if each.kind is each.VAR_KEYWORD]
        if not rest:
            break
        if not _passes_on(function, rest[0]):
            return found, True
    return found, False


def _kinds_of(parameter: inspect.Parameter, function: Callable) -> Kinds:
    """The kinds of values that an argument takes: those of its type hint and of its default; none for any."""
    hint = parameter.annotation
    if isinstance(hint, str):
        try:
            hint = eval(hint, getattr(function, '__globals__', {}))
        except Exception:  # imported for type checkers alone, or of a later Python
            return frozenset()
    kinds, default = set(_kinds_in(hint)), {type(parameter.default)} & set(WORDS)
    if hint is parameter.empty and default & {int, float, bool}:  # at least no text
        kinds = {list, dict}
    if object in kinds or parameter.name in WRONG:
        return frozenset()
    kinds |= default
    if not f'{function.__module__}.'.startswith(EXACT):
        numbers, several = kinds & {int, float}, kinds & {list, dict}
        kinds |= ({int, float, list} if numbers else set()) | ({float, list, dict} if several else set())
    return frozenset(kinds)


def _kinds_in(hint: Any) -> Iterator[type]:
    """The kinds of values of a type hint; ``object`` for any."""
    origin, inner = get_origin(hint), get_args(hint)
    kind = origin or hint
    if origin in (Union, types.UnionType, Annotated):
        for each in inner[:1] if origin is Annotated else inner:
            yield from _kinds_in(each)
    elif origin is Literal:
        yield from map(type, inner)
    elif kind in (Any, object, inspect.Parameter.empty) or not isinstance(kind, type):
        yield object
    elif kind in WORDS:
        yield kind
    elif issubclass(kind, Number):
        yield float
    elif issubclass(kind, Mapping):
        yield dict
    elif kind is Tensor or issubclass(list, kind) or issubclass(kind, tuple):
        yield from (list, float) if kind is Tensor else (list,)
    elif kind is not type(None):  # an object, from its config or its name
        yield from (dict, list, str)


def _old_names(function: Callable) -> list[str]:
    """The names that a decorator of mmcv still takes in place of arguments, as ``{'deformable_groups': ...}``."""
    if not hasattr(function, '__wrapped__'):
        return []
    return re.findall(r'[\'"](\w+)[\'"]\s*:', inspect.getsource(function).partition('def ')[0])


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


@functools.cache
def source_of(builder: type) -> str:
    """The source of a class and its bases, and of the modules of OpenMMLab that they are in."""
    modules = {inspect.getmodule(each) for each in builder.__mro__ if each.__module__.startswith(SCOPES)}
    return '\n'.join(inspect.getsource(module) for module in modules if module)


def fits(value: Any, kinds: Kinds) -> bool:
    """Whether an argument takes a value of a config.

    None turns many parts off, whatever their type hint says; 0 and 1 are truth values too, and these are numbers.
    """
    kind = dict if isinstance(value, Mapping) else list if isinstance(value, tuple) else type(value)
    if not kinds or value is None or kind not in WORDS:
        return True
    if kind is int:
        return bool(kinds & {int, float}) or (bool in kinds and value in (0, 1))
    if kind is float:
        return float in kinds or (int in kinds and value.is_integer())
    return bool(kinds & ({bool, int, float} if kind is bool else {kind}))


def described(kinds: Kinds) -> str:
    """What an argument takes, in words."""
    kinds = kinds - {int} if float in kinds else kinds
    return ' or '.join(word for kind, word in WORDS.items() if kind in kinds)
