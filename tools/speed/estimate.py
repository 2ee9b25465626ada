"""Estimate time and memory of a training step on a GPU, from the step's operations and the GPU's data sheet.

python tools/speed/estimate.py step detection segmentation --device A100 H100
python tools/speed/estimate.py configs/maskclip/maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py

A name is a command of benchmark.py, which gives mmmilan and the code that it replaces, or a config file of MILAN,
MaskCLIP, fine-tuning or probing. For detection and segmentation only the encoder is estimated, forward and backward.
Everything is in bfloat16.
"""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmark import DEFAULTS
from contestants import DENSE, SIZES, dense_encoder, milan_models
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample
from rich.console import Console
from rich.table import Table
from torch import nn

from fake_cuda import CUDA, Operation, Watch, backward, fake_cuda, to_fake, train_step
from mmmilan.engine.throughput import PEAK_TFLOPS
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.models.wrapping import Frozen
from mmmilan.registry import MODELS

# Bandwidth (TB/s) and size (GB) of the memory, from the data sheets.
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
# Assumptions: the fractions of the data sheet that matrix products and memory reach; minimum seconds of a kernel.
PRODUCTS, BANDWIDTH, KERNEL = 0.7, 0.8, 2e-6
# Operations that a compiler does not fuse with their neighbours; it fuses all others.
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
class Step:
    """A training step as it would run on a GPU, without compilation.

    Attributes:
        batch_size: Number of images.
        peak: Peak memory of the tensors in bytes.
        operations: The operations on the device.
    """

    batch_size: int
    peak: int
    operations: list[Operation]

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)

    def milliseconds(self, device: str, compiled: bool = False) -> float:
        return milliseconds(fuse(self.operations) if compiled else self.operations, device)

    def mfu(self, device: str, compiled: bool = False) -> float:
        """Model FLOPs utilisation: FLOP/s as a fraction of the data sheet's."""
        return self.flops / (self.milliseconds(device, compiled) / 1e3) / (PEAK_TFLOPS[device] * 1e12)


def milliseconds(operations: list[Operation], device: str) -> float:
    """The roofline model: an operation takes as long as its computation or its memory traffic, whichever is longer."""
    rate, bandwidth = PEAK_TFLOPS[device] * 1e12 * PRODUCTS, MEMORY[device][0] * 1e12 * BANDWIDTH
    total = 0.0
    for operation in operations:
        tensor_cores = 1 if operation.dtype in (torch.bfloat16, torch.float16) else 1 / 8
        total += max(operation.flops / (rate * tensor_cores), operation.bytes / bandwidth, KERNEL)
    return 1e3 * total


def fuse(operations: list[Operation]) -> list[Operation]:
    """Fuse operations as a compiler does: all those between two of ``APART`` become one.

    A fused operation does not read what earlier fused operations wrote, and writes only what one of ``APART`` reads.
    """
    needed = {key for operation in operations if operation.name.startswith(APART) for key in operation.reads}
    inner: set[int] = set()  # written and read only by fused operations
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


def trace(model: nn.Module, cfg: Config | None, batch_size: int, img_size: int) -> Step:
    """Trace the second training step of a config, in which the optimizer has its states.

    Without a config, trace forward and backward pass of an encoder that gives four feature maps.
    """
    with fake_cuda():
        to_fake(model).train()
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper) if cfg else None
        for _ in range(2 if wrapper else 1):
            watch = Watch()
            frozen = [list(each.module.parameters()) for each in model.modules() if isinstance(each, Frozen)]
            states = [list(state.values()) for state in wrapper.optimizer.state.values()] if wrapper else []
            watch.hold([*model.parameters(), *model.buffers(), *frozen, *states])
            images = torch.zeros(batch_size, 3, img_size, img_size, dtype=torch.uint8)
            with watch:
                if wrapper:
                    train_step(model, wrapper, dict(inputs=watch.pin(images), data_samples=samples(cfg, batch_size)))
                else:
                    encode(model, images)
    return Step(batch_size, watch.peak, watch.operations)


def steps_of(name: str, arch: str = 'base', batch_size: int | None = None) -> Iterator[tuple[str, Step]]:
    """Trace the steps of a name on the command line, at the image size of the recipe.

    Args:
        name: A command of benchmark.py, for all its contestants, or a config file.
        arch: Size of the contestants.
        batch_size: Batch size; by default that of the recipe.

    Yields:
        Names of the contestants and their steps.

    Raises:
        InputError: there is no such file.
    """
    if name not in ('step', *DENSE):
        model, cfg = build(name)
        yield (
            Path(name).stem,
            trace(model, cfg, batch_size or cfg.train_dataloader.batch_size, model.backbone.img_size[0]),
        )
        return
    img_size, default, _ = DEFAULTS[name]
    args = argparse.Namespace(arch=arch, img_size=img_size, patch_size=16, device='cpu', compile=False)
    batch_size = batch_size or default
    if name == 'step':
        for contestant in ('mmmilan', 'mmpretrain'):
            model, cfg = milan_models(args, ours=contestant == 'mmmilan')
            cfg.optim_wrapper.type = 'mmmilan.BFloat16OptimWrapper'
            yield contestant, trace(model, cfg, batch_size, img_size)
    else:
        for contestant, cfg in DENSE[name](args).items():
            yield contestant, trace(dense_encoder(contestant, cfg, args), None, batch_size, img_size)


def build(name: str) -> tuple[nn.Module, Config]:
    """The model of a config, on the CPU with random weights, and the config.

    Raises:
        InputError: there is no such file.
    """
    if not Path(name).is_file():
        raise InputError(f'The config {name} does not exist; correct its path.')
    cfg = Config.fromfile(name)
    init_default_scope('mmpretrain')
    cfg.model.backbone.pop('init_cfg', None)
    for part in (cfg.model.get('head') or {}, cfg.model.backbone):
        if part.get('teacher'):
            part.teacher.pretrained = None
    return MODELS.build(cfg.model), cfg


def samples(cfg: Config, size: int) -> list[DataSample]:
    """Data samples with a label and, for a model with a text tower, a caption."""
    made = [DataSample().set_gt_label(0) for _ in range(size)]
    if 'text' in cfg.model:
        for sample in made:
            sample.set_field(torch.zeros(cfg.model.text.context_length, dtype=torch.int64), 'text')
    return made


def encode(model: nn.Module, images: torch.Tensor) -> None:
    """Forward and backward pass of an encoder that gives four feature maps."""
    with torch.autocast('cuda', torch.bfloat16):
        maps = model(images.to(CUDA).float())
    losses = [sum(each.float().sum() for each in maps)]
    del maps
    backward(losses)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='+', help='step, detection, segmentation, or config files')
    parser.add_argument('--device', nargs='+', choices=MEMORY, default=['A100', 'H100'])
    parser.add_argument('--arch', choices=SIZES, default='base', help="size of the benchmark's contestants")
    parser.add_argument('--batch-size', type=int, help="images on one GPU; default: the recipe's")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    table = Table(title='Computed, not measured; in bfloat16', title_justify='left')
    for column in ('', 'on', 'batch', 'peak, GB', 'GFLOP/image', 'ms', 'ms, compiled', 'MFU, compiled'):
        table.add_column(column, justify='right' if column not in ('', 'on') else 'left')
    for name in args.names:
        for contestant, step in steps_of(name, args.arch, args.batch_size):
            size = [str(step.batch_size), f'{step.peak / 1e9:.1f}', f'{step.flops / step.batch_size / 1e9:,.1f}']
            for device in args.device:
                times = [f'{step.milliseconds(device, compiled):,.1f}' for compiled in (False, True)]
                label = contestant if contestant == Path(name).stem else f'{name}: {contestant}'
                table.add_row(label, device, *size, *times, f'{step.mfu(device, compiled=True):.2f}')
    console = Console()
    console.print(table)
    for device in args.device:
        bandwidth, size = MEMORY[device]
        console.print(f'{device}: {PEAK_TFLOPS[device]:g} TFLOP/s in bfloat16, {bandwidth:g} TB/s, {size} GB.')
    console.print(
        f'Assumed: matrix products reach {PRODUCTS:.0%} of the data sheet, in float32 an eighth of that, and memory '
        f'{BANDWIDTH:.0%}; a kernel takes at least {1e6 * KERNEL:g} µs. Compiled: all operations between two products, '
        'calls of attention or gathers are one kernel. The peak is that of the tensors, not compiled, without '
        'fragmentation, cuBLAS and the context (about 1 GB).',
        soft_wrap=True,
    )


if __name__ == '__main__':
    with exit_on_input_error():
        main()
