"""Search, heat maps and zero-shot classification by a checkpoint, against the same steps by hand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import mmmilan
from helpers import rest_slow
from mmmilan.cli import main
from mmmilan.errors import InputError
from mmmilan.evaluation.feature_files import read_features, write_features
from mmmilan.models import MILAN
from mmmilan.registry import MODELS
from processes import exit_codes, start_ranks

TEXTS = ['a red boat', 'grass']


@pytest.fixture
def checkpoint(tiny_config, maskclip_file, tmp_path) -> Path:
    """A MILAN with random weights that learns from a MaskCLIP, with its config in it."""
    cfg = Config.fromfile(tiny_config({'model.head.teacher.pretrained': maskclip_file}))
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.nn.init.normal_(model.neck.decoder_pred.weight)
    path = tmp_path / 'milan.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=cfg.pretty_text)), path)
    return path


@torch.no_grad()
def by_hand(checkpoint: Path, files: list[Path], texts: list[str]) -> tuple[Tensor, Tensor, object]:
    """Embeddings [M, 1 + N, C] of images and [T, C] of texts, step by step."""
    model = mmmilan.get_model(checkpoint, encoder_only=False)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    images = []
    for file in files:
        image = cv2.imread(str(file))  # 72 x 80: the short edge to 64, then the middle
        image = np.asarray(Image.fromarray(image).resize((71, 64), Image.Resampling.BICUBIC))[:, 4:68]
        images.append((torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float() - mean) / std)
    latent = model.backbone(torch.stack(images), torch.arange(16).expand(len(files), -1))
    neck = model.neck
    joint = neck.decoder_pred(neck.ln1(neck.decoder_embed(latent) + neck.decoder_pos_embed))
    return normalize(joint, dim=-1), model.text_tower()(texts), model


@pytest.fixture
def photos(image_folder, tmp_path) -> Path:
    """Six images and a file that does not decode."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    for i in range(6):
        shutil.copy(next(image_folder.rglob(f'{i}.jpg')), folder / f'{i}.jpg')
    (folder / 'broken.jpg').write_bytes(b'\xff\xd8 no image')
    return folder


def test_a_teacher_that_has_moved(checkpoint, photos, maskclip_file, tmp_path, capsys):
    """What needs its weights is told where they are; features and embeddings of images need none."""
    expected = mmmilan.search(photos, checkpoint, TEXTS[0], top=99)
    moved = Path(maskclip_file).rename(tmp_path / 'moved.pth')
    with pytest.raises(InputError, match=str(maskclip_file)):
        mmmilan.search(photos, checkpoint, TEXTS[0])
    assert mmmilan.search(photos, checkpoint, TEXTS[0], top=99, teacher=str(moved)) == expected
    images = sorted(map(str, photos.glob('[0-9].jpg')))
    assert mmmilan.FeatureExtractor(checkpoint)(images).shape == (6, 48)
    mmmilan.embed(images, checkpoint, tmp_path / 'features.npz')
    with pytest.raises(InputError, match='nowhere.pt'):
        mmmilan.get_model(checkpoint, encoder_only=False, teacher='nowhere.pt')


@pytest.mark.slow
def test_processes_share_the_images(checkpoint, photos, image_folder, tmp_path):
    """Two processes find, draw and classify what one does, and each encodes a part of the images."""

    def run(out: Path, ranks: bool = True) -> None:
        if ranks:
            os.environ['TORCHELASTIC_RUN_ID'] = 'a'  # as torchrun does
        encode, seen = MILAN.embed_joint, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MILAN, 'embed_joint', lambda self, images: seen.extend(images) or encode(self, images))
            found = mmmilan.search(photos, checkpoint, TEXTS[0], top=99)
            mmmilan.heat_maps([photos / '0.jpg', photos / '1.jpg'], checkpoint, out / 'maps', texts=TEXTS)
            accuracy = mmmilan.zero_shot(image_folder, checkpoint)
        (out / f'rank{os.environ["RANK"] if ranks else ""}').write_text(json.dumps([found, accuracy, len(seen)]))

    run(tmp_path / 'one', False)
    assert exit_codes(start_ranks(run, tmp_path / 'two')) == [0, 0]
    expected = json.loads((tmp_path / 'one/rank').read_text())
    for rank in range(2):
        found, accuracy, seen = json.loads((tmp_path / f'two/rank{rank}').read_text())
        assert dict(found) == pytest.approx(dict(expected[0]), abs=2e-4) and len(found) == 6
        assert accuracy == expected[1] and expected[2] == 6 + 2 + 24 and seen <= 4 + 1 + 12
    one, two = (sorted(path.name for path in (tmp_path / name / 'maps').iterdir()) for name in ('one', 'two'))
    assert one == two and len(two) == 5
    maps = [np.load(tmp_path / name / 'maps/heat_maps.npz') for name in ('one', 'two')]
    assert np.array_equal(maps[0]['paths'], maps[1]['paths'])
    assert np.allclose(maps[0]['cosine'], maps[1]['cosine'], atol=1e-5)


def test_search_in_a_folder(checkpoint, photos, log):
    files = sorted(photos.glob('[0-9].jpg'))
    images, texts, _ = by_hand(checkpoint, files, TEXTS[:1])
    cosine = images[:, 0] @ texts[0]
    found = mmmilan.search(photos, checkpoint, TEXTS[0], top=3, batch_size=2)
    assert len(found) == 3 and 'broken.jpg' in log.text
    for place, index in zip(found, cosine.argsort(descending=True).tolist(), strict=False):
        assert place.cosine == pytest.approx(float(cosine[index]), abs=1e-4)
    assert [place.cosine for place in found] == sorted((place.cosine for place in found), reverse=True)
    everything = {place.path: place.cosine for place in mmmilan.search(photos, checkpoint, TEXTS[0], top=99)}
    assert sorted(everything) == [str(file) for file in files]
    for file, expected in zip(files, cosine.tolist(), strict=True):
        assert everything[str(file)] == pytest.approx(expected, abs=1e-4)
    assert np.std(list(everything.values())) > 0.02  # there is something to tell apart


def write_embedded(path: Path, **changes: np.ndarray) -> Path:
    """A file as ``mmmilan.embed`` writes it: three images, the second of them unreadable."""
    rng = np.random.default_rng(0)
    columns = dict(
        paths=np.array(['a.jpg', 'b.jpg', 'c.jpg']),
        ok=np.array([True, False, True]),
        embedding=rng.normal(size=(3, 24)).astype(np.float32),
        class_token=rng.normal(size=(3, 48)).astype(np.float32),
        patch_tokens=rng.normal(size=(3, 16, 48)).astype(np.float16),
    )
    columns = {name: value for name, value in (columns | changes).items() if value is not None}
    np.savez(path, **columns)
    return path


@torch.no_grad()
@pytest.mark.parametrize('as_list', rest_slow([False, True], True))
@pytest.mark.parametrize('ending', rest_slow(['npz', 'parquet'], 'parquet'))
def test_search_in_a_file_of_features(checkpoint, tmp_path, ending, as_list):
    path = write_embedded(tmp_path / 'features.npz')
    model = mmmilan.get_model(checkpoint, encoder_only=False)
    embedding = normalize(torch.from_numpy(np.load(path)['embedding']), dim=1)
    expected = (embedding @ model.text_tower()(TEXTS[:1])[0]).tolist()
    if ending == 'parquet':
        features = dict(np.load(path))
        write_features(tmp_path / 'features.parquet', len(features['ok']), iter([features]))
        path = tmp_path / 'features.parquet'
        tokens = read_features(path, ['class_token', 'patch_tokens'])[1]
        assert [each.shape for each in tokens] == [(2, 48), (2, 16, 48)]
    found = dict(mmmilan.search([path] if as_list else path, checkpoint, TEXTS[0]))
    assert found == {'a.jpg': pytest.approx(expected[0], abs=1e-4), 'c.jpg': pytest.approx(expected[2], abs=1e-4)}


@pytest.mark.parametrize('ending', rest_slow(['npz', 'parquet'], 'npz'))
def test_features_of_another_checkpoint(checkpoint, photos, tmp_path, ending):
    """They have the same width, and are told apart by what the file says of the encoder; a copy is the same."""
    path = mmmilan.embed(photos, checkpoint, tmp_path / f'features.{ending}', patches=True)
    content = torch.load(checkpoint)
    torch.save(dict(state_dict=content['state_dict'], meta=content['meta'], optimizer={}), tmp_path / 'copy.pth')
    found = mmmilan.search(path, tmp_path / 'copy.pth', TEXTS[0], top=9)
    assert len(found) == 6 and [each.path for each in found] == [
        each.path for each in mmmilan.search(photos, checkpoint, TEXTS[0], top=9)
    ]
    content['state_dict']['backbone.layers.0.attn.qkv.weight'][0, 0] += 1e-3
    torch.save(content, tmp_path / 'other.pth')
    with pytest.raises(InputError, match=r'has features of another model than .*other.pth; give the checkpoint'):
        mmmilan.search(path, tmp_path / 'other.pth', TEXTS[0])
    with pytest.raises(InputError, match='has features of another model'):
        mmmilan.heat_maps(path, tmp_path / 'other.pth', tmp_path / 'maps', texts=TEXTS)


def test_no_row_of_nan(checkpoint, tmp_path):
    embedding = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    embedding[2, 3] = np.nan
    path = write_embedded(tmp_path / 'nan.npz', embedding=embedding)
    assert [each.path for each in mmmilan.search(path, checkpoint, TEXTS[0])] == ['a.jpg']
    embedding[0] = np.inf
    with pytest.raises(InputError, match='has no image that could be read'):
        mmmilan.search(write_embedded(tmp_path / 'none.npz', embedding=embedding), checkpoint, TEXTS[0])


@torch.no_grad()
def test_heat_maps(checkpoint, photos, tmp_path):
    (photos / 'broken.jpg').unlink()
    (photos / '5.jpg').rename(photos / f'5{"x" * 250}.jpg')
    files = sorted(photos.glob('*.jpg'))
    images, texts, model = by_hand(checkpoint, files, TEXTS)
    path = mmmilan.heat_maps(photos, checkpoint, tmp_path / 'maps', texts=TEXTS, batch_size=4)
    with np.load(path) as file:
        assert file['paths'].tolist() == [str(each) for each in files] and file['texts'].tolist() == TEXTS
        cosine = torch.from_numpy(file['cosine'])
    assert cosine.shape == (6, 2, 4, 4)
    assert (cosine.flatten(2) - (images[:, 1:] @ texts.T).transpose(1, 2)).abs().max() < 1e-4
    drawn = sorted(path.parent.glob('*.png'))
    assert [each.stem for each in drawn[:5]] == [f'000{i}-{i}' for i in range(5)]
    assert drawn[5].stem.startswith(f'0005-5{"x" * 200}') and len(drawn[5].stem) < 250
    assert len(list(path.parent.glob('*.pdf'))) == 6 and cv2.imread(str(drawn[0])).std() > 10

    features = write_embedded(tmp_path / 'features.npz')
    path = mmmilan.heat_maps(features, checkpoint, tmp_path / 'of-file', texts='grass')
    with np.load(features) as file:
        latent = np.concatenate([file['class_token'][:, None], file['patch_tokens'].astype(np.float32)], axis=1)
    expected = model.project_joint(torch.from_numpy(latent))[[0, 2], 1:] @ texts[1]
    assert np.allclose(np.load(path)['cosine'].reshape(2, 16), expected, atol=1e-5)
    assert not list(path.parent.glob('*.png'))


@torch.no_grad()
def test_zero_shot(checkpoint, image_folder, tiny_config, maskclip_file, run_tool, capsys):
    """The function, the command and ``ZeroShotLoop`` agree with embeddings averaged over templates by hand."""
    files = sorted(image_folder.rglob('*.jpg'))
    names, templates = ['fish', 'a bird', 'cat'], ['a {}', 'a photo of a {}.']
    images, texts, _ = by_hand(checkpoint, files, [t.format(name) for name in names for t in templates])
    classifier = normalize(texts.unflatten(0, (3, 2)).mean(1), dim=1)
    cosines = images[:, 0] @ classifier.T
    labels = torch.tensor([int(file.relative_to(image_folder).parts[0][-1]) for file in files])
    expected = 100 * float((cosines.argmax(1) == labels).float().mean())
    options = dict(class_names=names, templates=templates)
    accuracy = mmmilan.zero_shot(image_folder, checkpoint, **options)
    assert accuracy == pytest.approx(expected, abs=0.01)

    main(['zero-shot', str(image_folder), str(checkpoint), '--class-names', *names, '--templates', *templates])
    assert capsys.readouterr().out.splitlines()[-1] == f'{accuracy:.1f} %'

    changes = {
        'model.head.teacher.pretrained': maskclip_file,
        'test_dataloader.dataset.with_label': True,
        'test_dataloader.num_workers': 0,
        'test_evaluator': dict(_delete_=True, type='mmpretrain.Accuracy'),
        'test_cfg': dict(_delete_=True, type='mmmilan.ZeroShotLoop', **options),
    }
    run_tool('test.py', tiny_config(changes), checkpoint)
    assert f'accuracy/top1: {accuracy:.4f}' in capsys.readouterr().out


def test_zero_shot_by_folders(checkpoint, image_folder, tmp_path, monkeypatch, log):
    """Codes of ImageNet-1k have its names; of other codes the log warns."""
    seen = []

    def embed_classes(tower, names: list[str], prompts: list) -> Tensor:
        seen.append(list(names))
        return torch.eye(3, 24)

    monkeypatch.setattr('mmmilan.evaluation.zero_shot.embed_classes', embed_classes)
    cases = (('n01440764', 'n01443537', 'n01484850'), ('tench', 'gold fish', 'n01484850'), ('0', '1', 'b2'))
    for number, folders in enumerate(cases):
        for source, folder in zip(sorted(image_folder.iterdir()), folders, strict=True):
            shutil.copytree(source, tmp_path / str(number) / folder)
        mmmilan.zero_shot(tmp_path / str(number), checkpoint)
    assert seen == [['tench', 'goldfish', 'great white shark'], ['gold fish', 'n01484850', 'tench'], ['0', '1', 'b2']]
    warnings = [each.getMessage() for each in log.records if 'Texts name' in each.getMessage()]
    assert warnings == [
        'Texts name 1 class as the folder, n01484850; give class_names in words.',
        'Texts name 2 classes as the folder, 0, 1; give class_names in words.',
    ]


def test_commands(checkpoint, photos, capsys, tmp_path):
    main(['search', str(photos), str(checkpoint), 'a red boat', '--top', '2'])
    rows = [line.split('\t') for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [Path(path).parent for path, _ in rows] == [photos, photos] and float(rows[0][1]) >= float(rows[1][1])
    images = str(photos / '0.jpg'), str(photos / '1.jpg')
    main(['heat-maps', *images, str(checkpoint), str(tmp_path / 'maps'), '--texts', 'grass'])
    assert capsys.readouterr().out.strip().endswith('heat_maps.npz')


def test_what_cannot_be_searched(checkpoint, tiny_config, photos, tmp_path):
    def error(function, *args, **kwargs) -> str:
        with pytest.raises(InputError) as caught:
            function(*args, **kwargs)
        return str(caught.value)

    (tmp_path / 'empty').mkdir()
    assert 'holds no image' in error(mmmilan.search, tmp_path / 'empty', checkpoint, 'a')
    assert 'does not exist' in error(mmmilan.search, tmp_path / 'nowhere', checkpoint, 'a')
    assert error(mmmilan.search, [photos / 'broken.jpg'], checkpoint, 'a').endswith('; give images.')
    assert 'text has an empty text; say something in it.' in error(mmmilan.search, photos, checkpoint, '')
    other = write_embedded(tmp_path / 'other.npz', embedding=np.ones((3, 7), np.float32))
    assert 'has embeddings of 7 dimensions but' in error(mmmilan.search, other, checkpoint, 'a')
    bare = write_embedded(tmp_path / 'bare.npz', embedding=None, patch_tokens=None)
    assert 'has no embedding (it has paths, ok, class_token); write it' in error(mmmilan.search, bare, checkpoint, 'a')
    assert 'has no patch_tokens' in error(mmmilan.heat_maps, bare, checkpoint, tmp_path / 'maps', texts='a')
    assert 'has no folders of classes; give a folder with' in error(mmmilan.zero_shot, photos, checkpoint)

    model = mmmilan.get_model(tiny_config(), encoder_only=False)  # its teacher is an image tower alone
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=model._config.pretty_text)), tmp_path / 'mute.pth')
    assert 'clip.pt has no text tower; give' in error(mmmilan.search, photos, tmp_path / 'mute.pth', 'a')
    encoder = mmmilan.get_model(tiny_config())
    torch.save(dict(state_dict=encoder.state_dict(), meta=dict(cfg=encoder._config.pretty_text)), tmp_path / 'vit.pth')
    message = error(mmmilan.search, photos, tmp_path / 'vit.pth', 'a')
    assert 'is a ImageClassifier; texts need a checkpoint of MILAN or MaskCLIP' in message


def test_one_image_stops_nothing_and_one_listed_twice_is_found_twice(checkpoint, photos, tmp_path, log):
    good = sorted(photos.glob('*.jpg'))[:2]
    shutil.copy(good[0], photos / 'good.jpg')
    Image.fromarray(np.ones((40, 40), np.float32)).save(photos / 'depth.tif')
    Image.fromarray(np.ones((40, 40, 4), np.uint8), 'CMYK').save(photos / 'print.tif')
    (photos / 'cut.png').write_bytes(b'no image')
    Image.new('L', (9000, 1)).save(photos / 'strip.png')
    bad = ['depth.tif', 'print.tif', 'cut.png', 'strip.png']
    files = [good[0], *(photos / name for name in bad), good[1], good[0]]
    found = mmmilan.search(files, checkpoint, 'a red boat')
    assert sorted(each.path for each in found) == sorted(map(str, [good[0], good[0], good[1]]))
    assert all(f'Left out: {photos / name} ' in log.text for name in bad)
    assert '4 of 7 images were left out' in log.text
    with np.load(mmmilan.heat_maps(files, checkpoint, tmp_path / 'maps', texts=['a boat'])) as file:
        assert file['paths'].tolist() == list(map(str, [good[0], good[1], good[0]]))
