"""See MILAN at work: train a MaskCLIP on captions, then a MILAN encoder with it as teacher, and write a page about it.

Without options the demo draws its own captioned images and downloads nothing. With --data it takes your images, and a
real CLIP (--teacher) in place of the MaskCLIP. With --full it also fine-tunes for classification, detection and
segmentation.
"""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
import json
import shutil
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
from torch.utils.data import Dataset

from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.checkpoints.zoo import zoo_root
from mmmilan.datasets.image_folder import list_images
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.files import check_output, write_text
from mmmilan.models import MILAN
from mmmilan.teachers import build_teacher, teacher_config
from mmmilan.teachers.base import TextTower
from mmmilan.visualization.page import PAPER_LINK, Page
from scenes import write_scenes
from scenes.appearance import KINDS
from sections import STARTS, add_curves, add_heat_maps, add_pictures, add_scores, add_transfer, zero_shot
from training import PROBES, console, probe, probing_datasets, train

MARK = 'Written by the demo of mmmilan'  # on its page, which the next run may replace
LABELLED = 9  # the part of the images whose labels --full trains on
EPOCHS = dict(classification=30, detection=12, segmentation=15)  # of --full, by task
METHODS = {'MILAN': 'milan_vit-tiny-p8_scenes.py', 'MAE': 'mae_vit-tiny-p8_scenes.py'}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('demo'), help='folder to write everything to')
    parser.add_argument('--data', type=Path, help='your own images, with or without folders for the classes')
    parser.add_argument(
        '--teacher',
        help='MODEL:TAG of open_clip, e.g. ViT-B-16-quickgelu:openai (the default with --data), or a file in '
        "OpenAI's layout",
    )
    parser.add_argument(
        '--full',
        action='store_true',
        help='also fine-tune for classification, detection and segmentation, from MILAN and from random weights',
    )
    parser.add_argument(
        '--num-images', type=int, default=3000, help='training images to draw; a third as many are drawn for testing'
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs-scale', type=float, default=1.0, help='multiplies the number of epochs')
    args = parser.parse_args()
    if args.full and (args.data or args.teacher):
        raise InputError("--full is for the demo's own images and CLIP; drop --data and --teacher.")
    return args


def work_dir(args: argparse.Namespace, stage: str) -> Path:
    """The work dir of a stage."""
    return args.out / f'{stage}-seed{args.seed}'


def read_config(name: str, args: argparse.Namespace, stage: str) -> Config:
    """Read a config of the demo and set the work dir, the seed and the number of epochs."""
    cfg = Config.fromfile(zoo_root() / 'configs' / 'demo' / name)
    cfg.work_dir = str(work_dir(args, stage))
    cfg.randomness = dict(seed=args.seed)
    scaled = max(2, round(cfg.train_cfg.max_epochs * args.epochs_scale))
    cfg.train_cfg.max_epochs = scaled
    cfg.param_scheduler[1].update(T_max=scaled - 1, end=scaled)
    return cfg


def train_maskclip(args: argparse.Namespace) -> tuple[str, float]:
    """Train a small MaskCLIP on captions; returns its checkpoint and its zero-shot accuracy in percent."""
    cfg = read_config('maskclip_vit-tiny-p8_scenes.py', args, 'maskclip')
    scenes = args.out / 'scenes'
    cfg.train_dataloader.dataset.update(data_root=str(scenes / 'train'), captions=str(scenes / 'captions_train.csv'))
    cfg.test_dataloader.dataset.data_root = str(scenes / 'val')
    runner, _ = train(cfg, 'MaskCLIP on captions')
    return find_latest_checkpoint(cfg.work_dir), runner.test()['accuracy/top1']


def make_teacher(args: argparse.Namespace) -> tuple[dict, dict[str, dict[str, float]]]:
    """The config of the teacher; and, by its name, the scores of the MaskCLIP if it is trained here."""
    if not args.data:
        write_scenes(args.out / 'scenes', args.num_images, args.num_images // 3)
    if args.data or args.teacher:
        return teacher_config(args.teacher or 'ViT-B-16-quickgelu:openai'), {}
    checkpoint, accuracy = train_maskclip(args)
    console.print(f'MaskCLIP: zero-shot accuracy {accuracy:.1f} % on the test images.')
    return teacher_config(checkpoint), {'MaskCLIP': {'zero-shot': accuracy}}


def pretraining_config(method: str, teacher_cfg: dict, args: argparse.Namespace) -> Config:
    """The config of a method, with the images and the teacher of the demo or of the user."""
    cfg = read_config(METHODS[method], args, method.lower())
    cfg.train_dataloader.dataset.data_root = str(args.data or args.out / 'scenes' / 'train')
    cfg.test_dataloader.dataset.data_root = str(args.data or args.out / 'scenes' / 'val')
    if method == 'MILAN':
        cfg.model.head.teacher = teacher_cfg
    if args.data or args.teacher:
        fit_to_teacher(cfg, teacher_cfg)
    return cfg


def fit_to_teacher(cfg: Config, teacher_cfg: dict) -> None:
    """Set image size, patch size and width of the target to those of a real teacher."""
    teacher = build_teacher(teacher_cfg)
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


def text_tower(milan: MILAN) -> TextTower | None:
    """The text tower of MILAN's teacher; None if it has none, which is printed with the reason."""
    try:
        return milan.text_tower().to(get_device())
    except InputError as error:
        console.print(f'Without zero-shot accuracy and heat maps: {error}')
        return None


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def run_transfer(args: argparse.Namespace) -> dict[str, dict]:
    """Fine-tune for each task from the MILAN checkpoint and from random weights; returns the comparison by task."""
    labelled = args.out / 'labelled'
    write_scenes(labelled, max(len(KINDS), args.num_images // LABELLED), args.num_images // 3)
    start, compared = find_latest_checkpoint(work_dir(args, 'milan')), {}
    for task, epochs in EPOCHS.items():
        folder = work_dir(args, task)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run of the demo, whose other stages are replaced, too
        epochs = max(1, round(epochs * args.epochs_scale))
        once = {'train_cfg.val_interval': epochs}  # a detector takes longer for these images than for an epoch
        options = dict(img_size=64, epochs=epochs, seed=args.seed, **once)
        mmmilan.finetune(labelled, folder, task=task, start=start, compare='scratch', **options)
        compared[task] = json.loads((folder / 'comparison.json').read_text())
    return compared


def pretrain(args: argparse.Namespace, cfgs: dict[str, Config]) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Pretrain by each method; returns the models and a random one, in evaluation mode, and the seconds of training."""
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


def evaluate(
    page: Page, encoders: dict[str, nn.Module], datasets: list[Dataset], seconds: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Add accuracies of the frozen encoders and heat maps of texts to the page; returns the scores of each encoder."""
    milan = encoders['MILAN']
    class_tokens = {
        name: lambda images, model=model: model.extract_feat(images)[-1] for name, model in encoders.items()
    }
    class_tokens['teacher'] = lambda images: milan.head.run_teacher(images)[0][:, 0]
    scores = probe(milan.data_preprocessor, class_tokens, datasets)
    rows = [[name, *(f'{score[key]:.1f}' for key in PROBES)] for name, score in scores.items()]
    print_table('Top-1 accuracy of the frozen class token, %', ['encoder', *PROBES], rows)
    values = [[score[key] for key in PROBES] for score in scores.values()]
    tower = text_tower(milan)
    zero_shot_scores = zero_shot(milan, tower, datasets[-1]) if tower else {}
    for name, row, numbers in zip(scores, rows, values, strict=True):
        accuracy = zero_shot_scores.get(name)
        row += ['–' if accuracy is None else f'{accuracy:.1f}', f'{seconds[name]:.0f} s' if name in seconds else '–']
        numbers += [accuracy, None]
    add_scores(page, ['encoder', *PROBES, 'zero-shot', 'pretraining'], rows, values)
    if tower:
        console.print(
            'Zero-shot accuracy: {MILAN:.1f} % by MILAN, {teacher:.1f} % by its teacher.'.format(**zero_shot_scores)
        )
        scores['MILAN']['zero-shot'] = zero_shot_scores['MILAN']
        add_heat_maps(page, milan, tower, datasets[-1])
    return scores


def run_demo(args: argparse.Namespace) -> None:
    """Run all of it.

    Raises:
        InputError: the images or the teacher are missing or cannot be used.
    """
    start = time.time()
    use_safe_loading()
    init_default_scope('mmpretrain')
    path = check_output(args.out / 'index.html', mark=MARK)
    if args.data:
        list_images(args.data)  # fails before anything is trained or downloaded
    teacher_cfg, results = make_teacher(args)
    cfgs = {method: pretraining_config(method, teacher_cfg, args) for method in METHODS}
    encoders, seconds = pretrain(args, cfgs)
    curves = {name: work_dir(args, name.lower()) for name in (*results, *METHODS)}

    page = Page(
        'MILAN at work',
        'A ViT sees a quarter of the patches of an image, sampled by the attention of a CLIP model, and learns to '
        "predict CLIP's features of all patches. Labels are used only for the evaluation below.",
        PAPER_LINK,
    )
    datasets = probing_datasets(cfgs['MILAN'], args)
    if datasets:
        results |= evaluate(page, encoders, datasets, seconds)
    pictured = {**cfgs['MILAN'].test_dataloader.dataset, 'with_label': bool(datasets)}
    add_pictures(page, encoders, DATASETS.build(pictured))
    add_curves(page, curves)
    if args.full:
        compared = run_transfer(args)
        add_transfer(page, compared, {task: work_dir(args, task).name for task in compared})
        results['transfer'] = {task: dict(zip(STARTS, each['means'], strict=True)) for task, each in compared.items()}
        for each in compared.values():
            console.print(each['sentence'])

    page.paragraph(f'bash tools/demo.sh {" ".join(sys.argv[1:])}', 'code')
    page.write(path, f'{MARK} with seed {args.seed} on {get_device()}, PyTorch {torch.__version__}.')
    write_text(args.out / f'results-seed{args.seed}.json', json.dumps(results, indent=2))
    console.print(f'The page: {path.resolve()}  ({(time.time() - start) / 60:.1f} minutes in all)')


if __name__ == '__main__':
    with exit_on_input_error():
        run_demo(parse_args())
