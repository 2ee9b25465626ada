"""Resizing and crop of the test pipeline as a part of an ONNX file, and photos on which both are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmpretrain.registry import TRANSFORMS
from torch import Tensor, nn

from mmmilan.building import in_scope
from mmmilan.checkpoints.task_config import test_dataset
from mmmilan.components import type_name
from mmmilan.errors import InputError
from mmmilan.export.preprocessing import READING, Preprocessing

PHOTOS = ((96, 128), (160, 100), (480, 640), (50, 40))  # height and width of those on which resizing is compared
# Library and interpolation of a pipeline -> attributes of ONNX's Resize, and whether the columns are resized first, to
# whole numbers, and then the rows, as Pillow does (for some shapes the other way round, which differs in rounding).
RESIZE = {
    ('pillow', 'bicubic'): ('mode = "cubic", cubic_coeff_a = -0.5, antialias = 1, exclude_outside = 1', True),
    ('pillow', 'bilinear'): ('mode = "linear", antialias = 1, exclude_outside = 1', True),
    ('cv2', 'bicubic'): ('mode = "cubic", cubic_coeff_a = -0.75', False),
    ('cv2', 'bilinear'): ('mode = "linear"', False),
}


def photos() -> list[np.ndarray]:
    """Pictures uint8 [H, W, 3] of several sizes, with edges, slopes and grain as in photographs."""
    rng, pictures = np.random.default_rng(0), []
    for height, width in PHOTOS:
        coarse = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3)).repeat(16, 0).repeat(16, 1)
        slope = np.linspace(-60, 60, width)[:, None] + np.linspace(-40, 40, height)[:, None, None]
        picture = coarse[:height, :width] + slope + rng.normal(0, 6, (height, width, 3))
        pictures.append(picture.clip(0, 255).astype(np.uint8))
    return pictures


def prepare(model: nn.Module, photo: np.ndarray) -> Tensor:
    """A photo uint8 [H, W, 3], RGB, resized by the test pipeline of a model -> [1, 3, h, w] from 0 to 1."""
    results = dict(img=photo[..., ::-1].copy(), img_shape=photo.shape[:2])
    with in_scope():
        for step in test_dataset(model._config)['pipeline']:
            if type_name(step) not in READING:
                results = TRANSFORMS.build(step)(results)
    image = np.ascontiguousarray(results['img'][..., ::-1].transpose(2, 0, 1))
    return torch.from_numpy(image)[None].float() / 255


def prepend_resizing(path: str, says: dict[str, Any], preparation: Preprocessing | None, out: Path) -> None:
    """Put resizing and crop into an ONNX file, before all else.

    Raises:
        InputError: they are not of those that ONNX has.
    """
    import onnx  # an optional package

    kind = (preparation.library, preparation.interpolation) if preparation else None
    if kind not in RESIZE or 'windows' in says['preprocessing']:
        raise InputError(
            f'{out} was not written: the test pipeline of its checkpoint resizes as no operator of ONNX does; leave '
            'out resize (--resize), and resize images as the metadata of the file says.'
        )
    model = onnx.load(path)
    text = f'<ir_version: {model.ir_version}, opset_import: ["" : {model.opset_import[0].version}]>'
    before = onnx.parser.parse_model(text + resizing_graph(preparation, *RESIZE[kind]))
    model = onnx.compose.merge_models(before, model, io_map=[('prepared', 'images')], prefix1='resize_')
    model.graph.input[0].name = model.graph.node[0].input[0] = 'images'
    onnx.save(model, path)
    says['preprocessing']['resized'] = 'in the model'


def resizing_graph(preparation: Preprocessing, attributes: str, by_axis: bool) -> str:
    """Photos uint8 [B, height, width, 3] -> ``prepared`` float [B, 3, h, w] from 0 to 1, in ONNX's own language."""
    height, width = preparation.size
    resize = f"""
        second = Concat <axis = 0> (count, size)
        resized = Resize <{attributes}> ({'wide' if by_axis else 'photo'}, , , second)"""
    if by_axis:
        resize = f"""
        columns = Gather <axis = 0> (size, last)
        rows = Shape <start = 2, end = 3> (photo)
        first = Concat <axis = 0> (count, rows, columns)
        wider = Resize <{attributes}> (photo, , , first)
        rounded = Round (wider)
        wide = Clip (rounded, black, white){resize}"""
    short, centre, used = 'size = Identity (sides_of_crop)', 'centre = Identity (pixels)', ''
    if preparation.resize:
        used = f', int64[1] edge = {{{preparation.resize}}}, int64[2] axes = {{2, 3}}, float two = {{2}}'
        short = """sides = Shape <start = 2> (photo)
        short = ReduceMin <keepdims = 1> (sides)
        scaled = Mul (sides, edge)
        size = Div (scaled, short)"""
        centre = """spare = Sub (size, sides_of_crop)
        spare_pixels = Cast <to = 1> (spare)
        half = Div (spare_pixels, two)
        left_top = Round (half)
        start = Cast <to = 7> (left_top)
        end = Add (start, sides_of_crop)
        centre = Slice (pixels, start, end, axes)"""
    used += ', int64[1] last = {1}' if by_axis else ''
    return f"""
    prepare (uint8[batch, height, width, 3] images) => (float[batch, 3, {height}, {width}] prepared)
    <int64[2] sides_of_crop = {{{height}, {width}}}, float black = {{0}}, float white = {{255}}{used}>
    {{
        channels = Transpose <perm = [0, 3, 1, 2]> (images)
        photo = Cast <to = 1> (channels)
        count = Shape <end = 2> (photo)
        {short}{resize}
        whole = Round (resized)
        pixels = Clip (whole, black, white)
        {centre}
        prepared = Div (centre, white)
    }}"""
