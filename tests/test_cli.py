"""The console script: commands are functions of the package."""

from __future__ import annotations

import importlib
import inspect

import pytest
from docstring_parser import parse

from mmmilan import cli


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_help_explains_every_parameter(name, capsys):
    """The help is made of signature and docstring; every parameter has a description."""
    module, _, function = cli.COMMANDS[name].partition(':')
    function = getattr(importlib.import_module(module), function)
    explained = {parameter.arg_name: parameter.description for parameter in parse(function.__doc__).params}
    assert set(explained) == set(inspect.signature(function).parameters)
    cli.main([name, '--help'])
    shown = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
    assert parse(function.__doc__).short_description.split()[0] in shown
    positional = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
    by_name = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    assert all(each.name.upper().replace('_', '-') in shown or each.kind in by_name for each in positional)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['convert', 'a.pth'], '--dst'),
        (['convert', 'a.pth', 'b.pth', '--to', 'onnx'], '"timm"'),
        (['convert', 'a.pth', 'b.pth', '--speed', '3'], 'Unknown option: --speed'),
        (['convert', 'a.pth', 'b.pth', '--a.b', '3'], '--a.b is unknown here'),
        (['transmogrify'], 'Unknown command "transmogrify"'),
        (['convert', 'none.pth', 'b.pth'], 'none.pth'),
    ],
)
def test_errors_are_one_line(arguments, message):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_changes_of_a_config():
    tokens = ['a.png', '--model.masking.mask_ratio', '0.6', '--out', 'b.c', '--a.b=[1, 2]', '--a.c=x']
    others, changes = cli.split_changes(tokens)
    assert others == ['a.png', '--out', 'b.c']
    assert changes == {'model.masking.mask_ratio': 0.6, 'a.b': [1, 2], 'a.c': 'x'}
    for tokens in (['--a.b'], ['--a.b', '--c', '3'], ['--a.b=']):
        with pytest.raises(cli.InputError, match='--a.b has no value'):
            cli.split_changes(tokens)
