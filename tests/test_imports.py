"""Imports point down the table of CONTRIBUTING.md, and never in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from helpers import ROOT


def read_table() -> dict[str, int]:
    """Row of each folder or file of the package in the table, 0 at the top."""
    table = (ROOT / 'CONTRIBUTING.md').read_text().split('Imports point down')[1].split('###')[0]
    rows = [line.split('|')[1] for line in table.splitlines() if line.startswith('| `')]
    parts = {i: re.findall(r'`(?:mmmilan/)?(\w+)(?:/|\.py)`', row) for i, row in enumerate(rows)}
    return {name: i for i, names in parts.items() for name in names}


def name_of(path: Path) -> str:
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imports(node: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a module imports anywhere, except those that only type hints need."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == 'TYPE_CHECKING':
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or '').startswith('mmmilan'):
            names = (f'{child.module}.{alias.name}' for alias in child.names)
            yield from (name if name in modules else child.module for name in names)
        yield from imports(child, modules)


def test_arrows_point_down():
    rows = read_table()
    modules = {name_of(path): path for path in (ROOT / 'mmmilan').rglob('*.py')}
    arrows = {name: set(imports(ast.parse(path.read_text()), modules)) for name, path in modules.items()}
    assert arrows['mmmilan.models.milan'] >= {'mmmilan.errors', 'mmmilan.registry'}  # they were read
    del arrows['mmmilan']  # exports the public functions, which are imported on first use
    for name, targets in arrows.items():
        for target in targets:
            above, below = rows[name.split('.')[1]], rows[target.split('.')[1]]
            assert above <= below, f'{name} imports {target}, which stands above it in CONTRIBUTING.md'
    list(TopologicalSorter(arrows).static_order())  # raises CycleError
