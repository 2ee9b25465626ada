"""The contestants of benchmark.py: mmmilan, always the first, and the OpenMMLab code that it replaces."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import cv2
import mmpretrain
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from options import align, random_records
from timing import Contestant, Lap
from torch import Tensor, nn

from mmmilan.datasets.decoding import EXTENSIONS
from mmmilan.datasets.reproducible import Draw, seeded
from mmmilan.engine.compilation import compile_model
from mmmilan.teachers.cache import decode

NAME = 'milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
OURS = Path(__file__).parents[2] / 'configs' / NAME
THEIRS = Path(mmpretrain.__file__).parent / '.mim' / 'configs' / NAME
# Encoder; decoder (width, blocks, heads); teacher (width, blocks, width of the target). CLIP's ViT-B/16 teaches a
# large student too, as in the paper's table 9, row 1.
SIZES = dict(
    tiny=(dict(embed_dims=64, num_layers=4, num_heads=2, feedforward_channels=256), (32, 2, 2), (64, 2, 32)),
    base=(dict(embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072), (512, 8, 16), (768, 12, 512)),
    large=(dict(embed_dims=1024, num_layers=24, num_heads=16, feedforward_channels=4096), (512, 8, 16), (768, 12, 512)),
)


def autocast(args: argparse.Namespace) -> AbstractContextManager:
    """The precision that ``args.dtype`` names."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16)


# -- pretraining


def random_clip(args: argparse.Namespace) -> dict[str, Tensor]:
    """A CLIP in OpenAI's layout with random weights, with only the parts of a text tower that mmpretrain requires."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    width, layers, output_dim = SIZES[args.arch][2]
    size = args.img_size, args.patch_size
    visual = VisionTransformer(*size, width, layers, width // 64, 4, output_dim=output_dim, act_layer=QuickGELU)
    shapes = {'positional_embedding': (8, 64), 'text_projection': (64, output_dim), 'ln_final.weight': (64,)}
    shapes |= {'token_embedding.weight': (10, 64), 'transformer.resblocks.0.ln_1.weight': (64,)}
    text = {key: torch.zeros(shape) for key, shape in shapes.items()}
    numbers = dict(input_resolution=args.img_size, context_length=8, vocab_size=10)  # which only OpenAI's files have
    text |= {key: torch.tensor(value) for key, value in numbers.items()}
    return text | {f'visual.{key}': value for key, value in visual.state_dict().items()}


def milan_models(args: argparse.Namespace, ours: bool, option: str | None = None) -> tuple[BaseModel, Config]:
    """Build MILAN from its config in the size of ``args``; the width of mmpretrain's neck is corrected.

    Args:
        args: The options of benchmark.py.
        ours: Build mmmilan's model, not mmpretrain's.
        option: One of ``OPTIONS``, which may change our config.

    Returns:
        The model, on the device and in training mode, and its config.
    """
    arch, (width, depth, heads), (_, _, output_dim) = SIZES[args.arch]
    cfg = Config.fromfile(OURS if ours else THEIRS)
    cfg.model.backbone.update(arch=arch, img_size=args.img_size, patch_size=args.patch_size)
    cfg.model.neck.update(num_patches=(args.img_size // args.patch_size) ** 2, embed_dim=arch['embed_dims'])
    cfg.model.neck.update(decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=heads)
    cfg.model.neck.predict_feature_dim = output_dim
    cfg.model.data_preprocessor = cfg.model.get('data_preprocessor') or cfg.data_preprocessor
    init_default_scope('mmpretrain')
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/clip.pt'
        torch.save(random_clip(args), path)
        if ours:
            cfg.model.head.teacher.update(model=None, pretrained=path)
            if option == 'alignment':
                align(cfg.model)
        else:
            cfg.model.target_generator.tokenizer_path = path
        model = MODELS.build(cfg.model)
    model.init_weights()
    model.to(args.device).train()
    if ours and args.compile:
        compile_model(model)
    return model, cfg


def teacher_of(model: BaseModel) -> nn.Module:
    """The teacher of our model or of mmpretrain's."""
    return model.head.teacher if hasattr(model.head, 'teacher') else model.target_generator


def training_step(
    model: BaseModel, wrapper: OptimWrapper, images: Tensor, records: np.ndarray | None, lap: Lap
) -> None:
    """MMEngine's ``train_step``, with laps; ``records`` [B] of a cache stand for the teacher."""
    if records is not None:
        model.head.recalled = decode(records, images.device)
    whole = 'mean_loss' in vars(model)  # compiled as a whole, with the teacher
    hook = nullcontext() if whole else teacher_of(model).register_forward_hook(lambda *_: lap('teacher'))
    with hook, wrapper.optim_context(model):
        data = model.data_preprocessor(dict(inputs=images, data_samples=None), training=True)
        losses = model(**data, mode='loss')
        loss, _ = model.parse_losses(losses)
        lap('forward' if whole else 'encoder, decoder')
    wrapper.backward(loss)
    lap('backward')
    wrapper.step()
    wrapper.zero_grad()
    lap('optimizer')


def random_images(args: argparse.Namespace) -> Tensor:
    """Pixels [B, 3, H, W], uint8, on the device."""
    shape = (args.batch_size, 3, args.img_size, args.img_size)
    return torch.randint(256, shape, dtype=torch.uint8, device=args.device)


def step(args: argparse.Namespace) -> Iterator[Contestant]:
    """The training step: ours, mmpretrain's in the same precision, mmpretrain's in float32 as in its config.

    Then ours with each of ``args.options``.
    """
    images = random_images(args)
    wrapper_of = {torch.float32: 'OptimWrapper', torch.bfloat16: 'mmmilan.BFloat16OptimWrapper'}
    precision = str(args.dtype).removeprefix('torch.')
    contests = [('mmmilan', True, args.dtype, None), (f'mmpretrain in {precision}', False, args.dtype, None)]
    if args.dtype != torch.float32:
        contests.append(('mmpretrain as configured (float32)', False, torch.float32, None))
    contests += [(f'mmmilan, {option}', True, args.dtype, option) for option in args.options]
    for name, ours, dtype, option in contests:
        model, cfg = milan_models(args, ours, option)
        records = random_records(model, images) if option == 'cached' else None
        cfg.optim_wrapper.type = wrapper_of[dtype]
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        if dtype == torch.bfloat16 and not ours:
            wrapper.enabled = True  # even on a CPU without bfloat16, where mmmilan falls back to float32
        extra = dict(precision='bfloat16' if getattr(wrapper, 'enabled', False) else 'float32')
        yield Contestant(name, partial(training_step, model, wrapper, images, records), args.batch_size, extra=extra)


def teacher(args: argparse.Namespace) -> Iterator[Contestant]:
    """Features and importance of images by the teacher, without gradients."""
    images = random_images(args).float() / 128 - 1

    def run(model: nn.Module, lap: Lap) -> None:
        with torch.no_grad(), autocast(args):
            model(images)

    for name, ours in (('mmmilan', True), ('mmpretrain', False)):
        model = teacher_of(milan_models(args, ours)[0])
        yield Contestant(name, partial(run, model), args.batch_size)


def decoder(args: argparse.Namespace) -> Iterator[Contestant]:
    """Forward and backward pass of the decoder, with a quarter of the patches visible."""
    width = SIZES[args.arch][0]['embed_dims']
    num_patches = (args.img_size // args.patch_size) ** 2
    order = torch.rand(args.batch_size, num_patches, device=args.device).argsort(dim=1)
    visible, masked = order.split([num_patches // 4, num_patches - num_patches // 4], dim=1)
    latent = torch.randn(args.batch_size, 1 + visible.shape[1], width, device=args.device, requires_grad=True)
    inputs = dict(mmmilan=(visible, masked), mmpretrain=(order.argsort(dim=1), visible, masked))

    def run(model: nn.Module, indices: tuple[Tensor, ...], lap: Lap) -> None:
        with autocast(args):
            pred = model(latent, *indices)
        lap('forward')
        pred.backward(torch.ones_like(pred))
        lap('backward')
        model.zero_grad()
        latent.grad = None

    for name, indices in inputs.items():
        model = milan_models(args, ours=name == 'mmmilan')[0].neck
        yield Contestant(name, partial(run, model, indices), args.batch_size)


# -- data


def data(args: argparse.Namespace) -> Iterator[Contestant]:
    """Images from files to packed tensors, on one core, and the distance of their pixels to mmpretrain's default."""
    cv2.setNumThreads(0)
    init_default_scope('mmpretrain')
    default = Config.fromfile(THEIRS).train_dataloader.dataset.pipeline
    fast = [step | dict(backend='cv2') if 'backend' in step else step for step in default]
    own = Config.fromfile(OURS).train_dataloader.dataset.pipeline
    kwargs = dict(data_root=args.data_root)
    other = dict(type='CustomDataset', with_label=False, extensions=EXTENSIONS)
    cfgs = {
        'mmmilan': dict(type='mmmilan.ImageFolder', pipeline=own),
        'mmpretrain': dict(pipeline=default, **other),
        'mmpretrain, cv2 backend': dict(pipeline=fast, **other),
    }
    datasets = {}
    for name, cfg in cfgs.items():
        for transform in cfg['pipeline']:
            if 'scale' in transform:
                transform['scale'] = args.img_size
        datasets[name] = DATASETS.build(cfg | kwargs)
    sample = range(min(len(datasets['mmmilan']), 100))
    expected = [draw_sample(datasets['mmpretrain'], i) for i in sample]
    for name, dataset in datasets.items():
        distances = [np.abs(draw_sample(dataset, i) - e).mean() for i, e in zip(sample, expected, strict=True)]
        extra = dict(pixel_difference=float(np.mean(distances)))
        images = iter(range(10**9))

        def run(lap: Lap, name=name, dataset=dataset, images=images) -> None:
            for _ in range(args.batch_size):
                index = next(images) % len(dataset)
                _ = dataset[Draw(0, 0, index) if name == 'mmmilan' else index]

        yield Contestant(name, run, args.batch_size, counted=False, extra=extra)


def draw_sample(dataset: torch.utils.data.Dataset, index: int) -> np.ndarray:
    """Pixels of a sample; the random numbers follow from its index, so crop and flip are the same in every pipeline."""
    with seeded(Draw(0, 0, index)):
        return dataset[index]['inputs'].numpy().astype(np.float32)


# -- dense tasks


def dense_encoder(name: str, cfg: dict, args: argparse.Namespace) -> nn.Module:
    """An encoder that gives four feature maps; the others get mmseg's pyramid, which ours contains."""
    import mmseg.models  # noqa: F401  registers mmseg's

    init_default_scope('mmpretrain')
    model = MODELS.build(cfg)
    if not name.startswith('mmmilan'):
        width = SIZES[args.arch][0]['embed_dims']
        pyramid = dict(type='mmseg.Feature2Pyramid', embed_dim=width, norm_cfg=dict(type='BN'))
        model = nn.Sequential(model, MODELS.build(pyramid))
    elif args.compile:
        model.forward = torch.compile(model.forward, dynamic=False)
    model.to(args.device).train()  # mmpretrain's backbones return None from it
    return model


def dense(backbones: Callable[[argparse.Namespace], dict[str, dict]], args: argparse.Namespace) -> Iterator[Contestant]:
    """Forward and backward pass of encoders that give four feature maps."""
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)

    def run(model: nn.Module, lap: Lap) -> None:
        with autocast(args):
            maps = model(images)
        lap('forward')
        torch.autograd.backward(maps, [torch.ones_like(each) for each in maps])
        lap('backward')
        model.zero_grad()

    for name, cfg in backbones(args).items():
        yield Contestant(name, partial(run, dense_encoder(name, cfg, args)), args.batch_size)


def scale_indices(args: argparse.Namespace) -> list[int]:
    """The last block of each quarter."""
    depth = SIZES[args.arch][0]['num_layers']
    return [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]


def detection(args: argparse.Namespace) -> dict[str, dict]:
    """Windowed attention with four global blocks, with and without relative positions, against mmpretrain's ViT."""
    shared = dict(arch=SIZES[args.arch][0], patch_size=args.patch_size, img_size=args.img_size)
    shared['out_indices'] = scale_indices(args)
    ours = dict(type='mmmilan.DenseViT', with_cls_token=False, window_size=16, global_indices=scale_indices(args))
    ours['scale_norm_cfg'] = dict(type='GN', num_groups=32)
    theirs = dict(type='mmpretrain.VisionTransformer', out_type='featmap', final_norm=False)
    return {
        'mmmilan': dict(rel_pos_bias='shared', **ours, **shared),
        'mmmilan, no relative positions': ours | shared,
        'mmpretrain, global attention': theirs | shared,
    }


def segmentation(args: argparse.Namespace) -> dict[str, dict]:
    """Relative positions and layer scale, against mmseg's ViT with the same and against its plain one."""
    arch = SIZES[args.arch][0]
    shared = dict(img_size=args.img_size, patch_size=args.patch_size, out_indices=scale_indices(args))
    ours = dict(type='mmmilan.DenseViT', arch=arch, rel_pos_bias=True, layer_scale_init_value=1.0)
    ours['scale_norm_cfg'] = dict(type='BN')  # as mmseg's pyramid
    theirs = dict(embed_dims=arch['embed_dims'], num_layers=arch['num_layers'], num_heads=arch['num_heads'])
    theirs['mlp_ratio'] = arch['feedforward_channels'] // arch['embed_dims']
    return {
        'mmmilan': ours | shared,
        'mmseg MAE': dict(type='mmseg.MAE', init_values=1.0, **theirs, **shared),
        'mmseg VisionTransformer, no relative positions': dict(type='mmseg.VisionTransformer', **theirs, **shared),
    }


DENSE = dict(detection=detection, segmentation=segmentation)
CONTESTS = dict(step=step, teacher=teacher, decoder=decoder, data=data)
CONTESTS |= {name: partial(dense, backbones) for name, backbones in DENSE.items()}
