"""A perfect classifier scores 100 %, however the classes of splits, files and checkpoints are ordered."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import load
from shutil import copytree
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmpretrain.structures import DataSample

from helpers import ROOT, read_metrics, read_scalars, save_untrained
from mmmilan.checkpoints.config import own_config
from mmmilan.datasets import ImageFolder
from mmmilan.datasets.labelled import read_labelled
from mmmilan.datasets.split_file import write_labelled
from mmmilan.engine import ClassCountHook
from mmmilan.engine.data_checks import leave_out_replaced
from mmmilan.errors import InputError
from mmmilan.evaluation import ZeroShotLoop
from mmmilan.registry import DATASETS, METRICS, MODELS
from processes import run_script_on_ranks

NAMES = ['ant', 'bee', 'cat', 'dog']


class Oracle(BaseModel):
    """Knows the class of an image by its folder, and numbers them as it was told."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names, self.num_classes = names, len(names)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'loss':
            told = [self.names.index(Path(sample.img_path).parent.name) for sample in data_samples]
            right = [int(sample.gt_label) == label for sample, label in zip(data_samples, told, strict=True)]
            return dict(loss=self.weight * (1 - np.mean(right)))  # 0 as long as labels are those of the names
        for sample in data_samples:
            score = torch.zeros(self.num_classes)
            score[self.names.index(Path(sample.img_path).parent.name)] = 1
            sample.set_pred_score(score)
        return data_samples


@pytest.fixture(autouse=True)
def oracle():
    MODELS.register_module(module=Oracle)
    yield
    MODELS.module_dict.pop('Oracle')


@pytest.fixture
def config(tmp_path):
    """Writes a config of the oracle for folders of images of the given classes in each split."""

    def write(train: list[str], val: list[str], changes: dict | None = None) -> Path:
        image = np.zeros((8, 8, 3), np.uint8)
        for split, names in dict(train=train, val=val).items():
            for name in names:
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                for number in range(2):
                    cv2.imwrite(str(tmp_path / split / name / f'{number}.png'), image)
        cfg = Config.fromfile(ROOT / 'configs/milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py')
        cfg.model = dict(type='mmmilan.Oracle', names=NAMES)
        steps = [dict(type='mmmilan.LoadImage'), dict(type='PackInputs')]
        for name, split in dict(train_dataloader='train', val_dataloader='val', test_dataloader='val').items():
            cfg[name].update(batch_size=4, num_workers=0, persistent_workers=False)
            cfg[name].dataset = dict(
                type='mmmilan.ImageFolder', data_root=str(tmp_path / split), with_label=True, pipeline=steps
            )
        cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.0))
        cfg.train_cfg = dict(by_epoch=True, max_epochs=1)
        cfg.auto_scale_lr.enable = False
        cfg.param_scheduler = []
        cfg.custom_hooks = []
        cfg.val_evaluator = cfg.test_evaluator = dict(type='mmpretrain.Accuracy', topk=(1,))
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
        cfg.default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
        cfg.work_dir = str(tmp_path / 'work')
        cfg.merge_from_dict(changes or {})
        path = tmp_path / f'{tmp_path.name}.py'
        cfg.dump(path)
        return path

    return write


def checkpoint(path: Path, names: list[str] | None) -> Path:
    meta = dict(dataset_meta=dict(classes=tuple(names))) if names else {}
    torch.save(dict(state_dict=dict(weight=torch.ones(())), meta=meta), path)
    return path


@pytest.mark.parametrize(
    'train, val, changes',
    [
        (NAMES, ['ant', 'cat', 'dog'], {}),
        (NAMES, ['dog'], {}),
        (NAMES, NAMES, {'val_dataloader.dataset.metainfo': dict(classes=NAMES[::-1])}),
        (NAMES, ['bee', 'dog'], {'val_dataloader.dataset.type': 'CustomDataset'}),
        (
            ['bee', 'dog', 'ant', 'cat'],
            ['bee', 'cat'],
            {'model.names': NAMES[::-1], 'train_dataloader.dataset.metainfo': dict(classes=NAMES[::-1])},
        ),
    ],
)
def test_training_and_validation(config, run_tool, tmp_path, train, val, changes):
    run_tool('train.py', config(train, val, changes))
    rows = read_scalars(tmp_path / 'work')
    assert [row['loss'] for row in rows if 'loss' in row] == [0, 0]
    assert [row['accuracy/top1'] for row in rows if 'accuracy/top1' in row] == [100]


@pytest.mark.parametrize(
    'train, val, changes, message',
    [
        (NAMES, [*NAMES, 'elk'], {}, r'val/? has 1 of its 5 classes, elk \(2 samples\), where .*train/? has ant, bee'),
        (NAMES, ['Ant', 'cat'], {}, r'is ant meant by Ant\?'),
        (NAMES[:3], NAMES[:3], {}, r'The training data has 3 classes, but model\.num_classes=4; make them equal'),
        (NAMES, NAMES, {'train_dataloader.dataset.metainfo': dict(classes=NAMES[:3])}, r'train/? has 1 of .* dog \(2'),
        (
            NAMES,
            NAMES,
            {'val_dataloader.dataset.metainfo': dict(classes='names.txt')},
            r'names.txt cannot be read \(No such',
        ),
    ],
)
def test_splits_that_differ(config, run_tool, train, val, changes, message):
    with pytest.raises(SystemExit, match=message):
        run_tool('train.py', config(train, val, changes))


def test_names_in_a_file(config, run_tool, tmp_path):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train/names.json').write_text(json.dumps(NAMES[::-1]))
    changes = {'model.names': NAMES[::-1], 'train_dataloader.dataset.metainfo': dict(classes='names.json')}
    run_tool('train.py', config(NAMES, NAMES, changes))
    assert read_scalars(tmp_path / 'work')[-1]['accuracy/top1'] == 100


class Seen(BaseMetric):
    """What a metric is given of each image."""

    def process(self, data_batch, data_samples):
        self.results += [sample['img_path'] for sample in data_samples]

    def compute_metrics(self, results):
        Seen.found = results
        return dict(count=len(results))


@pytest.mark.parametrize('task', ['val', 'test'])
def test_an_image_that_does_not_decode_is_in_no_score(config, run_tool, tmp_path, task):
    """Nor is the one that takes its place in the batch, in whatever wrapper it is."""
    METRICS.register_module(module=Seen)
    try:
        part = dict(type='mmmilan.ImageFolder', data_root=str(tmp_path / 'val'), with_label=True)
        part |= dict(pipeline=[dict(type='mmmilan.LoadImage'), dict(type='PackInputs')])
        path = config(NAMES, NAMES, {
            f'{task}_evaluator': [dict(type='mmmilan.Seen'), dict(type='mmpretrain.Accuracy', topk=(1,))],
            f'{task}_dataloader.dataset': dict(type='RepeatDataset', dataset=part, times=1, _delete_=True),
        })  # fmt: skip
        for name in ('ant/1', 'bee/0', 'bee/1'):
            (tmp_path / f'val/{name}.png').write_bytes(b'no image')
        results = tmp_path / 'found.pkl'
        if task == 'test':
            run_tool('test.py', path, checkpoint(tmp_path / 'best.pth', NAMES), '--out', results)
            assert len(load(results.open('rb'))) == 5
        else:
            run_tool('train.py', path)
    finally:
        METRICS.module_dict.pop('Seen')
    names = [Path(each).relative_to(tmp_path / 'val').as_posix() for each in Seen.found]
    assert names == ['ant/0.png', 'cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png']


def test_each_process_keeps_one_result_for_each_image():
    """By their number MMEngine leaves out the images that pad the share of a process."""
    metric = Seen()
    evaluator = Evaluator([metric])
    leave_out_replaced(evaluator)
    leave_out_replaced(evaluator)  # as before each validation
    samples = [DataSample(metainfo=dict(img_path=str(number))) for number in range(5)]
    samples[1].set_metainfo(dict(replaced=True))
    evaluator.process(samples[:3], {})
    evaluator.process(samples[3:], {})
    assert len(metric.results) == 5 and evaluator.evaluate(4) == dict(count=3) and Seen.found == ['0', '2', '3']


@pytest.mark.slow
def test_label_maps_of_images_that_do_not_decode(scenes, tmp_path, run_tool):
    """Are in no score: with several views, in two processes, for which each has one result for each image."""
    pytest.importorskip('mmseg')
    copytree(scenes, tmp_path / 'scenes')
    labelled = read_labelled(tmp_path / 'scenes', task='segmentation')
    write_labelled(labelled, tmp_path)
    weights = save_untrained('segmentation', tmp_path / 'scenes', tmp_path)
    cfg = own_config(weights, with_data=True)
    dataset = dict(type='mmmilan.LabelledImages', ann_file=str(tmp_path / 'split.json'), split='val', test_mode=True)
    cfg.test_dataloader.dataset = dataset | dict(
        metainfo=dict(classes=labelled.classes), pipeline=cfg.test_dataloader.dataset.pipeline
    )
    cfg.dump(tmp_path / 'config.py')
    split = json.loads((tmp_path / 'split.json').read_text())
    name = split['val'].pop(3)[0]
    (tmp_path / 'scenes' / name).write_bytes(b'no image')
    arguments = [tmp_path / 'config.py', weights, '--tta', '--work-dir']
    run_script_on_ranks('test.py', 2, *arguments, tmp_path / 'two')
    (tmp_path / 'split.json').write_text(json.dumps(split))
    run_tool('test.py', *arguments, tmp_path / 'rest')
    scores = [read_metrics(tmp_path / each) for each in ('two', 'rest')]
    assert scores[0]['aAcc'] == scores[1]['aAcc'] > 0 and scores[0]['mIoU'] == scores[1]['mIoU'] > 0


@pytest.mark.parametrize('val', [NAMES, ['cat', 'dog']])
def test_a_checkpoint_numbers_the_classes(config, run_tool, tmp_path, val):
    order = ['dog', 'ant', 'cat', 'bee']
    weights = checkpoint(tmp_path / 'best.pth', order)
    run_tool('test.py', config(NAMES, val, {'model.names': order}), weights)
    assert read_metrics(tmp_path / 'work')['accuracy/top1'] == 100


def test_a_checkpoint_of_other_classes(config, run_tool, tmp_path):
    weights = checkpoint(tmp_path / 'best.pth', ['ant', 'bee', 'cat', 'cow'])
    message = r'val/? has 1 of its 4 classes, dog \(2 samples\), where .*best.pth has ant, bee, cat, cow'
    with pytest.raises(SystemExit, match=message):
        run_tool('test.py', config(NAMES, NAMES), weights)
    with pytest.raises(SystemExit, match=r'The test data has 3 classes, but model\.num_classes=4; make them equal'):
        run_tool('test.py', config(NAMES, NAMES, {'test_dataloader.dataset.data_root': str(three(tmp_path))}),
                 checkpoint(tmp_path / 'bare.pth', None))  # fmt: skip


def three(tmp_path: Path) -> Path:
    for name in NAMES[:3]:
        (tmp_path / 'three' / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / 'three' / name / '0.png'), np.zeros((8, 8, 3), np.uint8))
    return tmp_path / 'three'


@pytest.mark.parametrize('extra', [{}, dict(classwise=True)])
@pytest.mark.parametrize(
    'file, classes',
    [
        (['cat', 'ant'], ('ant', 'cat')),
        (['dog', 'ant', 'cat'], ('ant', 'bee', 'cat', 'dog')),
        (['cat'], ('ant', 'cat')),
    ],
)
def test_average_precision_of_perfect_boxes(tmp_path, file, classes, extra):
    """COCO's metric asks the file for the ids of its categories, which come in the file's order."""
    pytest.importorskip('mmdet')
    from mmdet.evaluation import CocoMetric
    from mmengine.structures import InstanceData

    annotations = [
        dict(id=1 + place, image_id=1, category_id=7 + place, bbox=[10.0 * place, 0, 8, 8], area=64, iscrowd=0)
        for place in range(len(file))
    ]
    content = dict(
        info={},
        images=[dict(id=1, file_name='1.jpg', width=40, height=40)],
        categories=[dict(id=7 + place, name=name) for place, name in enumerate(file)],
        annotations=annotations,
    )
    path = tmp_path / 'val.json'
    path.write_text(json.dumps(content))
    options = dict(ann_file=str(path), data_prefix=dict(img=''), metainfo=dict(classes=classes), test_mode=True)
    dataset = DATASETS.build(dict(type='mmmilan.CocoDataset', **options))
    metric = CocoMetric(str(path), **extra)
    loop = SimpleNamespace(evaluator=SimpleNamespace(metrics=[metric]), dataloader=SimpleNamespace(dataset=dataset))
    ClassCountHook().before_evaluation(SimpleNamespace(model=torch.nn.Identity()), loop, 'test')
    metric.dataset_meta = dataset.metainfo
    instances = dataset.get_data_info(0)['instances']
    predicted = dict(
        bboxes=torch.tensor([each['bbox'] for each in instances]),
        labels=torch.tensor([each['bbox_label'] for each in instances]),
        scores=torch.ones(len(file)),
    )
    assert [classes[label] for label in predicted['labels']] == file
    metric.process({}, [dict(img_id=1, ori_shape=(40, 40), pred_instances=InstanceData(**predicted).to_dict())])
    assert metric.evaluate(1)['coco/bbox_mAP'] == 1


def test_average_precision_of_no_box(tmp_path, log):
    """It is 0, so that the best checkpoint and early stopping hear of it."""
    pytest.importorskip('mmdet')
    box = dict(id=1, image_id=1, category_id=1, bbox=[0.0, 0, 8, 8], area=64, iscrowd=0)
    image, category = dict(id=1, file_name='1.jpg', width=40, height=40), dict(id=1, name='cat')
    path = tmp_path / 'val.json'
    path.write_text(json.dumps(dict(info={}, images=[image], categories=[category], annotations=[box])))
    none = dict(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=int), scores=torch.zeros(0))
    for metric, extra in ((['bbox', 'segm'], {}), ('bbox', dict(metric_items=['mAP_s']))):
        metric = METRICS.build(dict(type='mmmilan.CocoMetric', ann_file=str(path), metric=metric, **extra))
        metric.dataset_meta = dict(classes=('cat',))
        found = none | dict(masks=torch.zeros(0, 40, 40, dtype=bool))
        metric.process({}, [dict(img_id=1, ori_shape=(40, 40), pred_instances=found)])
        scores = metric.evaluate(1)
        assert set(scores.values()) == {0.0} and len(scores) == (1 if extra else 12)
        assert 'coco/bbox_mAP_s' in scores and 'Nothing was detected in 1 image: AP 0.' in log.text


def test_scores_of_label_maps_that_do_not_exist():
    pytest.importorskip('mmseg')
    with pytest.raises(InputError, match='iou_metrics has mIOU; choose from mIoU, mDice and mFscore'):
        METRICS.build(dict(type='mmmilan.IoUMetric', iou_metrics=['mIOU']))


def test_names_of_texts(tmp_path):
    """Names for zero-shot classification belong to folders, which may be some of ImageNet's, in any order."""

    def names(folders: list[str], given) -> list[str]:
        for folder in folders:
            (tmp_path / folder).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / '0.png'), np.zeros((8, 8, 3), np.uint8))
        dataset = ImageFolder(str(tmp_path), with_label=True, pipeline=[])
        loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
        return list(ZeroShotLoop.read_class_names(loop, given))

    assert names(['n01440764', 'n02129165'], 'imagenet') == ['tench', 'lion']
    assert names([], None) == ['n01440764', 'n02129165']
    assert names([], {'n02129165': 'king', 'n01440764': 'fish'}) == ['fish', 'king']
    assert names([], ['a', 'b']) == ['a', 'b']
    with pytest.raises(InputError, match='class_names has n02129165, n01440764 at other places than the data set'):
        names([], ['n02129165', 'n01440764'])
    with pytest.raises(InputError, match=r'1 of the 3 classes of the data set have no name in .* \(zebra\)'):
        names(['zebra'], 'imagenet')


def test_the_best_of_more_classes_than_there_are(config, run_tool, tmp_path):
    """Said before the first epoch; mmpretrain says it in the first validation."""
    path = config(NAMES, NAMES, {'val_evaluator.topk': (1, 5)})
    with pytest.raises(SystemExit, match='val_evaluator counts the best 5 of 4 classes; set val_evaluator.topk to 1'):
        run_tool('train.py', path)
    assert not list(tmp_path.glob('work/*.pth'))


def test_a_step_that_fails_on_an_image_is_named(config, run_tool):
    """In the loader whose loop asked for the image, not in another one with the same step."""
    steps = [dict(type='mmmilan.LoadImage'), dict(type='mmpretrain.ResizeEdge', scale=0), dict(type='PackInputs')]
    path = config(NAMES, NAMES, {f'{name}_dataloader.dataset.pipeline': steps for name in ('train', 'val', 'test')})
    with pytest.raises(SystemExit, match=r'^error: train_dataloader.dataset.pipeline.1 \(ResizeEdge\) '):
        run_tool('train.py', path)


def test_a_mean_over_no_pixel(log):
    pytest.importorskip('mmseg')
    metric = METRICS.build(dict(type='mmmilan.IoUMetric'))
    metric.dataset_meta = dict(classes=('sky', 'sea'))

    def score(labels: list[int]) -> float:
        maps = [torch.tensor([values]) for values in (labels, [0] * len(labels))]
        truth, predicted = (dict(data=each) for each in maps)
        metric.process({}, [dict(gt_sem_seg=truth, pred_sem_seg=predicted)])
        return metric.evaluate(1)['mIoU']

    assert score([0, 1, 255]) == 25
    assert 'no pixel' not in log.text
    score([0, 255])
    assert 'The scores are of 1 of 2 classes (sky): no pixel of the label maps has one of the others (sea).' in log.text
    with pytest.raises(InputError, match='No pixel of the label maps has a class'):
        score([255, 255])
