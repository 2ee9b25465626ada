"""No command writes over an input, over another's file, or where it was not told to; it says so before its work."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import mmmilan
from helpers import rest_slow
from mmmilan import cli
from mmmilan.errors import InputError
from mmmilan.evaluation.feature_files import read_features
from mmmilan.teachers.cache import TeacherCache

# Command lines in a folder with images, a config and a checkpoint; OUT is a file that ends so.
FILES = {
    'mmmilan report images milan.pth --out OUT': '.html',
    'mmmilan embed images --checkpoint milan.pth --out OUT': '.npz',
    'mmmilan export-onnx milan.pth OUT': '.onnx',
    'mmmilan convert milan.pth OUT --encoder-only': '.pth',
    'mmmilan convert milan.pth OUT --to timm': '.safetensors',
    'test.py config.py milan.pth --out OUT': '.pkl',
    'speed/benchmark.py step --json OUT': '.json',
    'study/study.py time --json OUT': '.json',
}
# OUT is a folder in which this file is written.
FOLDERS = {
    'mmmilan figures images milan.pth OUT --config config.py': 'figure3.png',
    'mmmilan heat-maps images milan.pth OUT --texts dog': '0000-0.png',
    'mmmilan predict images milan.pth OUT': 'predictions.csv',
    'publish_model.py config.py milan.pth OUT': None,
    'publish_model.py config.py milan.pth published --hub-dir OUT': 'config.json',
    'export_open_clip.py config.py milan.pth OUT': 'open_clip_config.json',
    'cache_targets.py config.py OUT --epochs 1': 'records.bin',
    'study/study.py report --out OUT --results results.jsonl': 'table.md',
    'demo/demo.py --data images --out OUT': 'index.html',
    'mmmilan pretrain images --out OUT': 'config.py',
    'train.py config.py --work-dir OUT': None,
    'pack_images.py images OUT': 'data.mdb',
}
LINES = [*FILES, *FOLDERS]


@pytest.fixture
def folder(tiny_config, pretrained_checkpoint, image_folder, tmp_path, monkeypatch):
    work = tmp_path / 'work'
    work.mkdir()
    shutil.copytree(image_folder, work / 'images')
    shutil.move(tiny_config(), work / 'config.py')
    shutil.move(pretrained_checkpoint, work / 'milan.pth')
    (work / 'results.jsonl').touch()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def refusal(run_tool, folder, capfd):
    """Run a command that must refuse its output and leave everything as it is; returns the message."""

    def run(line: str, out: str, *more: str) -> str:
        before = snapshot(folder)
        program, *arguments = [out if word == 'OUT' else word for word in line.split()]
        with pytest.raises(SystemExit) as exit:
            cli.main([*arguments, *more]) if program == 'mmmilan' else run_tool(program, *arguments, *more)
        message = exit.value.code
        assert isinstance(message, str) and message.startswith('error: ') and message.count('\n') == 0, message
        assert message.endswith('.') and ';' in message
        assert 'Traceback' not in capfd.readouterr().err
        assert snapshot(folder) == before
        return message

    return run


def snapshot(folder: Path) -> dict[str, tuple]:
    """What each file and folder is."""
    found = {}
    for path in sorted(folder.rglob('*')):
        state = os.lstat(path)
        found[str(path.relative_to(folder))] = (state.st_mode, state.st_size, path.is_file() and path.read_bytes())
    return found


@pytest.mark.parametrize(
    'line',
    rest_slow(
        FILES,
        'mmmilan report images milan.pth --out OUT',
        'mmmilan convert milan.pth OUT --encoder-only',
        'test.py config.py milan.pth --out OUT',
        'speed/benchmark.py step --json OUT',
    ),
)
def test_files(line, refusal, folder):
    ending = FILES[line]
    image = next((folder / 'images').rglob('*.jpg'))
    for out in (str(image), 'config.py', f'images/x{ending}.jpg'):
        assert 'does not end in' in refusal(line, out)
        assert 'does not end in' in refusal(line, out, '--overwrite')
    Path(f'link{ending}').symlink_to('milan.pth')
    os.link('milan.pth', f'hard{ending}')
    for out in (f'link{ending}', f'hard{ending}'):
        expected = 'exists; choose another name, or add --overwrite'
        if 'milan.pth' in line:
            expected = 'is read by the same command; choose another name'
            assert expected in refusal(line, out, '--overwrite')
        assert expected in refusal(line, out)
    Path(f'other{ending}').write_text('the file of another')
    assert 'exists; choose another name, or add --overwrite' in refusal(line, f'other{ending}')
    os.mkfifo(f'pipe{ending}')
    os.mkdir(f'folder{ending}')
    os.symlink('/dev/full', f'full{ending}')
    for out, message in (
        (f'pipe{ending}', 'is a device or a pipe'),
        (f'folder{ending}', 'is a folder'),
        (f'milan.pth/x{ending}', 'Not a directory'),
        (f'/proc/none/x{ending}', 'Nothing can be written in /proc/none'),
        (f'{"x" * 300}{ending}', 'File name too long|names no file'),
    ):
        assert re.search(message, refusal(line, out, '--overwrite'))


@pytest.mark.parametrize(
    'line',
    rest_slow(
        FOLDERS,
        'mmmilan figures images milan.pth OUT --config config.py',
        'publish_model.py config.py milan.pth published --hub-dir OUT',
        'mmmilan pretrain images --out OUT',
        'train.py config.py --work-dir OUT',
    ),
)
def test_folders(line, refusal, folder):
    for out, message in (
        ('milan.pth', 'Not a directory|exists'),
        ('milan.pth/deep/er', 'Not a directory'),
        ('/dev/null', 'Not a directory|exists'),
        ('/proc/none', 'Nothing can be written in /proc/none'),
        ('x' * 300, 'File name too long|names no file'),
    ):
        assert re.search(message, refusal(line, out))
    if FOLDERS[line]:
        os.mkdir('mine')
        Path('mine', FOLDERS[line]).write_text('the file of another')
        assert FOLDERS[line] in refusal(line, 'mine') or 'mine exists' in refusal(line, 'mine')
    if 'figures' in line or 'heat-maps' in line:
        for out in ('images', 'images/figures', './images/../images', str(folder / 'images')):
            assert 'the pictures would be among them' in refusal(line, out, '--overwrite')


@pytest.mark.parametrize('name', ['../x', 'a/b', '/tmp/x', '..', '.'])
def test_the_name_of_a_published_model(refusal, name):
    assert 'does not stay in the folder' in refusal('publish_model.py config.py milan.pth OUT', 'out', '--name', name)


def test_nothing_is_published_over_the_source(run_tool, folder):
    """Not even for a moment: the checkpoint may have the name of the model."""
    before = Path('milan.pth').read_bytes()
    run_tool('publish_model.py', 'config.py', 'milan.pth', '.', '--name', 'milan')
    [published] = folder.glob('milan-*.pth')
    assert Path('milan.pth').read_bytes() == before
    with pytest.raises(SystemExit, match=f'{published.name} exists'):
        run_tool('publish_model.py', 'config.py', 'milan.pth', '.', '--name', 'milan')
    run_tool('publish_model.py', 'config.py', 'milan.pth', '.', '--name', 'milan', '--overwrite')


def test_overwrite(folder):
    path = mmmilan.embed('images', 'milan.pth', 'f.npz', batch_size=24)
    with pytest.raises(InputError, match='f.npz exists'):
        mmmilan.embed('images', 'milan.pth', 'f.npz')
    Path('f.npz').write_bytes(b'')
    mmmilan.embed('images', 'milan.pth', 'f.npz', overwrite=True, batch_size=24)
    assert len(np.load(path)['paths']) == 24
    mmmilan.embed('images', 'milan.pth', Path('new/er/f.npz'), batch_size=24)  # folders are made


# -- configs


@pytest.mark.parametrize(
    'option', ['=3', 'a-b=3', 'class=3', 'model.class=3', "model.a'b=3", 'x.y=inf', 'train_cfg.max_epochs=nan', ' =3']
)
def test_a_config_that_could_not_be_read_again(option, run_tool, folder):
    before = snapshot(folder)
    with pytest.raises(
        SystemExit,
        match='is not KEY=VALUE|Nothing reads|takes (no|a whole number)|is no name of an option|is inf; give a finite',
    ):
        run_tool('train.py', 'config.py', '--cfg-options', option)
    assert snapshot(folder) == before


@pytest.mark.slow
def test_the_config_that_was_read_stays(run_tool, folder):
    """MMEngine would replace it by what the options make of it."""
    before = Path('config.py').read_bytes()
    run_tool('train.py', 'config.py', '--work-dir', '.', '--cfg-options', 'train_cfg.max_epochs=1')
    assert Path('config.py').read_bytes() == before
    [log] = folder.glob('*/config.py')
    assert 'max_epochs=1' in log.read_text().replace(' ', '')
    os.mkdir('other')
    Path('other/config.py').write_text('SECRET_KEY = 1')
    run_tool('train.py', 'config.py', '--work-dir', 'other', '--cfg-options', 'train_cfg.max_epochs=1')
    assert Path('other/config.py').read_text() == 'SECRET_KEY = 1'
    for epochs in ('1', '2'):
        run_tool('train.py', 'config.py', '--work-dir', 'new', '--cfg-options', f'train_cfg.max_epochs={epochs}')
    assert 'max_epochs=2' in Path('new/config.py').read_text().replace(' ', '')


# -- errors of the operating system


@pytest.mark.slow
@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS])
def test_the_system_refuses(number, run_tool, folder, monkeypatch):
    """Wherever it does: here where the visualizer of a run writes."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), 'scalars.json')

    monkeypatch.setattr('mmengine.visualization.LocalVisBackend.add_scalars', refuse)
    with pytest.raises(SystemExit) as exit:
        run_tool('train.py', 'config.py', '--cfg-options', 'default_hooks.logger.interval=1')
    message = exit.value.code
    assert message == (
        f'error: The system refused an access to a file: {os.strerror(number)} (scalars.json); check the path, its '
        'permissions and the free space.'
    )


# -- damaged side files


def test_damaged_features(folder, tmp_path):
    good = dict(paths=np.array(['a.jpg', 'b.jpg']), ok=np.array([True, True]), embedding=np.zeros((2, 24), np.float32))
    changes = [
        dict(paths=np.array([['a.jpg', 'b.jpg']])), dict(paths=np.array([1, 2])), dict(paths=np.array('a.jpg')),
        dict(paths=np.array(['a.jpg'])), dict(paths=np.array(['a', None], object)), dict(paths=np.array([b'a', b'b'])),
        dict(ok=np.array([1, 0])), dict(ok=np.array([True])), dict(ok=np.array(True)), dict(ok=np.zeros((2, 2), bool)),
        dict(embedding=np.zeros(2, np.float32)), dict(embedding=np.zeros((3, 24))), dict(embedding=np.array(['a'])),
        dict(embedding=np.zeros((2, 24), complex)), dict(embedding=np.array([None, {}])), dict(embedding=np.float32(1)),
    ]  # fmt: skip
    for change in changes:
        np.savez('features.npz', allow_pickle=True, **good | change)
        with pytest.raises(InputError, match='features.npz is .*|features.npz is damaged') as error:
            mmmilan.search('features.npz', 'milan.pth', 'dog')
        assert str(error.value).endswith(('write the file again.', 'write it with mmmilan embed.'))
    np.savez('features.npz', **good)
    content = Path('features.npz').read_bytes()
    np.save('array.npy', good['embedding'])
    np.savez('features.npz', **{name: column[:0] for name, column in good.items()})
    assert read_features('features.npz', ['embedding'])[0] == []
    array = Path('array.npy').read_bytes()
    for damaged in (b'', b'text', pickle.dumps(good), content[:100], content[:-30], b'PK\3\4' + content[50:], array):
        Path('features.npz').write_bytes(damaged)
        with pytest.raises(InputError, match='features.npz is damaged, or no file of features') as error:
            mmmilan.search('features.npz', 'milan.pth', 'dog')
        assert 'unsafe' not in str(error.value)  # NumPy's advice on pickles


def test_odd_manifests(run_tool, folder):
    run_tool('cache_targets.py', 'config.py', 'cache', '--epochs', '1')
    path = Path('cache/manifest.json')
    good = json.loads(path.read_text())
    odd = [None, [], 3, 'text', [1, 2], {}, {'version': 1}]
    numbers = ['version', 'images', 'num_patches', 'feature_dim']
    odd += [good | {key: value} for key in numbers for value in (None, -1, 'x')]
    odd += [{key: value for key, value in good.items() if key != left} for left in numbers]
    odd += [good | dict(feature_dim=2**30), good | dict(feature_dim=2**31, num_patches=2**31)]
    for manifest in [json.dumps(each) for each in odd] + ['', '{', '[' * 100000, '\0']:
        path.write_text(manifest)
        with pytest.raises(InputError, match='make (it|the cache) again|make a cache'):
            TeacherCache('cache')


@pytest.mark.parametrize(
    'meta',
    rest_slow(
        [None, [], 3, 'text', {'dataset_meta': 3}, {'CLASSES': 5}, {'cfg': 3}, {'epoch': []}],
        None,
        'text',
        {'CLASSES': 5},
        {'cfg': 3},
    ),
)
def test_odd_meta(meta, folder, log):
    import torch

    weights = torch.load('milan.pth', weights_only=False)['state_dict']
    torch.save(dict(state_dict=weights, meta=meta), 'odd.pth')
    mmmilan.embed('images/class0', 'odd.pth', 'f.npz')
    cli.main(['convert', 'odd.pth', 'again.pth'])
    again = torch.load('again.pth', weights_only=True)
    assert torch.equal(again['state_dict']['backbone.cls_token'], weights['backbone.cls_token'])


def test_a_file_that_writes_to_the_terminal(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(['convert', '\x1b[31m\x07red\n\r\u202e.pth', 'b.pth'])
    assert '\\x1b[31m\\x07red\\n\\r\\u202e.pth' in exit.value.code and exit.value.code.isprintable()
    assert str(InputError('Bäume の写真 🌳; ok.')) == 'Bäume の写真 🌳; ok.'


def test_texts_are_no_formulas():
    from mmmilan.visualization.page import draw_curve
    from mmmilan.visualization.pictures import draw_pictures, draw_tsne

    image = np.zeros((8, 8, 3), np.uint8)
    texts = ('$\\frac{1$', 'a$b$c', '5$', '$\\unknown$', '{}', '%s')
    for text in texts:
        assert 'svg' in draw_curve([0, 1], [0, 1], text)
    features, labels = np.random.default_rng(0).normal(size=(12, 4)), np.arange(12) % 6
    names = dict.fromkeys(texts[:2], features)
    for figure in (draw_pictures(dict.fromkeys(texts, [image]), 'inferno', '$'), draw_tsne(names, labels, texts)):
        figure.savefig(os.devnull, format='png')
