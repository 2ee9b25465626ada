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
    'convert': 'mmmilan.export.convert:convert_checkpoint',
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


def read_changes(tokens: Sequence[str]) -> dict[str, object]:
    """``--model.masking.mask_ratio 0.6`` or ``--…=0.6`` as ``{'model.masking.mask_ratio': 0.6}``.

    Raises:
        InputError: naming what is no option with a value.
    """
    from mmengine.config import DictAction

    text = [token for each in tokens for token in (each.split('=', 1) if each.startswith('--') else [each])]
    changes = {}
    for key, value in zip(text[::2], [*text[1::2], ''], strict=False):
        if not re.fullmatch(r'--[\w.-]+', key) or not value:
            raise InputError(f'{key} is no option with a value; see mmmilan COMMAND --help.')
        changes[key[2:]] = DictAction._parse_iterable(value)
    return changes


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; what it returns is printed."""
    app = make_app()
    with exit_on_input_error():
        try:
            function, bound, unused, _ = app.parse_known_args(argv)
        except CycloptsError as error:
            error.verbose = False
            raise InputError(f'{" ".join(str(error).split())} See mmmilan COMMAND --help.') from error
        kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
        if unused and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise InputError(f'{unused[0]} is unknown here; see mmmilan COMMAND --help.')
        result = function(*bound.args, **bound.kwargs, **read_changes(unused))
    if isinstance(result, (str, os.PathLike)):
        print(os.fspath(result))


if __name__ == '__main__':
    main(sys.argv[1:])
