"""Which arguments a component takes, and of what types."""

from __future__ import annotations

import pytest
from mmengine.hooks import Hook
from torch import nn

from mmmilan.components import arguments_of, described, fits
from mmmilan.models import MILANViT


class Passes(Hook):
    def __init__(self, a: int, **kwargs) -> None:
        super().__init__(**kwargs)


class Keeps(Hook):
    def __init__(self, a: int, **kwargs) -> None:
        self.kept = kwargs


class Below(Keeps):
    def __init__(self, b: int, **kwargs) -> None:
        super().__init__(**kwargs)


def test_arguments_through_base_classes():
    number = frozenset({int, float, list})  # where a type hint is not ours or PyTorch's
    assert arguments_of(Passes) == (dict(a=number), False)
    assert arguments_of(Keeps) == (dict(a=number), True) and set(arguments_of(Below)[0]) == {'a', 'b'}
    names, is_open = arguments_of(MILANViT)
    assert {'with_cp', 'arch', 'init_cfg', 'out_type'} <= set(names) and not is_open
    assert {'normalized_shape', 'eps'} <= set(arguments_of(nn.LayerNorm)[0])


@pytest.mark.parametrize(
    ('kinds', 'taken', 'refused', 'words'),
    [
        ({int}, (3, 64.0, True, None), (2.5, 'many', [8]), 'a whole number'),
        ({float, int}, (3, 2.5), ('half', dict(a=1)), 'a number'),
        ({bool}, (True, 0, 1), (3, 'yes'), 'True or False'),
        ({list}, ((1, 2), [1]), ('1, 2', 3), 'a list'),
        ({str, dict}, ('a', dict(a=1)), (5, [1]), 'a text or a dict'),
    ],
)  # fmt: skip
def test_values_that_fit(kinds, taken, refused, words):
    kinds = frozenset(kinds)
    assert all(fits(value, kinds) for value in taken) and not any(fits(value, kinds) for value in refused)
    assert described(kinds) == words and fits(refused[0], frozenset())  # nothing is known of the argument
