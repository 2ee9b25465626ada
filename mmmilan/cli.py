"""The console script ``mmmilan``: each command is a function of the package, its help that function's docstring."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.version import __version__

# Command and function. What a command imports is imported when it is called.
COMMANDS = {
    'pretrain': 'mmmilan.api.pretrain:pretrain',
    'embed': 'mmmilan.api.embed:embed',
    'export-onnx': 'mmmilan.export.onnx:export_onnx',
    'report': 'mmmilan.api.report:report',
    'convert': 'mmmilan.export.convert:convert_checkpoint',
    'figures': 'mmmilan.api.figures:figures',
    'heat-maps': 'mmmilan.api.language:heat_maps',
    'search': 'mmmilan.api.language:search',
    'zero-shot': 'mmmilan.api.language:zero_shot',
}


def make_app() -> App:
    """The commands; a parameter that Python takes by position needs no name here either."""
    app = App(
        name='mmmilan',
        help='MILAN pretraining on your own images, and what comes after it.',
        version=__version__,
        default_parameter=Parameter(negative=(), consume_multiple=True),
        exit_on_error=False,
        print_error=False,
    )
    for name, function in COMMANDS.items():
        app.command(function, name=name)
    return app


def split_changes(tokens: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """Changes of a config are the options with a dot: ``--model.masking.mask_ratio 0.6`` or ``--…=0.6``.

    Returns:
        The other arguments, and the changes, e.g. ``{'model.masking.mask_ratio': 0.6}``.

    Raises:
        InputError: naming a change without a value.
    """
    from mmengine.config import DictAction

    others, changes = [], {}
    left = list(tokens)
    while left:
        token = left.pop(0)
        key, given, value = token.partition('=')
        if not re.fullmatch(r'--\w+(\.\w+)+', key):
            others.append(token)
            continue
        if not given:
            value = left.pop(0) if left else ''
        if not value or value.startswith('--'):
            raise InputError(f'{key} has no value; write {key}=VALUE.')
        changes[key[2:]] = DictAction._parse_iterable(value)
    return others, changes


def print_result(result: object) -> None:
    """A path, a number, or the fields of a row between tabs; nothing for None and models."""
    if isinstance(result, tuple):
        print(*result, sep='\t')
    elif isinstance(result, (str, os.PathLike, float)):
        print(result)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; what it returns is printed."""
    with exit_on_input_error():
        arguments, changes = split_changes(sys.argv[1:] if argv is None else argv)
        try:
            function, bound, _ = make_app().parse_args(arguments)
        except CycloptsError as error:
            error.verbose = False
            raise InputError(f'{" ".join(str(error).split()).rstrip(".")}; see mmmilan COMMAND --help.') from error
        kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
        if changes and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise InputError(f'--{next(iter(changes))} is unknown here; see mmmilan COMMAND --help.')
        result = function(*bound.args, **bound.kwargs, **changes)
    for row in result if isinstance(result, list) else [result]:
        print_result(row)


if __name__ == '__main__':
    main()
