"""Read the config of a checkpoint as data, never as code.

MMEngine stores the config in every checkpoint (``meta.cfg``) and in the work dir, as Python assignments. They contain
only literals and ``dict(...)``; nothing else is accepted here, and nothing is executed.
"""

from __future__ import annotations

import ast
import json
import keyword
import math
import os
import re
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from mmmilan.building import TOP
from mmmilan.checkpoints.foreign_config import CALL, check_foreign_config, mark_foreign
from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file
from mmmilan.components import arguments_of
from mmmilan.errors import InputError
from mmmilan.files import first_line, read_text

_RESERVED = {'filename', 'text', 'pretty_text', 'env_variables', '_base_'}  # MMEngine's, of a config's attributes
WRITTEN = '# Written by mmmilan.'  # first line of a config that a run may replace
_NUMBERS = {'inf': float('inf'), 'nan': float('nan')}


class NoConfig(InputError):
    """A checkpoint has no config that is plain data."""


def own_config(checkpoint: str | os.PathLike, with_data: bool = False) -> Config:
    """The config in a checkpoint file, or else the only one in its folder.

    What is built from it is safe, see :mod:`mmmilan.checkpoints.foreign_config`. Variables that nothing reads are left
    out.

    Args:
        checkpoint: The file.
        with_data: The data sets of the config will be built too, and not only its model and its pipelines.

    Raises:
        NoConfig: there is none, or it is not plain data, or describes no model.
        InputError: the file cannot be read, or its config could run code.
    """
    path = Path(checkpoint)
    content = load_checkpoint_file(path)
    config, source = config_within(path, content)
    for name in set(config) - {*arguments_of(Runner)[0], CALL} - TOP:
        config.pop(name)
    check_foreign_config(config.to_dict(), source, with_data)
    mark_foreign(config, source, get_state_dict(content, str(path)))
    return config


def config_within(path: Path, content: Mapping[str, Any]) -> tuple[Config, str]:
    """The config in a checkpoint, or beside it, to read values from, and its name in messages.

    Only what :func:`own_config` gives may be built. This one may name types that are not known here.

    Raises:
        NoConfig: see :func:`own_config`.
    """
    meta = content.get('meta')
    text, source = meta.get('cfg') if isinstance(meta, dict) else None, f'the config in {path}'
    if not isinstance(text, str):
        beside = sorted(path.absolute().parent.glob('*.py'))
        if len(beside) != 1:
            found = 'several are' if beside else 'none is'
            raise NoConfig(
                f'{path} holds no config and {found} beside it; give the config or a name of the zoo as well.'
            )
        text, source = read_text(beside[0]), str(beside[0])
    config = parse_config(text, source)
    if not isinstance(config.get('model'), dict):
        raise NoConfig(f'There is no model in {source}; give a config file as well.')
    place_data_preprocessor(config)
    return config, source


def call_of(config: Config) -> dict[str, Any]:
    """How the run of a config was called: ``commands``, the lines that were typed, and what else the command kept."""
    call = config.get(CALL)
    call = dict(call) if isinstance(call, dict) else {}
    commands = call.get('commands')
    return call | dict(commands=list(map(str, commands)) if isinstance(commands, list) else [])


def place_data_preprocessor(config: Config) -> None:
    """Move a data preprocessor at the top of a config, where mmpretrain's have it, into the model, as MMEngine does."""
    model = config.get('model')
    if isinstance(model, Mapping) and 'data_preprocessor' not in model and 'data_preprocessor' in config:
        model['data_preprocessor'] = config.pop('data_preprocessor')


def gives_rgb(preprocessor: Mapping[str, Any]) -> bool:
    """Whether a data preprocessor, by its config, turns the images, which are read as BGR, into RGB."""
    return bool(preprocessor.get('to_rgb') or preprocessor.get('bgr_to_rgb'))  # mmpretrain's option, and MMDetection's


def keep_encoder(config: Config) -> None:
    """Reduce the model of a pretraining config to its encoder, as an mmpretrain ``ImageClassifier`` without head."""
    if 'masking' in config.model:
        given = config.model.get('data_preprocessor') or {}
        normalisation = {key: given[key] for key in ('mean', 'std') if key in given}
        normalisation['to_rgb'] = gives_rgb(given)
        backbone = config.model.backbone
        config.model = dict(type='ImageClassifier', backbone=backbone, data_preprocessor=normalisation)


def config_text(config: Config) -> str:
    """A config as MMEngine writes it, with a first line by which :data:`WRITTEN` is recognised.

    Raises:
        InputError: it could not be read again, because of the name or the value of an option.
    """
    check_plain(config.to_dict())
    return f'{WRITTEN}\n{config.pretty_text}'


def check_plain(value: Any, name: str = '') -> None:
    """Check that MMEngine can write an option, and all below it, as Python that gives the same value.

    Raises:
        InputError: it cannot; the message names the option.
    """
    if isinstance(value, dict):
        for key, each in value.items():
            text = str(key)
            identifier = text.isidentifier() and not keyword.iskeyword(text)
            # if one key is no identifier, MMEngine writes the keys of this dictionary between quotes
            if not identifier and (not name or keyword.iskeyword(text) or repr(key).strip("'") != text):
                raise InputError(f'{text!r} in {name or "the config"} is no name of an option; correct it.')
            check_plain(each, f'{name}.{text}' if name else text)
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            check_plain(each, f'{name}.{i}')
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f'{name} is {value}; give a finite number, such as 1e30.')
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise InputError(
            f'{name} is a {type(value).__name__}, which a config cannot hold; give a number, a text, a list or a dict.'
        )


def parse_config(text: str, source: str) -> Config:
    """A dumped config from its text. Nothing is executed; what it names is not checked, see :func:`own_config`.

    Args:
        text: assignments of literals and ``dict(...)`` to names.
        source: name of the config in messages.

    Raises:
        NoConfig: a line is anything else.
    """
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
                raise _NotData(statement)
            values[statement.targets[0].id] = _value(statement.value)
    except (SyntaxError, _NotData) as error:
        raise NoConfig(
            f'Line {error.lineno} of {source} is not plain data; give the config that MMEngine wrote to the work dir.'
        ) from error
    except (MemoryError, RecursionError, TypeError, ValueError) as error:  # nested without end; [] as a key; zero bytes
        raise NoConfig(
            f'No plain data is in {source} ({first_line(error)}); give the config that MMEngine wrote to the work dir.'
        ) from error
    reserved = values.keys() & _RESERVED
    if reserved:
        raise NoConfig(f'{min(reserved)} of {source} is a name of MMEngine; remove it.')
    return Config(values)


def read_config_file(path: str | os.PathLike) -> Config:
    """Run a config file, which is Python, and its bases.

    Raises:
        InputError: there is no such file, or it cannot be run.
    """
    if not os.path.isfile(path):
        raise InputError(f'{path} is not a file; give a config, a checkpoint or a model of the zoo.')
    try:
        return Config.fromfile(path)
    except InputError:
        raise
    except Exception as error:  # a config can raise anything
        in_config = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.name == '<module>']
        line = getattr(error, 'lineno', None) or (in_config[-1] if in_config else None)
        raise InputError(
            f'The config {path} cannot be read ({type(error).__name__}: {" ".join(first_line(error).split())[:300]}); '
            f'correct it{f", at line {line}" if line else ""}.'
        ) from error


def option_value(word: str) -> Any:
    """The value of an option on the command line: a literal of Python or JSON, ``a,b`` as a list, or the word itself.

    Raises:
        InputError: it begins as a dict and is none.
    """
    word = word.strip()
    try:
        value = _value(ast.parse(word, mode='eval').body)
        return list(value) if isinstance(value, tuple) and not word.startswith('(') else value
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError, _NotData):
        pass
    with suppress(ValueError, RecursionError):
        return json.loads(word)
    if re.match(r'\{|dict\(', word):
        raise InputError(f'{word[:80]} is not a dict; write it as dict(a=1) or {{"a": 1}}.')
    if len(parts := _split(word)) > 1 or re.fullmatch(r'\(.*\)|\[.*\]', word):
        inside = _split(word[1:-1]) if re.fullmatch(r'\(.*\)|\[.*\]', word) and len(parts) == 1 else parts
        values = [option_value(each) for each in inside if each.strip()]
        return tuple(values) if word.startswith('(') and len(parts) == 1 else values
    return {'true': True, 'false': False}.get(word.lower(), word)


def _split(word: str) -> list[str]:
    """Split at the commas outside of brackets; brackets that do not match are letters."""
    parts, depth = [''], 0
    for letter in word:
        depth += (letter in '([{') - (letter in ')]}')
        if letter == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return parts if depth == 0 else [word]


class _NotData(Exception):
    def __init__(self, node: ast.AST) -> None:
        super().__init__()
        self.lineno = node.lineno


def _value(node: ast.expr) -> Any:
    """Evaluate a literal, ``dict(...)`` or ``dict({...})``."""
    if isinstance(node, ast.Call):
        named = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
        of_names = isinstance(node.func, ast.Name) and node.func.id == 'dict' and None not in named
        if not of_names or len(node.args) > 1 or not all(isinstance(each, ast.Dict) for each in node.args):
            raise _NotData(node)
        return {**(_value(node.args[0]) if node.args else {}), **named}
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        return kind(_value(element) for element in node.elts)
    if isinstance(node, ast.Name) and node.id in _NUMBERS:
        return _NUMBERS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Name):
        return -_value(node.operand)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _NotData(node) from None
