"""``split.json``: the images, labels and division of a labelled data set, as a run writes and reads them."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from mmmilan.datasets.classes import IGNORE, match_names
from mmmilan.datasets.image_folder import ImageFolder
from mmmilan.datasets.labelled import SPLITS, Labelled, image_paths, relative, select
from mmmilan.datasets.labelled_objects import Coco
from mmmilan.errors import InputError, count, listed
from mmmilan.files import first_line, write_text
from mmmilan.registry import DATASETS


def labelled_datasets(labelled: Labelled, folder: str | os.PathLike) -> dict[str, dict]:
    """Configs of data sets without pipelines, 'train' and 'val', that read what :func:`write_labelled` writes there."""
    folder = Path(os.path.abspath(folder))
    metainfo = dict(classes=labelled.classes)
    configs = {}
    for split in SPLITS:
        if labelled.task == 'detection':
            own = dict(type='mmmilan.CocoDataset', ann_file=str(objects_file(folder, split)), data_prefix=dict(img=''))
        else:
            own = dict(type='mmmilan.LabelledImages', ann_file=str(folder / 'split.json'), split=split)
        configs[split] = own | dict(metainfo=metainfo)
    configs['val']['test_mode'] = True
    return configs


def objects_file(folder: Path, split: str) -> Path:
    """Where the objects of a split are written."""
    return folder / 'annotations' / f'{split}.json'


def write_labelled(labelled: Labelled, folder: str | os.PathLike) -> None:
    """Write ``split.json`` into a folder, or take the division of the one that is there.

    Raises:
        InputError: ``split.json`` is of other data, or images of it are gone.
    """
    folder = Path(os.path.abspath(folder))
    path = folder / 'split.json'
    if path.exists():
        labelled = divided_as(labelled, read_split(path, 'remove it to divide the data again'), path)
    content = dict(data=labelled.source, task=labelled.task, classes=labelled.classes, seed=labelled.seed)
    content['table'] = labelled.table
    content |= {split: [entry_of(record, labelled.root) for record in records(labelled, split)] for split in SPLITS}
    if labelled.task == 'detection':
        for split in SPLITS:
            write_text(objects_file(folder, split), json.dumps(getattr(labelled, split)))
    write_text(path, json.dumps(content, indent=0) + '\n')


def records(labelled: Labelled, split: str) -> list[dict]:
    """The records of a split; those of objects are their images."""
    part = getattr(labelled, split)
    return [dict(img_path=path) for path in image_paths(part)] if isinstance(part, dict) else part


def entry_of(record: dict, root: str) -> list:
    """A record in ``split.json``: the path of the image from the folder, and its label or the path of its map."""
    entry = [relative(record['img_path'], root)]
    entry += [record['label']] if 'label' in record else []
    return entry + ([relative(record['map_path'], root)] if 'map_path' in record else [])


def divided_as(labelled: Labelled, content: dict[str, Any], path: Path) -> Labelled:
    """The data set with its images divided as a ``split.json`` says.

    Raises:
        InputError: that file is of another task, of other classes or of other images.
    """
    remedy = 'give another folder for the output, or remove that file to divide the data again'
    for key, value in (('task', labelled.task), ('classes', list(labelled.classes))):
        if content[key] != value:
            raise InputError(f'{path} was written for other data (its {key}: {content[key]}, now {value}); {remedy}.')
    paths = {
        relative(record['img_path'], labelled.root): record['img_path']
        for split in SPLITS
        for record in records(labelled, split)
    }
    names = {split: [entry[0] for entry in content[split]] for split in SPLITS}
    known = {name for own in names.values() for name in own}
    gone, new = known.difference(paths), set(paths).difference(known)
    if gone or new:
        raise InputError(
            f'{path} does not fit the images of {labelled.root}: {count(len(gone), "image")} of it are gone and '
            f'{len(new)} are new ({listed([*sorted(gone), *sorted(new)])}); {remedy}.'
        )
    if content['seed'] is None:
        return labelled
    every = join(labelled.train, labelled.val)
    train, val = (select(every, [paths[name] for name in names[split]]) for split in SPLITS)
    return labelled._replace(train=train, val=val, seed=content['seed'])


def join(train: list[dict] | Coco, val: list[dict] | Coco) -> list[dict] | Coco:
    """All images of two splits."""
    if not isinstance(train, dict):
        return train + val
    shift = 1 + max(image['id'] for image in train['images'])
    images = [image | dict(id=image['id'] + shift) for image in val['images']]
    annotations = [each | dict(image_id=each['image_id'] + shift) for each in val['annotations']]
    return train | dict(images=train['images'] + images, annotations=train['annotations'] + annotations)


@DATASETS.register_module()
class LabelledImages(ImageFolder):
    """The images of a ``split.json`` that :func:`write_labelled` wrote, with their labels or label maps.

    Args:
        ann_file: The file.
        split: 'train' or 'val'.
        data_root: The folder of the data, if it is no longer where the file says.
        kwargs: Other arguments of :class:`ImageFolder`, except ``with_label``.
    """

    def __init__(self, ann_file: str, split: str, data_root: str = '', **kwargs) -> None:
        self.split, self.moved_to = split, data_root
        super().__init__(data_root='', with_label=True, ann_file=ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        content = read_split(Path(self.ann_file))
        root = self.moved_to or content['data']
        own, table = content['classes'], content['table']
        classes = self._metainfo.setdefault('classes', tuple(own))
        label = range(len(own))
        if list(classes) != own:  # those of a model that was trained on other data
            count_of = (lambda: Counter(label for _, label in content[self.split])) if table is None else lambda: None
            label = match_names(own, classes, self.ann_file, 'the config', count_of)
        if content['task'] == 'classification':
            return [
                dict(img_path=file if '://' in file else os.path.join(root, file), gt_label=label[number])
                for file, number in content[self.split]
            ]
        table = [[value, number if number == IGNORE else label[number]] for value, number in table]
        common = dict(label_table=table, label_map=None, reduce_zero_label=False)
        return [
            dict(img_path=os.path.join(root, image), seg_map_path=os.path.join(root, own), seg_fields=[], **common)
            for image, own in content[self.split]
        ]


def read_split(path: Path, remedy: str = 'restore it, or fine-tune anew') -> dict[str, Any]:
    """What a ``split.json`` says.

    Raises:
        InputError: it is missing or cannot be read; ends with the remedy.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if lacking := {'data', 'task', 'classes', 'seed', 'table', *SPLITS}.difference(content):
            raise ValueError(f'it has no {listed(sorted(lacking))}')
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f'{path} cannot be read as a split of finetune ({first_line(error)}); {remedy}.') from error
    return content
