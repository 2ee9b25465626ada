"""The console script ``mmmilan``: each command is a public function, and its help text is the function's docstring."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.version import __version__

if TYPE_CHECKING:  # imported where they are used, where Ctrl-C is handled already
    from cyclopts import App

# Command -> function. A command is imported only when it is run.
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
    """Build the command line; parameters that are positional in Python are positional here too."""
    from cyclopts import App, Parameter

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
    """Separate changes of the config, ``--model.masking.mask_ratio 0.6`` or ``--…=0.6``, from the other arguments.

    An option is a change of the config if its name has a dot.

    Returns:
        The other arguments, and the changes, e.g. ``{'model.masking.mask_ratio': 0.6}``.

    Raises:
        InputError: a change has no value.
    """
    from mmengine.config import DictAction

    others, changes = [], {}
    left = list(tokens)
    while left:
        token = left.pop(0)
        key, equals, value = token.partition('=')
        if not re.fullmatch(r'--\w+(\.\w+)+', key):
            others.append(token)
            continue
        if not equals:
            value = left.pop(0) if left else ''
        if not value or value.startswith('--'):
            raise InputError(f'{key} has no value; write {key}=VALUE.')
        changes[key[2:]] = DictAction._parse_iterable(value)
    return others, changes


def print_result(result: object) -> None:
    """Print a path or a number as it is and a tuple as tab-separated fields; print nothing for anything else."""
    if isinstance(result, tuple):
        print(*result, sep='\t')
    elif isinstance(result, (str, os.PathLike, float)):
        print(result)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and print its result."""
    if hasattr(sys.stdout, 'reconfigure'):  # names of files that are not UTF-8 are printed as they are
        sys.stdout.reconfigure(errors='surrogateescape')
    with exit_on_input_error():
        from cyclopts import CycloptsError

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
