"""The zoo: metafiles in OpenMMLab's form, and models by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mmengine.hub
import modelindex
import pytest
import torch
from mmengine.config import Config

import mmmilan
from helpers import FINE_TUNED, PRETRAINED, ROOT, real_data
from mmmilan.checkpoints import zoo
from mmmilan.engine.launch import read_config
from mmmilan.errors import InputError


def test_metafiles_are_in_openmmlabs_form():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    models = {model.name: model for model in index.models}
    assert set(models) == set(zoo.zoo_models())
    for model in models.values():
        assert (ROOT / model.config).is_file()
        assert model.config.endswith(f'/{model.name}.py')  # a name is one recipe
        assert model.full_model.paper['Title'].startswith(('MILAN', 'MaskCLIP', 'Learning Transferable', 'SLIP'))
        if model.weights:
            assert model.weights.startswith('https://download.openmmlab.com/mmselfsup/1.x/milan/')
            assert re.search(r'_20221129-[0-9a-f]{8}\.pth$', model.weights)
    assert {name for name, model in models.items() if model.weights} == {
        PRETRAINED,
        FINE_TUNED,
        'vit-base-p16_milan-pre_8xb2048-linear-coslr-100e_in1k',
    }


@pytest.mark.data
def test_zoo_has_the_checkpoints_of_the_model_zoo_page():
    page = real_data('../paper/mmselfsup_milan_readme.md')
    urls = set(re.findall(r'https://download\.openmmlab\.com/\S+?\.pth', page.read_text()))
    assert len(urls) == 3
    assert {model.weights for model in zoo.zoo_models().values() if model.weights} == urls


def test_every_recipe_of_the_folders_is_in_the_zoo():
    """All but the configs that only evaluate and those for a user's own images."""
    folders = {str(model.config.parent) for model in zoo.zoo_models().values()}
    stems = {path.stem for folder in folders for path in Path(folder).glob('*.py')}
    left_out = re.compile(r'.*(_custom|_knn_in1k|_retrieval_.*|_imagenet-[ar]|_imagenet-sketch)')
    assert {name for name in stems if not left_out.fullmatch(name)} == set(zoo.zoo_models())


def test_list_models():
    assert PRETRAINED in mmmilan.list_models('milan') and FINE_TUNED not in mmmilan.list_models('milan*')
    assert mmmilan.list_models('milan*large*400e_') == [
        'milan-clip-base_vit-large-p16_16xb256-amp-coslr-400e_in1k',
        'milan-random-masking_vit-large-p16_16xb256-amp-coslr-400e_in1k',
        'milan_vit-large-p16_16xb256-amp-coslr-400e_in1k',
    ]
    assert set(mmmilan.list_models()) == set(zoo.zoo_models())


def test_import_and_list_models_are_light():
    code = 'import sys, mmmilan; mmmilan.list_models(); print({"torch", "mmpretrain", "mmengine"} & set(sys.modules))'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines()[-1] == 'set()', run.stderr


OLD = 'upernet_vit-base-p16_milan-pre_160k_ade20k-512x512'
NEW = 'upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512'


def test_old_names_lead_to_todays_with_one_line(tmp_path, monkeypatch, log):
    """As a model, as a config file, as what a run starts from; a run made under the old name is still found."""
    zoo.current_name.cache_clear()
    assert zoo.find_model(OLD).config.stem == NEW
    assert Path(read_config(ROOT / f'configs/segmentation/{OLD}.py').filename).stem == NEW
    assert log.text.count(f'{OLD} is now called {NEW}; use that name.') == 1
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f'No weights of {NEW} have been published and work_dirs/{NEW} has none'):
        zoo.resolve_checkpoint(OLD)
    run = tmp_path / 'work_dirs' / OLD
    run.mkdir(parents=True)
    torch.save(dict(state_dict={}, meta=dict(iter=1)), run / 'epoch_1.pth')
    assert zoo.resolve_checkpoint(OLD).samefile(run / 'epoch_1.pth')
    for name in (f'no-such_{OLD}', NEW):  # neither is old
        assert zoo.current_name(name) == name


@pytest.mark.parametrize('base', [f'mmmilan::segmentation/{OLD}.py', f'{ROOT}/configs/segmentation/{OLD}.py'])
def test_a_base_by_its_old_name(base, tmp_path, log):
    zoo.current_name.cache_clear()
    (tmp_path / 'own.py').write_text(f'_base_ = {base!r}\nmodel = dict(decode_head=dict(num_classes=3))\n')
    (new := Config.fromfile(ROOT / f'configs/segmentation/{NEW}.py')).model.decode_head.num_classes = 3
    assert Config.fromfile(tmp_path / 'own.py').to_dict() == new.to_dict()
    assert log.text.count(f'{OLD} is now called {NEW}; use that name.') == 1


@pytest.mark.parametrize(
    'config',
    [
        NEW,
        f'{NEW}.py',
        OLD,
        f'configs/segmentation/{NEW}.py',
        f'configs/segmentation/{OLD}.py',
        'vit-base-p16_knn_in1k',
    ],
)
def test_configs_of_the_package_from_any_folder(config, tmp_path, monkeypatch):
    """By path or by name; a file of one's own comes first; the work dir has today's name."""
    monkeypatch.chdir(tmp_path)
    cfg = read_config(config)
    name = NEW if 'upernet' in config else config
    assert Path(cfg.filename).samefile(next((ROOT / 'configs').rglob(f'{name}.py')))
    assert cfg.work_dir == f'work_dirs/{name}'
    if config.endswith('.py'):
        own = tmp_path / config
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(f'_base_ = {cfg.filename!r}\nwork_dir = "mine"\n')
        assert read_config(config).work_dir == 'mine'


def test_a_config_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config in ('no-such', 'no-such.py', 'configs/no-such.py', f'elsewhere/{NEW}.py', f'{NEW}.pth'):
        with pytest.raises(InputError, match=f'The config {config} does not exist; correct its path'):
            read_config(config)


def test_mmengines_hub_knows_old_names():
    assert Path(mmengine.hub.get_config(f'mmmilan::segmentation/{OLD}.py').filename).stem == NEW
    with pytest.raises(FileNotFoundError, match='no-such'):
        mmengine.hub.get_config(f'mmmilan::segmentation/no-such_{OLD}.py')


def test_every_old_ending_is_of_a_model():
    for ending in zoo.OLD_ENDINGS.values():
        assert any(name.endswith(ending) for name in zoo.zoo_models())
