"""Hundreds of mutations of a config, a command line and arguments: each ends in one sentence, or has an effect."""

from __future__ import annotations

import copy
import inspect
import os
import random

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmmilan
from helpers import ROOT
from mmmilan import cli
from mmmilan.building import change_config, check_config
from mmmilan.errors import InputError
from mmmilan.failures import build_errors
from mutations import ODD_ARGUMENTS, spoil_config, spoil_line

CONFIG = ROOT / 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
MANY = pytest.param(1, 700, marks=pytest.mark.slow)


def answer(run, *args, **kwargs) -> str | None:
    """The one line with which something is refused, or None; any other exception fails the test."""
    try:
        run(*args, **kwargs)
    except InputError as error:
        assert str(error).strip() and '\n' not in str(error)
        return str(error)
    return None


@pytest.fixture
def small(milan_cfg) -> Config:
    """The recipe in the sizes of the recorded run."""
    cfg = Config.fromfile(CONFIG)
    cfg.model = copy.deepcopy(milan_cfg)
    return cfg


def build(cfg: Config) -> None:
    """Build what a run builds first, with the checks and the sentences of ``mmmilan train``."""
    check_config(cfg)
    with DefaultScope.overwrite_default_scope('mmpretrain'), build_errors():
        MODELS.build(cfg.model)


@pytest.mark.parametrize(('seed', 'number'), [(0, 25), MANY])
def test_mutations_of_a_config(small, seed, number):
    """A key that was renamed is refused or named in the log; a value of another type is refused or built."""
    rng, refused = random.Random(seed), 0
    for _ in range(number):
        cfg, key, kind = spoil_config(small, rng)
        message = answer(build, cfg)
        refused += message is not None
        if kind == 'rename' and message is not None:
            said = (
                key.rpartition('.')[2],
                'lacks',
                'has no',
                key.split('.')[-2:][0],
            )  # the key, or the part that lacks it
            assert any(word in message for word in said), (key, message)
    assert refused > number // 6


@pytest.mark.parametrize(('seed', 'number'), [(2, 60), MANY])
def test_misspelt_options(small, seed, number):
    """Every misspelt option is refused, with the right name where it is one letter away."""
    rng, near = random.Random(seed), 0
    for _ in range(number):
        _, key, _ = spoil_config(small, rng, kinds=('rename',))
        message = answer(change_config, copy.deepcopy(small), {key: 3})
        assert message is not None, key
        near += 'the nearest name is' in message
    assert near > 0.8 * number


@pytest.mark.parametrize(('seed', 'number'), [(4, 80), MANY])
def test_mutations_of_a_command_line(seed, number, tmp_path, monkeypatch):
    """Nothing is written, as no line names images or a checkpoint that exist."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    for _ in range(number):
        words = spoil_line(rng)
        try:
            message = answer(cli.run, words)
        except SystemExit as stop:
            message = str(stop.code)
        assert message is not None or {'--help', '--version', '-h'} & set(words) or len(words) < 2, words
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    'name', ['embed', 'search', 'zero_shot', 'report', 'export_onnx', 'convert', 'heat_maps', 'get_model']
)
def test_odd_arguments(name, tmp_path, monkeypatch):
    """Each argument in turn is something odd."""
    monkeypatch.chdir(tmp_path)
    function = getattr(mmmilan, name)
    parameters = inspect.signature(function).parameters.values()
    required = {
        each.name: 'nothing' for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    }
    for each in parameters:
        for value in ODD_ARGUMENTS:
            assert answer(function, **required | {each.name: value}) is not None, (each.name, value)
    assert os.listdir(tmp_path) == []
