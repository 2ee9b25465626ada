"""What a training step would take on a GPU, computed from the step's operations and the GPU's data sheet.

python tools/speed/estimate.py configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py mmpretrain --device A100

Configs are those of MILAN, MaskCLIP, fine-tuning and probing; of detection and segmentation the encoder alone is taken,
forward and backward. The word mmpretrain stands for its MILAN, in bfloat16.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from contestants import milan_models
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample
from rich.console import Console
from rich.table import Table
from torch import nn

from fake_cuda import CUDA, Operation, Watch, backward, fake_cuda, to_fake, train_step
from mmmilan.engine.flops import PEAK_TFLOPS
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.models.frozen import Frozen
from mmmilan.registry import MODELS

# TB/s and GB of the memory, by the makers' data sheets.
MEMORY = {
    'B200': (8.0, 180),
    'H200': (4.8, 141),
    'H100': (3.35, 80),
    'H20': (4.0, 96),
    'A100': (2.04, 80),
    'L40S': (0.864, 48),
    'L4': (0.3, 24),
    'RTX 5090': (1.79, 32),
    'RTX 4090': (1.01, 24),
}
# Assumptions: the shares of the data sheet that products and memory reach, and the seconds that any kernel takes.
PRODUCTS, BANDWIDTH, KERNEL = 0.7, 0.8, 2e-6
# What keeps its memory traffic when it is compiled; all else is fused with what comes before or after it.
APART = (
    'mm',
    'addmm',
    'bmm',
    'baddbmm',
    'convolution',
    '_scaled_dot_product',
    '_fused_adamw',
    '_foreach',
    'index',
    'gather',
)
APART += ('sort', 'topk', 'embedding', 'max_pool2d', 'upsample', 'copy_')


@dataclass
class Estimate:
    """Of a step: GB at its peak, not compiled; GFLOP an image; milliseconds, not compiled and compiled."""

    peak: float
    gflops: float
    eager: float
    compiled: float


def milliseconds(operations: list[Operation], device: str) -> float:
    """An operation takes as long as its products, or its memory traffic, whichever takes longer (the roofline)."""
    rate, bandwidth = PEAK_TFLOPS[device] * 1e12 * PRODUCTS, MEMORY[device][0] * 1e12 * BANDWIDTH
    total = 0.0
    for operation in operations:
        tensor_cores = 1 if operation.dtype in (torch.bfloat16, torch.float16) else 1 / 8
        total += max(operation.flops / (rate * tensor_cores), operation.bytes / bandwidth, KERNEL)
    return 1e3 * total


def fuse(operations: list[Operation]) -> list[Operation]:
    """As a compiler does: between two that stand APART, one operation, which reads and writes what those do."""
    needed = {key for operation in operations if operation.name.startswith(APART) for key in operation.reads}
    inner: set[int] = set()  # made by what is fused, and so not read again
    fused: list[Operation] = []
    group = None
    for operation in operations:
        if operation.name.startswith(APART):
            fused.append(operation)
            group = None
            continue
        if group is None:
            group = Operation('fused', {}, {}, 0, operation.dtype)
            fused.append(group)
        group.reads |= {key: size for key, size in operation.reads.items() if key not in inner}
        group.writes |= {key: size for key, size in operation.writes.items() if key in needed}
        inner |= set(operation.writes) - needed
    return [operation for operation in fused if operation.bytes]


def estimate(name: str, device: str, batch_size: int, img_size: int | None) -> Estimate:
    """A step of a config, the second one, in which the optimizer has its states."""
    model, cfg = build(name)
    dense = not hasattr(model, 'data_preprocessor')
    side = img_size or (model if dense else model.backbone).img_size[0]
    with fake_cuda():
        to_fake(model).train()
        wrapper = None if dense else build_optim_wrapper(model, cfg.optim_wrapper)
        for _ in range(1 if dense else 2):
            watch = Watch()
            frozen = [list(each.module.parameters()) for each in model.modules() if isinstance(each, Frozen)]
            states = [list(state.values()) for state in wrapper.optimizer.state.values()] if wrapper else []
            watch.hold([*model.parameters(), *model.buffers(), *frozen, *states])
            images = torch.zeros(batch_size, 3, side, side, dtype=torch.uint8)
            with watch:
                if wrapper:
                    train_step(model, wrapper, dict(inputs=watch.pin(images), data_samples=samples(cfg, batch_size)))
                else:
                    encode(model, images)
    flops = sum(operation.flops for operation in watch.operations)
    times = [milliseconds(operations, device) for operations in (watch.operations, fuse(watch.operations))]
    return Estimate(watch.peak / 1e9, flops / batch_size / 1e9, *times)


def build(name: str) -> tuple[nn.Module, Config]:
    """The model of a config, on the CPU with random weights; of a detector or segmentor its encoder."""
    if name == 'mmpretrain':
        settings = dict(arch='base', img_size=224, patch_size=16, device='cpu', compile=False)
        model, cfg = milan_models(argparse.Namespace(**settings), ours=False)
        cfg.optim_wrapper.type = 'mmmilan.BFloat16OptimWrapper'
        return model, cfg
    if not Path(name).is_file():
        raise InputError(f'The config {name} does not exist; correct its path.')
    cfg = Config.fromfile(name)
    init_default_scope('mmpretrain')
    cfg.model.backbone.pop('init_cfg', None)
    for part in (cfg.model.get('head') or {}, cfg.model.backbone):
        if part.get('teacher'):
            part.teacher.pretrained = None
    return MODELS.build(cfg.model.backbone if 'DenseViT' in cfg.model.backbone.type else cfg.model), cfg


def samples(cfg: Config, size: int) -> list[DataSample]:
    """Data samples with a label and, for a model of texts, a caption."""
    made = [DataSample().set_gt_label(0) for _ in range(size)]
    if 'text' in cfg.model:
        for sample in made:
            sample.set_field(torch.zeros(cfg.model.text.context_length, dtype=torch.int64), 'text')
    return made


def encode(model: nn.Module, images: torch.Tensor) -> None:
    """Forward and backward pass of an encoder of four maps."""
    with torch.autocast('cuda', torch.bfloat16):
        maps = model(images.to(CUDA).float())
    losses = [sum(each.float().sum() for each in maps)]
    del maps
    backward(losses)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', help='config files, or the word mmpretrain')
    parser.add_argument('--device', choices=MEMORY, default='A100')
    parser.add_argument('--batch-size', type=int, default=256, help='images on one GPU')
    parser.add_argument('--img-size', type=int, help='side of the images, by default that of the encoder')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    bandwidth, size = MEMORY[args.device]
    table = Table(
        title=f'Computed, not measured: {args.device}, bfloat16, batch {args.batch_size}', title_justify='left'
    )
    for column in ('', 'peak, GB', 'GFLOP/image', 'ms', 'ms, compiled', 'images/s, compiled', 'MFU, compiled'):
        table.add_column(column, justify='right' if column else 'left')
    for name in args.configs:
        result = estimate(name, args.device, args.batch_size, args.img_size)
        rate = 1e3 * args.batch_size / result.compiled
        mfu = rate * result.gflops / 1e3 / PEAK_TFLOPS[args.device]
        numbers = (result.peak, result.gflops, result.eager, result.compiled, rate)
        table.add_row(Path(name).stem, *(f'{number:,.1f}' for number in numbers), f'{mfu:.2f}')
    console = Console()
    console.print(table)
    console.print(
        f'Data sheet: {PEAK_TFLOPS[args.device]:g} TFLOP/s in bfloat16, {bandwidth:g} TB/s, {size} GB. Assumed: '
        f'products reach {PRODUCTS:.0%} of it, in float32 an eighth of that, and memory {BANDWIDTH:.0%}; '
        f'a kernel takes {1e6 * KERNEL:g} µs at least. Compiled: what stands between two products, calls of attention '
        'or gathers is one kernel. The peak is that of tensors, not compiled, without the gaps of the allocator, '
        'cuBLAS and the context (about 1 GB).',
        soft_wrap=True,
    )


if __name__ == '__main__':
    with exit_on_input_error():
        main()
