"""The one loop over images: order, what is left out, workers, labels, and shares of several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mmmilan.datasets import ImageFolder
from mmmilan.errors import InputError
from mmmilan.evaluation import features
from mmmilan.evaluation.features import extract, join, output_as

PIPELINE = [dict(type='mmmilan.LoadImage'), dict(type='mmpretrain.PackInputs')]


class Halved(nn.Module):
    """A data preprocessor."""

    def forward(self, data: dict, training: bool) -> dict:
        return dict(inputs=data['inputs'] / 2)


def encode(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(value=images[:, 0, 0, 0], mean=images.mean(dim=(2, 3)).bfloat16())


@pytest.fixture
def dataset(tmp_path) -> ImageFolder:
    """Nine images of two classes, each of one grey value; numbers 2 and 7 do not decode."""
    for i in range(9):
        path = tmp_path / f'class{i // 5}/{i}.png'
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((4, 4, 3), 10 * i, np.uint8))
    (tmp_path / 'class0/2.png').write_bytes(b'no image')
    (tmp_path / 'class1/7.png').write_bytes(b'')
    return ImageFolder(str(tmp_path), with_label=True, pipeline=PIPELINE)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_order_and_what_is_left_out(dataset, num_workers, log, capfd):
    batches = list(extract(dataset, Halved(), encode, 'Values', batch_size=4, num_workers=num_workers))
    assert [len(batch['position']) for batch in batches] == [3, 3, 1]
    rows = join(batches)
    used = [0, 1, 3, 4, 5, 6, 8]
    assert rows['position'].tolist() == used and rows['value'].tolist() == [5 * i for i in used]
    assert rows['label'].tolist() == [i // 5 for i in used]
    assert rows['mean'].shape == (7, 3) and rows['mean'].dtype == rows['value'].dtype == np.float32
    for name in ('class0/2.png', 'class1/7.png'):
        assert log.text.count(f'{name} does not decode') == 1
    assert '2 of 9 images were left out' in log.text
    printed = capfd.readouterr()
    assert 'Values' in printed.err and not printed.out  # the bar is not among the results


def test_some_images_in_an_order_of_their_own(dataset):
    rows = join(extract(dataset, Halved(), encode, indices=[8, 0, 2, 0], batch_size=3))
    assert rows['position'].tolist() == [0, 1, 3] and rows['value'].tolist() == [40, 0, 0]


def test_what_cannot_be_used(dataset):
    with pytest.raises(InputError, match=r'class0/2\.png does not decode'):
        list(extract(dataset, Halved(), encode, skip=False))
    with pytest.raises(InputError, match=r'Of 2 images none can be used \(.*2\.png does not decode .*\); give'):
        list(extract(dataset, Halved(), encode, indices=[2, 7]))


def test_in_a_daemonic_process(dataset, monkeypatch):
    """No other process reads images there, unless one is asked for."""
    monkeypatch.setitem(multiprocessing.current_process()._config, 'daemon', True)
    for options in ({}, dict(num_workers=0)):
        assert len(join(extract(dataset, Halved(), encode, batch_size=2, **options))['position']) == 7
    for option, name in ((dict(), 'num_workers'), (dict(option='loader.num_workers'), 'loader.num_workers')):
        with pytest.raises(InputError, match=f'^{name} is above 0, but this process is daemonic'):
            list(extract(dataset, Halved(), encode, num_workers=1, **option))


class Fatal(ImageFolder):
    """Its fourth image ends the process that reads it."""

    def prepare_data(self, index: int) -> dict:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare_data(index)


def test_a_process_that_dies(dataset, monkeypatch):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, '__defaults__', (0.1,))  # s between two looks
    with pytest.raises(InputError, match=r'^DataLoader worker .*; if memory or /dev/shm ran out, lower num_workers\.$'):
        dataset.__class__ = Fatal
        list(extract(dataset, Halved(), encode, batch_size=2, num_workers=1, option='num_workers'))


@pytest.mark.parametrize('count', [1, 8, 9])
def test_processes_share_the_images(dataset, monkeypatch, log, count):
    """Two processes in turns: each reads its own share, and both get the rows that one process gets."""
    expected = join(extract(dataset, Halved(), encode, indices=range(count), batch_size=2))
    sent: dict[int, list] = {}
    for rank in (0, 1):  # what each process sends
        sent[rank] = []
        monkeypatch.setattr(features, 'get_dist_info', lambda rank=rank: (rank, 2))
        monkeypatch.setattr(features, 'all_gather_object', lambda part, rank=rank: sent[rank].append(part) or [])
        list(extract(dataset, Halved(), encode, indices=range(count), batch_size=2))
    assert len(sent[0]) == len(sent[1])
    parts = map(list, zip(sent[0], sent[1], strict=True))
    monkeypatch.setattr(features, 'all_gather_object', lambda part: next(parts))
    log.clear()
    rows = join(extract(dataset, Halved(), encode, indices=range(count), batch_size=2))
    assert rows.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(rows[name], values), name
    assert log.text.count('does not decode') == sum(i < count for i in (2, 7))


def test_threads_want_different_tokens_of_one_encoder():
    class Encoder(nn.Module):
        out_type = 'cls_token'

        def forward(self, images: torch.Tensor) -> list:
            time.sleep(0.001)  # others run
            return [self.out_type]

    def features(out_type: str) -> list[str]:
        return [output_as(out_type, encoder, None) for _ in range(20)]

    encoder, types = Encoder(), ['raw', 'avg_featmap', 'raw', 'featmap']
    with ThreadPoolExecutor(len(types)) as executor:
        for out_type, found in zip(types, executor.map(features, types), strict=True):
            assert set(found) == {out_type}
    assert encoder.out_type == 'cls_token'
