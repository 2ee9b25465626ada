"""Export MaskCLIP as a folder that open_clip loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmilan.checkpoints.io import save_checkpoint_file
from mmmilan.checkpoints.open_clip_layout import NORM_EPS, to_open_clip
from mmmilan.files import check_output_folder, write_text

if TYPE_CHECKING:
    from mmmilan.export.preprocessing import Preprocessing
    from mmmilan.models.maskclip import MaskCLIP


FILES = ('open_clip_config.json', 'open_clip_model.safetensors')


def write_open_clip(
    model: MaskCLIP, preprocessing: Preprocessing, folder: str | Path, *, overwrite: bool = False
) -> None:
    """Write a model so that ``open_clip.create_model_and_transforms('local-dir:FOLDER')`` loads it.

    Args:
        model: The model; in ``open_clip`` it gives the same embeddings.
        preprocessing: The preprocessing of its images.
        folder: Folder to write ``open_clip_config.json`` and ``open_clip_model.safetensors`` to.
        overwrite: Replace these files.

    Raises:
        InputError: the encoder is not a plain ViT, its preprocessing cannot be expressed in open_clip, or the files
            must not or cannot be written.
    """
    folder = check_output_folder(folder, FILES, overwrite=overwrite)
    config = dict(model_cfg=open_clip_config(model), preprocess_cfg=preprocessing.open_clip())
    save_checkpoint_file(to_open_clip(model.state_dict()), folder / 'open_clip_model.safetensors')
    write_text(folder / 'open_clip_config.json', json.dumps(config, indent=2))


def open_clip_config(model: MaskCLIP) -> dict[str, Any]:
    """The architecture of a model as a config of open_clip."""
    arch = model.backbone.arch_settings
    height, width = model.backbone.img_size
    vision = dict(
        image_size=height if height == width else [height, width],
        patch_size=model.backbone.patch_embed.projection.kernel_size[0],
        width=arch['embed_dims'],
        layers=arch['num_layers'],
        head_width=arch['embed_dims'] // arch['num_heads'],
        mlp_ratio=arch['feedforward_channels'] / arch['embed_dims'],
        no_ln_pre=True,
        norm_kwargs=dict(eps=NORM_EPS),
    )
    return dict(embed_dim=model.image_projection.out_features, vision_cfg=vision, text_cfg=dict(model.text_cfg))
