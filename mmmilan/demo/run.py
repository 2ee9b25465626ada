"""The demo from captions to a page of pictures."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import find_latest_checkpoint, set_random_seed
from rich.table import Table
from torch import nn

from mmmilan.checkpoints.io import save_checkpoint_file
from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.checkpoints.zoo import zoo_root
from mmmilan.datasets.sources import list_images
from mmmilan.demo.language import add_heat_maps, zero_shot
from mmmilan.demo.page import LINKS, add_curves, add_pictures, add_scores, add_transfer
from mmmilan.demo.probes import PROBES, TeacherEncoder, probe, probing_datasets
from mmmilan.demo.scenes import write_scenes
from mmmilan.demo.training import console, train
from mmmilan.demo.transfer import Transfer, test_set, transfer, transfer_pictures
from mmmilan.errors import InputError
from mmmilan.files import write_text
from mmmilan.models import MILAN
from mmmilan.models.text_tower import TextTower
from mmmilan.visualization.page import Page

METHODS = {'MILAN': 'milan_vit-tiny-p8_scenes.py', 'MAE': 'mae_vit-tiny-p8_scenes.py'}


def work_dir(args: argparse.Namespace, stage: str) -> Path:
    return args.out / f'{stage}-seed{args.seed}'


def read_config(name: str, args: argparse.Namespace, stage: str) -> Config:
    """A config of the demo, with the output folder, the seed and the length that the user asked for."""
    cfg = Config.fromfile(zoo_root() / 'configs' / 'demo' / name)
    cfg.work_dir = str(work_dir(args, stage))
    cfg.randomness = dict(seed=args.seed)
    scaled = max(2, round(cfg.train_cfg.max_epochs * args.epochs_scale))
    cfg.train_cfg.max_epochs = scaled
    cfg.param_scheduler[1].update(T_max=scaled - 1, end=scaled)
    return cfg


def given_teacher(name: str) -> dict:
    """The teacher's config for what the user gave as --teacher."""
    if Path(name).exists():
        return dict(type='mmmilan.OpenCLIPTeacher', pretrained=name)
    model, separator, tag = name.partition(':')
    if not separator:
        raise InputError(f'--teacher {name} is unknown; give a file, or MODEL:TAG of open_clip.')
    return dict(type='mmmilan.OpenCLIPTeacher', model=model, pretrained=tag)


def train_maskclip(args: argparse.Namespace) -> tuple[str, float]:
    """Train the small MaskCLIP on captions; its checkpoint and its zero-shot accuracy in percent."""
    cfg = read_config('maskclip_vit-tiny-p8_scenes.py', args, 'maskclip')
    scenes = args.out / 'scenes'
    cfg.train_dataloader.dataset.update(data_root=str(scenes / 'train'), captions=str(scenes / 'captions_train.csv'))
    cfg.test_dataloader.dataset.data_root = str(scenes / 'val')
    runner, _ = train(cfg, 'MaskCLIP on captions')
    return find_latest_checkpoint(cfg.work_dir), runner.test()['accuracy/top1']


def make_teacher(args: argparse.Namespace) -> tuple[dict, dict[str, dict[str, float]]]:
    """The teacher's config; and the scores of the one that is trained here, if it is, by its name."""
    if not args.data:
        write_scenes(args.out / 'scenes', args.num_images, args.num_images // 3)
    if args.data or args.teacher:
        return given_teacher(args.teacher or 'ViT-B-16-quickgelu:openai'), {}
    checkpoint, accuracy = train_maskclip(args)
    console.print(f'MaskCLIP tells {accuracy:.1f} % of the test images by the names of the classes alone (zero-shot).')
    return given_teacher(checkpoint), {'MaskCLIP': {'zero-shot': accuracy}}


def pretraining_config(method: str, teacher_cfg: dict, args: argparse.Namespace) -> Config:
    """The config of a method with the demo's or the user's images and teacher."""
    cfg = read_config(METHODS[method], args, method.lower())
    cfg.train_dataloader.dataset.data_root = str(args.data or args.out / 'scenes' / 'train')
    cfg.test_dataloader.dataset.data_root = str(args.data or args.out / 'scenes' / 'val')
    if method == 'MILAN':
        cfg.model.head.teacher = teacher_cfg
    if args.data or args.teacher:
        fit_to_teacher(cfg, teacher_cfg)
    return cfg


def fit_to_teacher(cfg: Config, teacher_cfg: dict) -> None:
    """Give the demo's student the image size, the patch size and the target of a real teacher."""
    teacher = MODELS.build(teacher_cfg)
    size, patch = teacher.input_size[0], teacher.patch_size
    cfg.model.backbone.update(img_size=size, patch_size=patch)
    cfg.model.neck.num_patches = teacher.num_patches
    if cfg.model.head.type == 'mmmilan.CLIPTarget':
        cfg.model.neck.predict_feature_dim = teacher.feature_dim
    else:
        cfg.model.neck.predict_feature_dim = 3 * patch**2
        cfg.model.head.patch_size = patch
    cfg.train_dataloader.dataset.pipeline[1].scale = size
    cfg.test_dataloader.dataset.pipeline[1].scale = (size, size)


def score_rows(scores: dict[str, dict[str, float]]) -> list[list[str]]:
    return [[name, *(f'{score[probe]:.1f}' for probe in PROBES)] for name, score in scores.items()]


def text_tower(milan: MILAN) -> TextTower | None:
    """The text tower of MILAN's teacher; None, with the reason on the screen, where there is none."""
    try:
        return milan.text_tower().to(get_device())
    except InputError as error:
        console.print(f'Without zero-shot accuracy and heat maps: {error}')
        return None


def shown(score: float | None) -> str:
    return '–' if score is None else f'{score:.1f}'


def transfer_rows(result: Transfer) -> list[list[str]]:
    return [[task, *(f'{score:.1f}' for score in scores.values())] for task, scores in result.scores.items()]


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def run_transfer(args: argparse.Namespace, random: nn.Module) -> Transfer:
    """Fine-tune for each task from random weights and from the MILAN checkpoint."""
    path = args.out / f'random-seed{args.seed}.pth'
    save_checkpoint_file(random.state_dict(), path)
    starts = {'random': path, 'MILAN': Path(find_latest_checkpoint(work_dir(args, 'milan')))}
    return transfer(starts, args.out / 'scenes', lambda name, stage: read_config(name, args, stage), train)


def pretrain(args: argparse.Namespace, cfgs: dict[str, Config]) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The encoder of each method and a random one, ready for evaluation, and the seconds that pretraining took."""
    encoders, seconds = {}, {}
    for method, cfg in cfgs.items():
        runner, seconds[method] = train(cfg, f'{method} pretraining')
        encoders[method] = runner.model
    set_random_seed(args.seed)
    encoders['random'] = MODELS.build(cfgs['MILAN'].model)
    encoders['random'].init_weights()
    for model in encoders.values():
        model.to(get_device()).eval()
    return encoders, seconds


def run_demo(args: argparse.Namespace) -> None:
    """The demo, as ``tools/demo.py`` describes it; ``args`` are its options."""
    start = time.time()
    use_safe_loading()
    init_default_scope('mmpretrain')
    if args.data:
        list_images(args.data)  # before anything is trained or downloaded
    teacher_cfg, results = make_teacher(args)
    cfgs = {method: pretraining_config(method, teacher_cfg, args) for method in METHODS}
    encoders, seconds = pretrain(args, cfgs)
    curves = {name: work_dir(args, name.lower()) for name in (*results, *METHODS)}

    page = Page(
        'MILAN at work',
        'A ViT sees a quarter of the patches of an image, picked by the attention of a CLIP, and learns to predict '
        "the CLIP's features of all of them. No label was used before the table.",
        LINKS,
    )
    datasets = probing_datasets(cfgs['MILAN'], args)
    if datasets:
        judged = encoders | {'teacher': TeacherEncoder(encoders['MILAN'])}
        scores = {name: probe(name, model, datasets) for name, model in judged.items()}
        rows = score_rows(scores)
        print_table('Top-1 accuracy of the frozen class token, %', ['encoder', *PROBES], rows)
        tower = text_tower(encoders['MILAN'])
        known = zero_shot(encoders['MILAN'], tower, datasets[-1]) if tower else {}
        if known:
            console.print(
                f'MILAN tells {known["MILAN"]:.1f} % by the names of the classes, its teacher '
                f'{known["teacher"]:.1f} % (zero-shot).'
            )
            scores['MILAN']['zero-shot'] = known['MILAN']
        times = {name: f'{seconds[name]:.0f} s' if name in seconds else '–' for name in scores}
        values = [[*(score[probe] for probe in PROBES), known.get(name), None] for name, score in scores.items()]
        rows = [[*row, shown(known.get(row[0])), times[row[0]]] for row in rows]
        add_scores(page, ['encoder', *PROBES, 'zero-shot', 'pretraining'], rows, values)
        results |= scores
        if tower:
            add_heat_maps(page, encoders['MILAN'], tower, datasets[-1])
    pictured = {**cfgs['MILAN'].test_dataloader.dataset, 'with_label': bool(datasets)}
    add_pictures(page, encoders, DATASETS.build(pictured))
    add_curves(page, curves)
    if args.full:
        transferred = run_transfer(args, encoders['random'])
        rows = transfer_rows(transferred)
        classes = test_set(transferred.runners['segmentation']).metainfo['classes']
        print_table('After fine-tuning, %', ['task', 'random', 'MILAN'], rows)
        add_transfer(page, ['task', 'random', 'MILAN'], rows, *transfer_pictures(transferred), classes)
        results['transfer'] = transferred.scores

    path = args.out / 'index.html'
    page.paragraph(f'bash tools/demo.sh {" ".join(sys.argv[1:])}', 'code')
    page.write(path, f'Written by tools/demo.py with seed {args.seed} on {get_device()}, PyTorch {torch.__version__}.')
    write_text(args.out / f'results-seed{args.seed}.json', json.dumps(results, indent=2))
    console.print(f'The page: {path.resolve()}  ({(time.time() - start) / 60:.1f} minutes in all)')
