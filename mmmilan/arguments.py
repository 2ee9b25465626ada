"""The arguments of public functions, checked where they enter: in Python and on the command line alike.

A range or another rule stands in the type of an argument, as ``batch_size: Count``, and ``checked`` enforces it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import numbers
import os
import shlex
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from mmmilan.errors import InputError, shown

Function = TypeVar('Function', bound=Callable)


class Whole(NamedTuple):
    """A whole number in a range."""

    lowest: int
    highest: int

    def __call__(self, name: str, value: Any) -> int:
        rule = f'give a whole number from {self.lowest} to {self.highest}.'
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InputError(f'{name}={shown(value)} is not a whole number; {rule}')
        if not self.lowest <= value <= self.highest:
            raise InputError(f'{name}={shown(value)} is out of range; {rule}')
        return int(value)


def check_path(name: str, value: Any) -> str | os.PathLike:
    """A path that names something: '' would be the current folder."""
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise InputError(f'{name}={shown(value)} is not a path; give a str or a Path.')
    path = os.fspath(value)
    if not path.strip() or '\0' in path or max(len(os.fsencode(part)) for part in path.split('/')) > 255:
        raise InputError(f'{name}={shown(value)} names no file; give a path.')
    return value


def check_paths(name: str, value: Any) -> str | os.PathLike | list:
    """One path, or any iterable of paths; a list of one is that path."""
    value = as_list(value)
    if isinstance(value, (str, os.PathLike)):
        return check_path(name, value)
    paths = [check_path(name, each) for each in several(name, value, 'paths')]
    return paths if len(paths) > 1 else paths[0]


def check_text(name: str, value: Any) -> str:
    """A text with at least one visible character."""
    if not isinstance(value, str):
        raise InputError(f'{name}={shown(value)} is not a text; give a str.')
    if not value.strip():
        raise InputError(f'{name} has an empty text; say something in it.')
    return value


def check_texts(name: str, value: Any) -> list[str]:
    """Several texts; a single str is not several, as its letters would be taken for them."""
    if isinstance(value, str):
        raise InputError(f'{name}={shown(value)} is one text and not a list; give a list of texts.')
    return [check_text(name, each) for each in several(name, value, 'texts')]


def as_list(value: Any) -> Any:
    """An array or a column of texts or objects, such as paths, as a list; anything else as it is."""
    is_listed = getattr(getattr(value, 'dtype', None), 'kind', '') in ('O', 'U') and hasattr(value, 'tolist')
    return value.tolist() if is_listed else value


def several(name: str, value: Any, what: str) -> list:
    """The elements of an iterable that is neither empty nor a tensor."""
    if not isinstance(value, Iterable) or isinstance(value, (bytes, dict)) or hasattr(value, 'dtype'):
        raise InputError(f'{name}={shown(value)} is not a list of {what}; give one.')
    elements = list(value)
    if not elements:
        raise InputError(f'{name} is empty; give at least one.')
    return elements


def check_images(name: str, value: Any) -> list:
    """One image, any iterable of images or an array of them -> the images: paths, arrays or PIL images.

    Of an array only the shape tells one from several; its type and values are for whoever reads it.
    """
    import numpy as np
    from PIL.Image import Image

    value = as_list(value)
    if isinstance(value, (str, os.PathLike, Image)) or (isinstance(value, np.ndarray) and value.ndim < 4):
        value = [value]
    images = several(name, list(value) if isinstance(value, np.ndarray) else value, 'images')
    for i, image in enumerate(images):
        if isinstance(image, (str, os.PathLike)):
            check_path(name, image)
        elif not isinstance(image, (np.ndarray, Image)):
            where = f'{name}[{i}]' if len(images) > 1 else name
            raise InputError(
                f'{where}={shown(image)} is not an image; give a path, a PIL image, or a uint8 array [H, W, 3] in BGR '
                'order.'
            )
    return images


def check_device(name: str, value: Any) -> str:
    """A device that this machine has."""
    import torch

    try:
        if str(value) == 'meta':
            raise RuntimeError
        torch.empty(0, device=str(value))
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        known = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
        raise InputError(
            f'{name}={shown(value)} is not a device of this machine; choose one of {", ".join(known)}.'
        ) from error
    return str(value)


def check_rate(name: str, value: Any) -> float:
    """A learning rate: a number above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < float('inf'):
        raise InputError(f'{name}={shown(value)} is not a number above 0; give one, such as 0.001.')
    return float(value)


Count = Annotated[int, Whole(1, 1_000_000)]
Workers = Annotated[int, Whole(0, 256)]
Pixels = Annotated[int, Whole(1, 16384)]
Seed = Annotated[int, Whole(0, 2**32 - 1)]
Rate = Annotated[float, check_rate]
Path = Annotated[str | os.PathLike, check_path]
Paths = Annotated[Sequence[str | os.PathLike] | str | os.PathLike, check_paths]
Images = Annotated[Any, check_images]
Text = Annotated[str, check_text]
Texts = Annotated[Sequence[str], check_texts]
Device = Annotated[str, check_device]


def check(hint: Any, name: str, value: Any) -> Any:
    """Check a value by the type of an argument; returns it, a generator as a list.

    Raises:
        InputError: it is not of this type; names the argument and says what it takes.
    """
    kind = typing.get_origin(hint)
    if kind is Annotated:
        rules = [each for each in hint.__metadata__ if isinstance(each, (Whole, types.FunctionType))]
        return rules[0](name, value) if rules else check(hint.__origin__, name, value)
    if kind in (typing.Union, types.UnionType):
        return check_one_of(typing.get_args(hint), name, value)
    if kind is Literal:
        return check_choice(typing.get_args(hint), name, value)
    if kind is tuple and typing.get_args(hint):
        if not isinstance(value, (tuple, list)) or len(value) != len(typing.get_args(hint)):
            raise InputError(f'{name}={shown(value)} is wrong; give {len(typing.get_args(hint))} values.')
        return tuple(check(each, name, item) for each, item in zip(typing.get_args(hint), value, strict=True))
    kind = kind or hint
    if kind is not Any and isinstance(kind, type) and not isinstance(value, kind):
        raise InputError(f'{name}={shown(value)} is not a {kind.__name__}; give one.')
    return value


def check_one_of(hints: Sequence[Any], name: str, value: Any) -> Any:
    """Check a value that may be of several types; the message is of the one that it is of, or else of the last."""
    if value is None and type(None) in hints:
        return value
    own = None
    for hint in [each for each in hints if each is not type(None)]:
        try:
            return check(hint, name, value)
        except InputError as refused:
            error = refused
            own = refused if isinstance(value, kinds_of(hint)) else own
    raise own or error


def kinds_of(hint: Any) -> tuple[type, ...]:
    """The classes of a type hint, whatever is within them or which rules they follow."""
    hint = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [typing.get_origin(each) or each for each in (typing.get_args(hint) if union else (hint,))]
    return tuple(kind for kind in kinds if isinstance(kind, type))


def check_choice(choices: Sequence[str], name: str, value: Any) -> str:
    """Check a value that is one of several names."""
    if value in choices:
        return value
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    rule = f'the nearest is {nearest[0]}' if nearest else f'choose one of {", ".join(choices)}'
    raise InputError(f'{name}={shown(value)} is unknown; {rule}.')


def checked(function: Function) -> Function:
    """Check the arguments of a function by their types, and name the part of a config that it fails to build.

    Raises:
        InputError: an argument is missing, unknown or wrong, or a part of a config cannot be built.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            sentence = misfit(function.__qualname__.partition('.__')[0], signature, error, kwargs)
            raise InputError(sentence) from error
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            if parameter.annotation is not parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
                hint = parameter.annotation
                hint = eval(hint, function.__globals__) if isinstance(hint, str) else hint
                bound.arguments[name] = check(hint, name, value)
        try:
            return function(*bound.args, **bound.kwargs)
        except InputError:
            raise
        except Exception as error:
            from mmmilan.failures import build_failure

            sentence = build_failure(error)
            if sentence is None:
                raise
            raise InputError(sentence) from error

    return call


def typed(command: str, words: Iterable[Any], options: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """The call of a function as the line that a shell takes.

    Args:
        command: Name of the function.
        words: Arguments that are given without their names.
        options: Arguments by name; those that are None or False are left out.
        changes: Of the config, nested or with dotted keys.
    """
    from mmmilan.building import dotted, values_of

    line = ['mmmilan', command, *map(as_word, words), *as_options(options)]
    values = dict(values_of(changes))
    pairs = [(key, as_word(values[key])) for key in dotted(changes)]
    line += [word for key, value in pairs if '.' in key for word in (f'--{key}', value)]
    whole = [f'{key}={value}' for key, value in pairs if '.' not in key]
    return shlex.join([*line, *(['--cfg-options', *whole] if whole else [])])


def as_options(options: Mapping[str, Any]) -> list[str]:
    """Arguments by name as the words of a command line, without those that are None or False."""
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
            words += [f'--{name.replace("_", "-")}', *map(as_word, values)]
    return words


def as_word(value: Any) -> str:
    """A value as the command line reads it."""
    return json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else str(value)


def misfit(title: str, signature: inspect.Signature, error: TypeError, given: dict[str, Any]) -> str:
    """Why a call does not fit a signature."""
    known = [name for name in signature.parameters if name != 'self']
    takes_all = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    for name in () if takes_all else given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            rule = f'the nearest name is {nearest[0]}' if nearest else f'it takes {", ".join(known)}'
            return f'{title} takes no {name}; {rule}.'
    return f'{title}: {error}; it takes {", ".join(known)}.'
