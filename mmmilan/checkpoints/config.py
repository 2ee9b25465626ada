"""Read the config of a checkpoint as data, never as code.

MMEngine stores the config in every checkpoint (``meta.cfg``) and in the work dir, as Python assignments. They contain
only literals and ``dict(...)``; nothing else is accepted here, and nothing is executed.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.errors import InputError

_NUMBERS = {'inf': float('inf'), 'nan': float('nan')}


def own_config(checkpoint: str | os.PathLike) -> Config:
    """The config in a checkpoint file, or else the only one in its folder.

    Raises:
        InputError: the file cannot be read, there is no config, or it is not plain data.
    """
    path = Path(checkpoint)
    meta = load_checkpoint_file(path).get('meta')
    text = meta.get('cfg') if isinstance(meta, dict) else None
    if isinstance(text, str):
        return parse_config(text, f'the config in {path}')
    beside = sorted(path.absolute().parent.glob('*.py'))
    if len(beside) != 1:
        found = 'several are' if beside else 'none is'
        raise InputError(f'{path} holds no config and {found} beside it; give the config or a name of the zoo as well.')
    return parse_config(beside[0].read_text(encoding='utf-8'), str(beside[0]))


def parse_config(text: str, source: str) -> Config:
    """A dumped config from its text.

    Args:
        text: assignments of literals and ``dict(...)`` to names.
        source: name of the config in messages.

    Raises:
        InputError: a line is anything else.
    """
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
                raise _NotData(statement)
            values[statement.targets[0].id] = _value(statement.value)
    except (SyntaxError, _NotData) as error:
        raise InputError(
            f'Line {error.lineno} of {source} is not plain data; give the config that MMEngine wrote to the work dir.'
        ) from error
    return Config(values)


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
