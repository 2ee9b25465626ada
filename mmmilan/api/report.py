"""A page that compares a pretrained encoder with its starting point, and says whether pretraining helped."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mmmilan import arguments
from mmmilan.arguments import checked
from mmmilan.errors import InputError


@checked
def report(
    data: arguments.Paths,
    checkpoint: arguments.Path,
    out: arguments.Path = 'report.html',
    *,
    max_images: arguments.Count = 2000,
    device: arguments.Device | None = None,
    overwrite: bool = False,
    teacher: arguments.Path | None = None,
    compare: arguments.Paths | None = None,
) -> Path:
    """Write a page that says whether pretraining helped on your images.

    The page compares encoders, by their class token and by the mean of their patch tokens: the pretrained one, its
    starting point if it had one, random weights and the teacher. If folders name classes, it gives the accuracy of 20
    nearest neighbours and of linear probes with 1 %, 10 % and all labels, with 95 % confidence intervals, beside that
    of the most frequent class, and one sentence that says whether pretraining helped. Without classes, it gives RankMe
    and shows nearest neighbours.

    Args:
        data: folders of images and tar shards that were not trained on, best one folder with a folder for each class.
            If a folder is divided into splits, ``val`` is taken, or else ``test``, and neighbours and probes learn from
            the labelled images of ``train``; otherwise from seven tenths of the images.
        checkpoint: a checkpoint of ``mmmilan.pretrain`` or ``mmmilan.train``, with its decoder.
        out: the page to write, a single self-contained file, .html.
        max_images: maximum number of images of a split; if there are more, evenly spaced ones are taken.
        device: where to run, by default on the GPU if there is one.
        overwrite: replace the page if there is one.
        teacher: the teacher, if it is not where the checkpoint says: a name or a file, as for ``mmmilan.pretrain``.
        compare: checkpoints of other runs, whose encoders are measured on the same images. Files of one name are told
            apart by their folders.

    Returns:
        The path of the page.

    Raises:
        InputError: there are too few images, ``train`` lacks a class, the checkpoint was not pretrained by MILAN, a run
            is named twice, or the page must not or cannot be written there.

    Examples:
        >>> mmmilan.report('photos', 'runs/photos/milan.pth', 'runs/photos/report.html')
    """
    import torch

    from mmmilan.api import report_features as measured
    from mmmilan.api.few_images import about_recipe
    from mmmilan.api.models import get_model, read_config, titles_of
    from mmmilan.arguments import typed
    from mmmilan.building import in_scope
    from mmmilan.checkpoints.config import call_of
    from mmmilan.datasets.image_folder import as_sources
    from mmmilan.datasets.listing import listed_once
    from mmmilan.evaluation.features import choose_device, device_name
    from mmmilan.files import check_output
    from mmmilan.visualization import report_sections as sections
    from mmmilan.visualization.page import PAPER_LINK, Page

    begin = time.monotonic()
    sources = as_sources(data)
    runs = [os.fspath(each) for each in (checkpoint, *(as_sources(compare) if compare is not None else ()))]
    titles = titles_of(runs)
    path = check_output(out, [*runs, *sources], endings=('.html',), overwrite=overwrite)
    config = read_config(checkpoint)
    if 'masking' not in config.model:
        raise InputError(f'{checkpoint} was not pretrained by MILAN; give the checkpoint of a pretraining.')
    device = choose_device(device)
    with in_scope():
        with listed_once():
            known = measured.read_known(config, sources)
            dataset = measured.read_images(config, sources, known)
        milan = get_model(checkpoint, pretrained=True, encoder_only=False, device=device, teacher=teacher)
        backbones = measured.build_backbones(milan, config, device)
        images, features = measured.encode_images(dataset, max_images, milan, backbones, known)
        bank = None
        if known and images.labels is not None:
            bank = measured.encode_bank(known, max_images, milan, backbones)
        others = dict(zip([f'{sections.OURS}: {title}' for title in titles[1:]], runs[1:], strict=True))
        for name, run in others.items():
            features |= measured.encode_run(run, name, sources, images, bank, max_images, device)
    page = Page('What pretraining did', sections.introduction(images, titles[0] if others else ''), PAPER_LINK)
    sections.add_scores(page, features, images, bank)
    sections.add_training(page, checkpoint, config, about_recipe(config))
    sections.add_neighbours(page, features, images)
    sections.add_pictures(page, milan, backbones, images)
    compared = dict(out=out, compare=runs[1:] or None)
    for line in (*call_of(config)['commands'], typed('report', [*sources, checkpoint], compared, {})):
        page.paragraph(line, 'code')
    minutes = (time.monotonic() - begin) / 60
    page.write(path, f'Made in {minutes:.1f} minutes on {device_name(device)}, PyTorch {torch.__version__}.')
    return path
