"""The console script ``mmmilan``: each command is the function of that name, its help the function's docstring."""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter

import mmmilan
from mmmilan.errors import InputError, exit_on_input_error

# What a person wants -> the commands for it.
COMMANDS = {
    'Your own images': (
        'pretrain',
        'finetune',
        'predict',
        'report',
        'embed',
        'zero-shot',
        'search',
        'heat-maps',
        'figures',
    ),
    "Configs of OpenMMLab's kind": ('train', 'test', 'get-flops'),
    'Models for other programs': ('convert', 'export-onnx'),
}
HELP = ('--help', '-h', '--version')


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and print its result."""
    if hasattr(sys.stdout, 'reconfigure'):  # names of files that are not UTF-8 are printed as they are
        sys.stdout.reconfigure(errors='surrogateescape')
    with exit_on_input_error():
        result = run(list(sys.argv[1:] if argv is None else argv))
        if os.environ.get('RANK', '0') == '0':  # of a launcher's processes, one
            for row in result if isinstance(result, list) else [result]:
                print_result(row)
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        from mmmilan.engine.distributed import leave

        leave(0)


def print_result(result: object) -> None:
    """Print a path or a number as it is, a tuple as tab-separated fields, a dict in lines; nothing for the rest."""
    if isinstance(result, tuple):
        print(*result, sep='\t')
    elif isinstance(result, dict):
        print(*(f'{name}\t{value}' for name, value in result.items()), sep='\n')
    elif isinstance(result, (str, os.PathLike, float)):
        print(result)


def run(tokens: list[str]) -> Any:
    """Run the command that the first token names; returns what its function returns.

    Raises:
        InputError: a command, an argument or an option is wrong.
    """
    command, *rest = tokens or ['--help']
    known = [name for names in COMMANDS.values() for name in names]
    if command in HELP:
        target, bound, _ = overview().parse_args([command])
        return target(*bound.args, **bound.kwargs)
    if command not in known:
        near = difflib.get_close_matches(command.lower().replace('_', '-'), known, n=1)
        raise InputError(f'{command} is no command; {f"the nearest is {near[0]}" if near else "see mmmilan --help"}.')
    function = getattr(mmmilan, command.replace('-', '_'))
    rest, given, changes = split_tokens(rest, function)
    app = new_app()
    app.command(as_command(function, given), name=command, usage=usage(command, function))
    try:
        target, bound, _ = app.parse_args([command, *rest])
    except CycloptsError as error:
        error.verbose = False
        raise InputError(f'{" ".join(str(error).split()).rstrip(".")}; see mmmilan {command} --help.') from error
    if target.__name__ != 'command':  # --help is a function of cyclopts
        return target(*bound.args, **bound.kwargs)
    return function(**bound.arguments.pop('changes', {}) | bound.arguments | given | changes)


def new_app() -> App:
    """A command line without commands."""
    return App(
        name='mmmilan',
        help='MILAN pretraining on your own images, and what comes after it.',
        version=mmmilan.__version__,
        default_parameter=Parameter(negative=(), consume_multiple=True),
        exit_on_error=False,
        print_error=False,
    )


def overview() -> App:
    """The command line as its help shows it: all commands, of which no function is imported."""
    app = new_app()
    for position, (title, names) in enumerate(COMMANDS.items()):
        group = Group(title, sort_key=position)
        for name in names:
            app.command(print, name=name, group=group, help=summary(name))
    return app


def summary(name: str) -> str:
    """The first line of the docstring of a command's function, which is not imported."""
    function = name.replace('-', '_')
    file = Path(mmmilan.__file__).parents[1].joinpath(*mmmilan.MODULES[function].split('.')).with_suffix('.py')
    source = file.read_text(encoding='utf-8')
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return ast.get_docstring(node).partition('\n')[0]
    raise LookupError(function)


def words_of(function: Callable) -> list[inspect.Parameter]:
    """The arguments of a function that a command line gives as words, without their names, in order.

    Where one of them is a list, those with a default other than None are given by name alone: the list takes all words
    but those of the arguments after it, as the sources of ``cp`` do.
    """
    parameters = inspect.signature(function).parameters.values()
    words = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    return [each for each in words if each.default in (each.empty, None)] if any(map(is_list, words)) else words


def is_list(word: inspect.Parameter) -> bool:
    """Whether an argument takes several words."""
    return any(name in str(word.annotation) for name in ('Paths', 'Sequence'))


def split_tokens(tokens: list[str], function: Callable) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Take out of a command line what cyclopts cannot read.

    These are changes of the config, ``--model.masking.mask_ratio 0.6`` or ``--cfg-options a.b=3 c=None``; parts of an
    argument that is a dict, ``--arch.embed_dims 48``; and words that are given by name, where one of them is a list.

    Returns:
        The other tokens; arguments of the function; changes of the config, e.g. ``{'model.masking.mask_ratio': 0.6}``.

    Raises:
        InputError: an option has no value, or the command takes no changes.
    """
    parameters = inspect.signature(function).parameters
    takes_changes = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    words = words_of(function)
    lists = {each.name for each in words if is_list(each)}
    by_name = {each.name for each in words} if lists else set()
    others, given, changes, left = [], {}, {}, list(tokens)
    while left:
        token = left.pop(0)
        option, equals, value = token.partition('=')
        name = option.removeprefix('--').replace('-', '_')  # with dashes or without, as other options
        dotted = re.fullmatch(r'--\w[\w-]*(\.[\w-]+)+', option)
        if not dotted and not (option.startswith('--') and name in (*by_name, 'cfg_options')):
            others.append(token)
            continue
        values = [value] if equals else []
        several = not equals and name in (*lists, 'cfg_options')
        while left and not left[0].startswith('--') and (several or not (values or equals)):
            values.append(left.pop(0))
        if not values or '' in values:
            raise InputError(f'{option} has no value; write {option}=VALUE.')
        first, *inner = name.split('.')
        if name in by_name:
            given[name] = values if several else values[0]
        elif name == 'cfg_options' and takes_changes:
            changes |= dict(map(read_change, values))
        elif dotted and first in parameters.keys() - by_name:
            given[first] = set_inside(given.get(first, {}), inner, option_value(values[0]))
        elif dotted and takes_changes:
            changes[name] = option_value(values[0])
        else:
            raise InputError(f'{option} is unknown here; see mmmilan COMMAND --help.')
    return others, given, changes


def read_change(word: str) -> tuple[str, Any]:
    """``KEY=VALUE`` as a change of the config.

    Raises:
        InputError: it is something else.
    """
    key, equals, value = word.partition('=')
    if not re.fullmatch(r'\w+(\.[^.\s]+)*', key) or not equals:
        raise InputError(f'--cfg-options {word} is not KEY=VALUE; write for instance train_cfg.max_epochs=10.')
    return key, option_value(value)


def set_inside(part: dict, keys: list[str], value: Any) -> dict:
    """A dict with a value below nested keys."""
    *path, last = keys
    inner = part
    for key in path:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return part


def as_command(function: Callable, given: Mapping[str, Any]) -> Callable:
    """The function with the signature of a command, without the arguments that are given already.

    Numbers are read as Python reads them, and the function says which ones it takes.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    words = words_of(function)
    by_place = any(map(is_list, words))
    chosen = []
    for each in inspect.signature(function).parameters.values():
        kind, hint = each.kind, hints[each.name]
        if each.name in given:
            continue
        if by_place and kind is each.POSITIONAL_OR_KEYWORD:
            kind = each.POSITIONAL_ONLY if each in words else each.KEYWORD_ONLY
        if kind is each.KEYWORD_ONLY and {int, float} & set(plain_types(hint)):
            hint = Annotated[hint, Parameter(converter=read_numbers), Unchecked()]
        elif 'dict' in str(each.annotation):
            hint = Annotated[hint, Parameter(converter=read_dict)]
        chosen.append(each.replace(kind=kind, annotation=hint))

    def command(*args: Any, **kwargs: Any) -> None:
        """Stands for the function while the command line is read."""

    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(sorted(chosen, key=lambda each: each.kind))
    command.__annotations__ = {each.name: each.annotation for each in chosen}
    return command


def option_value(word: str) -> Any:
    """The value that a word of the command line stands for, see :func:`mmmilan.checkpoints.config.option_value`."""
    from mmmilan.checkpoints import config  # imports PyTorch

    return config.option_value(word)


class Unchecked:
    """Keeps pydantic, which cyclopts asks where a program has loaded it, from a value that the function checks."""

    def __get_pydantic_core_schema__(self, *types: Any) -> Any:
        from pydantic_core.core_schema import any_schema

        return any_schema()


def read_numbers(kind: Any, tokens: Sequence[Any]) -> Any:
    """A number, or several as a tuple."""
    values = [option_value(token.value) for token in tokens]
    return values[0] if len(values) == 1 else tuple(values)


def read_dict(kind: Any, tokens: Sequence[Any]) -> Any:
    """A word as it is, or a dict in Python's notation or JSON's."""
    word = tokens[0].value
    return option_value(word) if word.lstrip().startswith(('{', 'dict(')) else word


def usage(name: str, function: Callable) -> str:
    """A line that can be typed with values in place of the capital letters."""
    words = []
    for each in words_of(function):
        word = each.name.upper() + '...' * is_list(each)
        words.append(word if each.default is each.empty else f'[{word}]')
    return f'Usage: mmmilan {name} {" ".join(words)} [OPTIONS]'


def plain_types(hint: Any) -> list[Any]:
    """The types within a type."""
    inner = [each for part in typing.get_args(hint) for each in plain_types(part)]
    return inner or [hint]


if __name__ == '__main__':
    main()
