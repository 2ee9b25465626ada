"""Whatever a user gets wrong is answered with one sentence, and nothing is lost."""

from __future__ import annotations

import shutil
import signal
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
    changes |= {'train_dataloader.num_workers': 0, 'test_dataloader.num_workers': 0}
    changes['test_dataloader.dataset.data_root'] = str(corrupt_folder)
    run_tool('train.py', config := tiny_config(changes))
    assert (tmp_path / 'work/epoch_2.pth').exists()
    log = logged(tmp_path / 'work')
    # MMEngine drops repeats
    assert log.count(f'Skipped: {corrupt_folder}/class0/truncated.jpg is a truncated JPEG') == 1
    assert log.count(f'Skipped: {corrupt_folder}/class1/empty.jpg does not decode as an image') == 1
    assert log.count(f'Skipped: {corrupt_folder}/class2/text.jpg does not decode as an image') == 1
    assert log.count('Skipped: ') == 3
    assert '6 times so far an image did not decode, and another took its place in training.' in log
    run_tool('test.py', config, tmp_path / 'work/epoch_2.pth')
    said = '3 times so far an image did not decode, and the scores of the test are without it.'
    assert said in logged(tmp_path / 'work')


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
    before = signal.getsignal(signal.SIGTERM)
    assert error_of('train.py', config).startswith(
        f'100 images in a row under {folder}/ cannot be used; mend or remove them'
    )
    assert signal.getsignal(signal.SIGTERM) is before  # a program that goes on has its own again


def test_fewer_images_than_a_batch(tiny_config, error_of):
    assert error_of('train.py', tiny_config({'train_dataloader.batch_size': 25})) == (
        '24 training images cannot fill one batch of 25 on each of 1 process; lower train_dataloader.batch_size.'
    )


def test_images_of_another_size(tiny_config, error_of):
    config = tiny_config({'train_dataloader.dataset.pipeline.0.scale': 80, 'train_dataloader.num_workers': 0})
    message = error_of('train.py', config)
    assert message.startswith('The images are (80, 80) but img_size=(64, 64); make the crop ')


# -- teachers


def test_teacher_file_that_does_not_exist(tiny_config, error_of, tmp_path):
    config = tiny_config({'model.head.teacher.pretrained': str(tmp_path / 'none.pt')})
    assert error_of('train.py', config) == (
        f"The teacher's file {tmp_path}/none.pt does not exist; correct --teacher (pretrained= in a config)."
    )


# -- the model


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
