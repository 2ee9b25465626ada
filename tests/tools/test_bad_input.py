"""Whatever a user gets wrong is answered with one sentence, and nothing is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from mmpretrain.structures import DataSample

from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from processes import exit_code


@pytest.fixture
def error_of(run_tool, capfd):
    """Run a tool that fails; returns its error message, which is one line."""

    def run(*args: object) -> str:
        with pytest.raises(SystemExit) as exit:
            run_tool(*args)
        assert 'Traceback' not in capfd.readouterr().err
        message = exit.value.code  # Python prints it to stderr and ends with status 1
        assert isinstance(message, str) and message.startswith('error: ') and '\n' not in message
        return message.removeprefix('error: ')

    return run


def logged(work_dir: Path) -> str:
    """The text of the newest log file."""
    return max(work_dir.glob('*/*.log')).read_text()


# -- data


def test_missing_data_folder(tiny_config, error_of):
    config = tiny_config({'train_dataloader.dataset.data_root': '/nowhere/images'})
    assert error_of('train.py', config) == (
        'The data folder /nowhere/images does not exist; set train_dataloader.dataset.data_root to your data.'
    )


def test_empty_data_folder(tiny_config, error_of, tmp_path):
    (tmp_path / 'empty/nested').mkdir(parents=True)
    (tmp_path / 'empty/nested/notes.txt').write_text('no image')
    config = tiny_config({'train_dataloader.dataset.data_root': str(tmp_path / 'empty')})
    assert f'{tmp_path}/empty/ holds no image; it should hold ' in error_of('train.py', config)


@pytest.fixture
def corrupt_folder(image_folder, tmp_path):
    """The 24 images with three more: a truncated JPEG, an empty file, a text."""
    folder = tmp_path / 'corrupt'
    shutil.copytree(image_folder, folder)
    content = (image_folder / 'class0/nested/0.jpg').read_bytes()
    (folder / 'class0/truncated.jpg').write_bytes(content[: len(content) // 2])
    (folder / 'class1/empty.jpg').write_bytes(b'')
    (folder / 'class2/text.jpg').write_text('not an image')
    return folder


def test_corrupt_images_are_skipped_named_and_counted(tiny_config, run_tool, corrupt_folder, tmp_path):
    changes = {'train_dataloader.dataset.data_root': str(corrupt_folder), 'train_dataloader.drop_last': False}
    changes['train_dataloader.num_workers'] = 0
    run_tool('train.py', tiny_config(changes))
    assert (tmp_path / 'work/epoch_2.pth').exists()
    log = logged(tmp_path / 'work')
    # MMEngine drops repeats
    assert log.count(f'Skipped: {corrupt_folder}/class0/truncated.jpg is a truncated JPEG') == 1
    assert log.count(f'Skipped: {corrupt_folder}/class1/empty.jpg does not decode as an image') == 1
    assert log.count(f'Skipped: {corrupt_folder}/class2/text.jpg does not decode as an image') == 1
    assert log.count('Skipped: ') == 3
    assert '6 images did not decode so far' in log


def test_corrupt_image_ends_the_run_on_request(tiny_config, run_tool, corrupt_folder, capfd):
    """The error of a data worker is one line, the last one of the process."""
    changes = {'dataset.data_root': str(corrupt_folder), 'dataset.on_corrupt': 'raise', 'drop_last': False}
    config = tiny_config({f'train_dataloader.{key}': value for key, value in changes.items()})
    assert exit_code(run_tool, 'train.py', config) == 1
    output = capfd.readouterr()
    assert 'Traceback' not in output.out + output.err
    assert output.err.count('error: ') == 1
    last = output.err.splitlines()[-1]
    assert last.startswith(f'error: {corrupt_folder}/class') and last.endswith('replace or remove it.')


def test_nothing_but_corrupt_images(tiny_config, error_of, tmp_path):
    folder = tmp_path / 'corrupt'
    folder.mkdir()
    for i in range(8):
        (folder / f'{i}.png').write_bytes(b'')
    config = tiny_config({'train_dataloader.dataset.data_root': str(folder), 'train_dataloader.num_workers': 0})
    assert error_of('train.py', config).startswith(
        f'100 images in a row under {folder}/ cannot be used; mend or remove them'
    )


def test_fewer_images_than_a_batch(tiny_config, error_of):
    assert error_of('train.py', tiny_config({'train_dataloader.batch_size': 25})) == (
        'The 24 training images do not fill one batch of 25 on each of 1 processes; lower train_dataloader.batch_size.'
    )


def test_images_of_another_size(tiny_config, error_of):
    config = tiny_config({'train_dataloader.dataset.pipeline.0.scale': 80, 'train_dataloader.num_workers': 0})
    message = error_of('train.py', config)
    assert message.startswith('The images are (80, 80) but img_size=(64, 64); make the crop ')


# -- teachers


def build_error(cfg: dict) -> str:
    """Build a model, or a part of one, that cannot be built; returns the error message, which is one line."""
    with pytest.raises(InputError) as error:
        MODELS.build(cfg)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_teacher_whose_grid_cannot_match(milan_cfg):
    """40 pixels are no multiple of its patches; at 96 its grid is not the student's."""
    milan_cfg['head']['teacher']['input_size'] = 40
    message = build_error(milan_cfg)
    assert message == "The teacher's input_size=40 is not a multiple of its patch size 16; choose 32 or 48."
    milan_cfg['head']['teacher']['input_size'] = 96
    message = build_error(milan_cfg)
    assert message == 'head.teacher sees 36 patches and the encoder 16; set head.teacher.input_size to 64.'


def test_teacher_file_that_does_not_exist(tiny_config, error_of, tmp_path):
    config = tiny_config({'model.head.teacher.pretrained': str(tmp_path / 'none.pt')})
    assert error_of('train.py', config) == (
        f"The teacher's file {tmp_path}/none.pt does not exist; correct --teacher (pretrained= in a config)."
    )


def test_teacher_file_of_another_kind(clip_file, tmp_path):
    def message_for(path: Path) -> str:
        return build_error(dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(path)))

    torch.save({'encoder.weight': torch.zeros(2), 'encoder.bias': torch.zeros(2)}, tmp_path / 'unknown.pt')
    message = message_for(tmp_path / 'unknown.pt')
    assert message.startswith(f"{tmp_path}/unknown.pt is not in OpenAI's CLIP layout")
    assert 'it begins with encoder.weight, encoder.bias' in message

    content = Path(clip_file).read_bytes()
    (tmp_path / 'truncated.pt').write_bytes(content[: len(content) // 2])
    message = message_for(tmp_path / 'truncated.pt')
    assert message.startswith(f'{tmp_path}/truncated.pt is incomplete or damaged')

    (tmp_path / 'empty.pt').write_bytes(b'')
    assert str(tmp_path / 'empty.pt') in message_for(tmp_path / 'empty.pt')

    weights = torch.load(clip_file)
    weights['visual.ln_post.weight'] = torch.zeros(5)
    del weights['visual.ln_post.bias']
    torch.save(weights, tmp_path / 'misfit.pt')
    message = message_for(tmp_path / 'misfit.pt')
    assert message.startswith(f'{tmp_path}/misfit.pt looks like a CLIP image tower but does not fit')
    assert 'ln_post' in message

    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / 'script.pt')
    assert f"{tmp_path}/script.pt is not in OpenAI's CLIP layout" in message_for(tmp_path / 'script.pt')
    script = (tmp_path / 'script.pt').read_bytes()
    (tmp_path / 'half_script.pt').write_bytes(script[: len(script) // 2])
    assert str(tmp_path / 'half_script.pt') in message_for(tmp_path / 'half_script.pt')


# -- the model


def test_widths_that_do_not_fit(milan_cfg):
    milan_cfg['neck']['embed_dim'] = 64
    assert build_error(milan_cfg) == ('neck.embed_dim is 64, but the other parts of the model need 48; set it to that.')
    milan_cfg['neck'].update(embed_dim=48, predict_feature_dim=512)
    assert build_error(milan_cfg) == (
        'neck.predict_feature_dim is 512, but the other parts of the model need 24; set it to that.'
    )


def test_numbers_of_patches_that_do_not_fit(milan_cfg):
    milan_cfg['neck']['num_patches'] = 25
    assert 'neck.num_patches is 25' in build_error(milan_cfg)


def test_semantic_aware_masking_without_teacher(milan_cfg):
    milan_cfg['neck']['predict_feature_dim'] = 768
    milan_cfg['head'] = dict(type='mmmilan.PixelTarget')
    assert build_error(milan_cfg).startswith('SemanticAwareMasking needs a frozen teacher')


def test_pixel_target_with_another_patch_size(milan_cfg):
    milan_cfg['masking'] = dict(type='mmmilan.RandomMasking')
    milan_cfg['neck']['predict_feature_dim'] = 192
    milan_cfg['head'] = dict(type='mmmilan.PixelTarget', patch_size=8)
    assert build_error(milan_cfg).startswith('head.patch_size is 8, but the other parts of the model need 16')


def test_encoder_of_grey_images(milan_cfg):
    """Images are decoded to three channels, and the teacher takes three."""
    milan_cfg['backbone']['in_channels'] = 1
    assert build_error(milan_cfg).startswith('backbone.in_channels is 1, but images have 3 channels')


def test_rectangular_image_size(milan_cfg):
    """The decoder and the teacher have to be set to it too."""
    milan_cfg['backbone']['img_size'] = (64, 32)
    assert build_error(milan_cfg).startswith('neck.num_patches is 16, but the other parts of the model need (4, 2)')
    milan_cfg['neck']['num_patches'] = (4, 2)
    assert build_error(milan_cfg) == (
        'head.teacher sees 16 patches and the encoder (4, 2); set head.teacher.input_size to (64, 32).'
    )


def samples(*masked: int, num_patches: int = 16) -> list[DataSample]:
    """Data samples whose masks hide that many patches each."""
    return [DataSample().set_mask(torch.arange(num_patches) < number) for number in masked]


def test_masks_with_unequal_visible_counts(milan_cfg):
    model = MODELS.build(milan_cfg)
    images = torch.randn(3, 3, 64, 64)
    with pytest.raises(InputError) as error:
        model.loss(images, samples(12, 12, 10))
    assert str(error.value) == (
        'The masks of one batch leave [4, 6] patches visible; every mask must leave the same number.'
    )
    with pytest.raises(InputError, match='data_sample.mask has 9 entries for 16 patches'):
        model.loss(images, samples(4, 4, 4, num_patches=9))
    for some in ([*samples(12, 12), DataSample()], [DataSample(), *samples(12, 12)]):
        with pytest.raises(InputError, match='1 of the 3 images of a batch have no data_sample.mask'):
            model.loss(images, some)


# -- the run


def test_config_that_does_not_exist(error_of):
    assert error_of('train.py', 'configs/milan/nothing.py') == (
        'The config configs/milan/nothing.py does not exist; correct its path.'
    )


def test_non_finite_loss(tiny_config, error_of, run_tool, tmp_path):
    """The run stops and names the step; the last good checkpoint can be resumed."""
    explosion = dict(type='MultiStepLR', by_epoch=False, milestones=[8], gamma=1e40)  # spoils the weights in step 9
    good = tmp_path / 'work/epoch_1.pth'
    changes = {'param_scheduler': [explosion], 'train_dataloader.num_workers': 0}
    assert error_of('train.py', tiny_config(changes)) == (
        f'The loss is nan at iteration 10 (epoch 2); resume from {good} '
        'with a lower learning rate or with optim_wrapper.clip_grad.'
    )
    assert [path.name for path in (tmp_path / 'work').glob('*.pth')] == ['epoch_1.pth']
    assert all(value.isfinite().all() for value in torch.load(good, weights_only=False)['state_dict'].values())
    run_tool('train.py', tiny_config(), '--resume')
    assert torch.load(tmp_path / 'work/epoch_2.pth', weights_only=False)['meta']['iter'] == 12
