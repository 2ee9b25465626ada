"""Each ViT of timm and open_clip, with two blocks, gives features and importance or is refused with a reason.

All run on PyTorch's meta device, and the smallest model of each row of the table with random weights. The result is
the table of ``configs/milan/teachers/README.md``. If it differs, the test writes the right text to a file and names it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import open_clip
import pytest
import timm
import torch
from timm.models._registry import _model_to_module as MODULE_OF
from torch import Tensor

from helpers import ROOT
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from mmmilan.teachers import Teacher
from mmmilan.teachers.clip_source import new_visual
from mmmilan.teachers.timm import patch_size

README = ROOT / 'configs/milan/teachers/README.md'
START, END = '<!-- table: written by tests/teachers/test_library.py -->\n', '<!-- end of table -->\n'
# timm's modules with transformers; all others are convolutional
TRANSFORMERS = (
    'beit', 'cait', 'coat', 'convit', 'crossvit', 'davit', 'deepseek_vit', 'deit', 'efficientformer', 'eva', 'fastvit',
    'gcvit', 'gemma4_vit', 'hiera', 'levit', 'maxxvit', 'mobilevit', 'mvitv2', 'naflexvit', 'nest', 'pit', 'pvt_v2',
    'qwen3_vit', 'swin_transformer', 'swin_transformer_v2', 'tiny_vit', 'tnt', 'twins', 'vision_transformer',
    'vision_transformer_hybrid', 'vision_transformer_relpos', 'vision_transformer_sam', 'vitamin', 'volo', 'xcit',
)  # fmt: skip
FAST = ('test_vit', 'test_vit_relpos', 'vit_small_plus_patch16_dinov3', 'pit_b_224', 'convit_tiny', 'resnet10t')


@pytest.fixture
def cheap_weights(shallow) -> Iterator[None]:
    """Plain normal weights, or none on the meta device: the libraries' own initialisation takes minutes in all."""

    def fill(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        return tensor if tensor.is_meta else tensor.data.normal_(std=0.02)

    names = [
        f'{module}.trunc_normal_'
        for module in ('timm.models.vision_transformer', 'timm.models.eva', 'timm.models.beit')
    ]
    names.append('timm.layers.weight_init._trunc_normal_')
    names += [f'torch.nn.init.{name}_' for name in ('trunc_normal', 'normal', 'kaiming_uniform', 'kaiming_normal')]
    names += [f'torch.nn.init.{name}_' for name in ('uniform', 'xavier_uniform', 'xavier_normal')]
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch(name, fill))
        yield


@torch.no_grad()
def run(cfg: dict, device: str) -> tuple[Teacher, Tensor, Tensor]:
    """A teacher of 6 x 6 patches, and the features and importance of an image."""
    with torch.device(device):
        size = 6 * smallest_unit(cfg)
        teacher = MODELS.build(cfg | dict(input_size=size)).eval()
        features, importance = teacher(torch.randn(1, 3, size, size))
    assert features.shape == (1, 37, teacher.feature_dim) and importance.shape == (1, 36)
    return teacher, features, importance


def outcome(cfg: dict) -> tuple[bool, str, int]:
    """Whether a model can teach, how its importance is computed or why it cannot, and its number of parameters."""
    try:
        teacher, _, _ = run(cfg, 'meta')
    except InputError as error:
        reason = str(error).replace(cfg['model'], 'it').replace('The image tower of it', 'it').rstrip('.')
        return False, reason, 0
    return True, teacher.tower.importance_is, sum(parameter.numel() for parameter in teacher.parameters())


def check_numbers(cfg: dict) -> None:
    """With random weights, features are finite, importance is not negative and sums to at most 1."""
    _, features, importance = run(cfg, 'cpu')
    assert features.isfinite().all() and importance.min() >= 0 and 0 < importance.sum() < 1.001


def smallest_unit(cfg: dict) -> int:
    """Patch size of a model; 32 for a model without patches."""
    with torch.device('meta'):
        if 'Timm' in cfg['type']:
            model = timm.create_model(cfg['model'], num_classes=0)
        else:
            model = new_visual(open_clip.get_model_config(cfg['model']))
            if isinstance(model, open_clip.transformer.VisionTransformer):
                return model.patch_size[0]
            model = getattr(model, 'trunk', model)
    strides = {info['reduction'] for info in getattr(model, 'feature_info', [])}
    return patch_size(model) if len(strides) == 1 else 32


def timm_cfg(model: str) -> dict:
    return dict(type='mmmilan.TimmTeacher', model=model, pretrained=None)


def open_clip_cfg(model: str) -> dict:
    return dict(type='mmmilan.OpenCLIPTeacher', model=model)


def survey() -> dict[tuple[str, bool, str], list[str]]:
    """Models by library and family, whether they can teach, and importance or reason."""
    found = defaultdict(list)
    refused: dict[str, tuple[bool, str, int]] = {}  # timm's modules none of whose models can teach
    smallest: dict[tuple[str, str], tuple[int, dict]] = {}  # parameters and config
    for library, family, cfg in candidates():
        teaches, what, size = refused.get(family) or outcome(cfg)
        if library == 'timm' and ('hierarchical' in what or 'no attention' in what):
            refused[family] = teaches, what, size
        found[(f'{library}, {family}', teaches, what)].append(cfg['model'])
        if teaches and size < smallest.get((family, what), (size + 1,))[0]:
            smallest[family, what] = size, cfg
    for _, cfg in smallest.values():
        check_numbers(cfg)
    return found


def candidates() -> Iterator[tuple[str, str, dict]]:
    """Library, family and config of each model that may be a ViT, with random weights."""
    for module in TRANSFORMERS:
        for model in timm.list_models():
            if MODULE_OF[model] == module:
                yield 'timm', f'`{module}`', timm_cfg(model)
    for model in open_clip.list_models():
        if not model.startswith('milan-test'):  # added by another test of this session
            yield 'open_clip', tower_of(model), open_clip_cfg(model)


def tower_of(model: str) -> str:
    vision = open_clip.get_model_config(model)['vision_cfg']
    if 'timm_model_name' in vision:
        return f'`{MODULE_OF[vision["timm_model_name"]]}` of timm'
    return 'ResNet' if isinstance(vision['layers'], list) else 'own ViT'


def table(found: dict[tuple[str, bool, str], list[str]]) -> str:
    """The README's table, and the names of models below it."""
    rows = sorted(
        found.items(), key=lambda item: (not item[0][1], item[0][0].startswith('open'), item[0][0], item[0][2])
    )
    lines = ['| library, family | models | teaches | importance, or why not |', '|---|---|---|---|']
    for (family, teaches, what), models in rows:
        lines.append(f'| {family} | {len(models)} | {"yes" if teaches else "no"} | {what} |')
    for (family, teaches, what), models in rows:
        if teaches:
            names = ', '.join(f'`{model}`' for model in models)
            lines += ['', f'<details><summary>{family}, {what}</summary>', '', names, '', '</details>']
    return '\n'.join(lines) + '\n'


@pytest.mark.slow
def test_every_vit(cheap_weights, tmp_path):
    text = README.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    expected = before + START + table(survey()) + END + after
    if text != expected:
        right = Path(tmp_path, 'README.md')
        right.write_text(expected)
        pytest.fail(f'{README} is out of date; copy {right} over it')


@pytest.mark.parametrize('model', FAST)
def test_some_of_timm(model, cheap_weights):
    """A model of some rows has the result of the README's table."""
    teaches, what, _ = outcome(timm_cfg(model))
    if teaches:
        check_numbers(timm_cfg(model))
    if MODULE_OF[model] in TRANSFORMERS:
        row = rf'| timm, `{MODULE_OF[model]}` |'
        rows = [line for line in README.read_text().splitlines() if line.startswith(row)]
        assert any(line.endswith(f'| {"yes" if teaches else "no"} | {what} |') for line in rows)
    else:
        assert not teaches and what.startswith('it is convolutional or hierarchical')


@pytest.mark.parametrize('model', ['ViT-S-32', 'RN50', 'PE-Core-T-16-384'])
def test_some_of_open_clip(model, cheap_weights):
    teaches, what, _ = outcome(open_clip_cfg(model))
    if teaches:
        check_numbers(open_clip_cfg(model))
    assert f'| {"yes" if teaches else "no"} | {what} |' in README.read_text()
    assert teaches == (model != 'RN50')
