"""With the default sampler any data set gives the same augmentations in every run, and others in every epoch."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.multiprocessing
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset, pseudo_collate
from mmengine.runner import Runner
from PIL import Image
from torch.utils.data import ConcatDataset as TorchConcat
from torch.utils.data import Dataset, Subset, TensorDataset

from mmmilan.datasets import Draw, ImageFolder
from mmmilan.datasets.image_folder import num_corrupt
from mmmilan.datasets.reproducible import ReproducibleSampler, WholeSteps
from mmmilan.engine.loops import Epochs


class Numbers:
    """A transform that draws from all three generators."""

    def __call__(self, results: dict) -> list[float]:
        return [results['sample_idx'], random.random(), np.random.rand(), torch.rand(1).item()]


class Foreign(Dataset):
    """A data set of another library: looks its index up in a list."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[float]:
        return Numbers()(dict(sample_idx=[0, 1, 2, 3, 4, 5][index]))


class FirstAndOther(Dataset):
    """Mixes each sample with a random other one, as ``MultiImageMixDataset`` does."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[float]:
        return self.dataset[index] + self.dataset[np.random.randint(len(self))]


class Described(BaseDataset):
    """MMEngine's own data set."""

    def load_data_list(self) -> list[dict]:
        return [dict(name=str(i)) for i in range(6)]


@pytest.fixture
def folder(tmp_path) -> ImageFolder:
    for i in range(6):
        path = tmp_path / 'images' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(path)
    return ImageFolder(str(tmp_path / 'images'), with_label=True, pipeline=[Numbers()])


WRAPPED = {
    'ours': lambda ours: ours,
    'concatenated': lambda ours: ConcatDataset([ours, copy.deepcopy(ours)]),
    'repeated': lambda ours: RepeatDataset(ours, 2),
    'balanced': lambda ours: ClassBalancedDataset(ours, 0.9),
    'repeated and concatenated': lambda ours: TorchConcat([RepeatDataset(ours, 2), Described(pipeline=[Numbers()])]),
    'subset': lambda ours: Subset(ours, [4, 2, 0]),
    'mixed': FirstAndOther,
    'foreign': lambda ours: Foreign(),
    'mixed and foreign': lambda ours: FirstAndOther(TorchConcat([Foreign(), ours])),
}


def epoch_of(dataset: Dataset, epoch: int, workers: int = 0) -> list:
    """All samples of an epoch, through MMEngine's loader."""
    loader = Runner.build_dataloader(
        dict(
            dataset=dataset,
            batch_size=2,
            num_workers=workers,
            sampler=dict(type='mmmilan.ReproducibleSampler', shuffle=False),
            collate_fn=dict(type=pseudo_collate),
        ),
        seed=3,
    )
    loader.sampler.set_epoch(epoch)
    return [sample for batch in loader for sample in zip(*batch, strict=True)]


@pytest.mark.parametrize('name', WRAPPED)
def test_every_data_set_is_reproducible(folder, name):
    dataset = WRAPPED[name](folder)
    first, generators = epoch_of(dataset, 1), (random.getstate(), np.random.get_state()[1].copy())
    assert len(first) == len(dataset)
    assert epoch_of(dataset, 1) == first and epoch_of(dataset, 2) != first
    assert len({sample[1:] for sample in first}) == len(first)  # each its own, repeated ones as well
    assert random.getstate() == generators[0] and (np.random.get_state()[1] == generators[1]).all()


@pytest.mark.parametrize('name', ['ours', 'repeated and concatenated', 'mixed and foreign'])
def test_the_number_of_workers_changes_nothing(folder, name):
    dataset = WRAPPED[name](folder)
    assert epoch_of(dataset, 1, workers=2) == epoch_of(dataset, 1)


def test_a_list_is_seeded_as_by_mmengine(log):
    assert epoch_of([(1,), (2,), (3,)], 0) == [(1,), (2,), (3,)]
    assert log.text.count('Augmentations of list are seeded as by MMEngine') == 1


def test_a_draw_is_an_index():
    draw = pickle.loads(pickle.dumps(copy.deepcopy(Draw(7, 5, 0))))
    assert (draw.seed, draw.crop, draw.index, draw) == (7, 5, 0, 0)
    assert 'abc'[draw] == 'a' and draw - 1 == -1


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_copies_count_on_their_own(folder, duplicate):
    epoch_of(folder, 0)
    folder._num_corrupt.increase()
    other = duplicate(folder)
    other._num_corrupt.increase()
    assert (folder.num_corrupt, other.num_corrupt) == (1, 2)
    assert num_corrupt(TorchConcat([RepeatDataset(folder, 3), other])) == 3
    assert epoch_of(other, 1) == epoch_of(folder, 1)


@pytest.mark.parametrize('method', ['fork', pytest.param('spawn', marks=pytest.mark.slow)])
def test_workers_share_the_count(folder, method):
    worker = torch.multiprocessing.get_context(method).Process(target=folder._num_corrupt.increase)
    worker.start()
    worker.join()
    assert worker.exitcode == 0 and folder.num_corrupt == 1


@pytest.mark.parametrize('images, steps', [(7, 0), (8, 1), (15, 1), (19, 2)])
def test_an_epoch_of_accumulated_batches_has_whole_steps(images, steps):
    """Also where data workers go on to the next epoch, and where a run is resumed after a step."""
    data = torch.arange(images)
    sampler = ReproducibleSampler(TensorDataset(data), shuffle=True, seed=0)
    batches = WholeSteps(sampler, batch_size=2, batches=4)
    assert len(batches) == len(list(batches)) == 4 * steps and all(len(batch) == 2 for batch in batches)
    every = list(Epochs(batches, 0, 3, done=4 if steps else 0))
    assert len(every) == 12 * steps - (4 if steps else 0)
    assert len({index for batch in every[-4 * steps :] for index in batch}) == 8 * steps
