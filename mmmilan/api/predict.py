"""Predictions of a trained classifier, detector or segmentor for many images, as files and pictures."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mmmilan import arguments
from mmmilan.api.inference import Predictor
from mmmilan.arguments import checked


@checked
def predict(
    images: arguments.Paths,
    checkpoint: arguments.Path,
    out: arguments.Path,
    *,
    draw: Annotated[bool, Parameter(negative='--no-draw')] = True,
    batch_size: arguments.Count | None = None,
    num_workers: arguments.Workers | None = None,
    device: arguments.Device | None = None,
    overwrite: bool = False,
) -> Path:
    """Predict the classes, objects or label maps of images with a trained checkpoint, and draw them.

    Writes a folder. Of a classifier it holds ``predictions.csv``, with a row for each image: its path, and its five
    best classes with their probabilities (empty if it cannot be read). Of a detector, ``predictions.json``: COCO's
    format, whose ``annotations`` are results with a score. Of a segmentor, ``maps``, with a PNG for each image by its
    own name: its values are the places of the classes in ``classes.txt``, shown in colours by a palette. Drawn pictures
    are in ``drawn``, shown by ``index.html``; objects below a score of 0.3 are not drawn.

    Images are read in parallel and predictions written as they come. A run that was stopped goes on where it ended if
    it is started again with the same arguments. Under ``python -m mmmilan.torchrun`` each process takes a part.

    Args:
        images: images, folders of images (flat or nested, sorted by path) and tar shards.
        checkpoint: a checkpoint of ``finetune`` or ``train``, or a fine-tuned model of the zoo.
        out: folder to write.
        draw: draw the predictions.
        batch_size: number of images that the model sees at once, by default that of the checkpoint's evaluation, but at
            most 64.
        num_workers: number of processes that read images, by default one per core and at most 8.
        device: where to run, by default on the GPU if there is one.
        overwrite: replace the predictions that are in ``out``; all files of an earlier run are removed, and no others.

    Returns:
        ``predictions.csv``, ``predictions.json`` or the folder of the maps.

    Raises:
        InputError: an image is missing, none can be read, the checkpoint has no head, or ``out`` must not or cannot be
            written.

    Examples:
        >>> mmmilan.predict('photos', 'runs/birds/model.pth', 'predictions')
        PosixPath('predictions/predictions.csv')
    """
    from mmengine.dist import broadcast_object_list

    from mmmilan.api.predict_files import MAPS, RESULTS, Items, Pictured, Work, begin_journal, check_folder, run_of
    from mmmilan.engine.distributed import joined, on_main

    with joined():
        on_main(lambda: check_folder(out, checkpoint, images, overwrite))
        folder, items = Path(out), Items(images)
        predictor = Predictor(checkpoint, device)
        work, files = Work(predictor, folder, items, draw), Pictured(items.paths, predictor)
        journal = on_main(lambda: begin_journal(folder, run_of(items, checkpoint, draw), overwrite))
        with journal or nullcontext():
            begin = [journal.begin if journal else 0]
            broadcast_object_list(begin)
            options = dict(begin=begin[0], batch_size=batch_size or predictor.batch_size)
            options |= dict(num_workers=num_workers, option='num_workers')
            for batch in predictor.each_batch(files, work.write, 'Predictions', **options):
                if journal:
                    journal.append(zip(batch['position'].tolist(), batch['row'], strict=True))
            if journal:
                work.finish(journal, checkpoint)
    return folder / (MAPS if predictor.task == 'segmentation' else RESULTS[predictor.task])
