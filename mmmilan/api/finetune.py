"""A classifier, a detector or a segmentor of a user's own classes, in one call."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

from mmmilan import arguments
from mmmilan.api.runs import check_out
from mmmilan.arguments import checked
from mmmilan.errors import InputError

FILES = ('config.py', 'model.pth', 'report.html', 'comparison.json')  # what finetune itself writes beside the run's


@checked
def finetune(
    data: arguments.Path | None = None,
    out: arguments.Path | None = None,
    *,
    start: arguments.Path | None = None,
    task: Literal['classification', 'detection', 'segmentation'] | None = None,
    arch: str | dict[str, Any] | None = None,
    patch_size: arguments.Pixels | None = None,
    img_size: arguments.Pixels | None = None,
    epochs: arguments.Count | None = None,
    batch_size: arguments.Count | None = None,
    accumulate: arguments.Count | None = None,
    lr: arguments.Rate | None = None,
    freeze: bool = False,
    compare: arguments.Path | None = None,
    classes: arguments.Texts | arguments.Path | None = None,
    ignore: arguments.Texts | arguments.Text | None = None,
    patience: arguments.Count | None = None,
    gpus: arguments.Count | None = None,
    seed: arguments.Seed | None = None,
    resume: bool = False,
    **changes: Any,
) -> Path:
    """Train a classifier, a detector or a segmentor on your own labelled images, from a pretrained encoder.

    What is trained follows from the data: folders of classes give a classifier; annotated objects Mask R-CNN, or Faster
    R-CNN where there are boxes alone; images with label maps UperNet. The recipes are the published ones, fitted to
    the number of images (docs/own_images.md). The model is validated after each epoch, and the best one is kept.

    The resulting config is written to ``out/config.py``; ``mmmilan train out/config.py`` runs the same training.

    Args:
        data: folder of labelled images: folders of classes, COCO, YOLO or Pascal VOC, or images with label maps. If it
            has no ``val``, ``test`` is validated on; without either, a fifth of the images, see ``out/split.json``.
        out: folder for config, log, checkpoints, model and report.
        start: the encoder that training starts from: a checkpoint of your own, a model of the zoo, a file or a URL in
            any layout; by default random weights.
        task: what to train, if the data allow several.
        arch: the encoder where there is no ``start``, as for ``mmmilan.pretrain``; by default 'base'.
        patch_size: side of a patch in pixels where there is no ``start``, by default 16.
        img_size: side of the images that the model sees, in pixels. By default, for a classifier that of ``start`` or
            224; for the others about that of the images, at most the 1024 and 512 of the published recipes.
        epochs: number of epochs; by default it follows from the number of images.
        batch_size: number of images that a process sees at once.
        accumulate: number of batches whose gradients make one step, where larger ones do not fit the memory.
        lr: learning rate of the head; that of the encoder falls from block to block.
        freeze: train the head alone. Of a classifier it is a linear probe.
        compare: train a second time from this start, or from random weights ('scratch'), with the same images in the
            same order, and say which is better. A resumed run is compared as it was to be.
        classes: names of the classes in the order of their labels, or a file of them.
        ignore: classes that are left out.
        patience: stop after as many epochs without a better validation.
        gpus: number of processes on this machine, one for each GPU; by default this process alone.
        seed: seed of all random numbers, by default 0; of the split, too.
        resume: continue the run in ``out`` from its newest complete checkpoint, with its own config; a run without
            checkpoints begins anew with it.
        changes: anything else in the config, e.g. ``--optim_wrapper.optimizer.weight_decay 0.1``.

    Returns:
        The path of the best model with its config and the names of its classes, ``out/model.pth``. ``mmmilan.predict``,
        ``mmmilan.test`` and the inferencers of OpenMMLab take it. ``report.html`` is beside it.

    Raises:
        InputError: data, start or an option is wrong; it is raised before training starts.

    Examples:
        >>> mmmilan.finetune('flowers', 'runs/flowers', start='runs/photos/milan.pth', compare='scratch')
    """
    if out is None or (data is None and not resume):
        missing = 'folder to write (--out)' if out is None else 'folder of labelled images'
        raise InputError(f'finetune lacks the {missing}; give it.')
    folder = Path(out)
    if data is not None and folder.resolve().is_relative_to(Path(data).expanduser().resolve()):
        raise InputError(f'{out} is within {data}, whose files are read as labelled data; choose a folder beside it.')
    check_out(folder, resume, FILES)
    given = dict(data=data, start=start, task=task, arch=arch, patch_size=patch_size, img_size=img_size, epochs=epochs)
    given |= dict(batch_size=batch_size, accumulate=accumulate, lr=lr, freeze=freeze or None, compare=compare)
    given |= dict(classes=classes, ignore=ignore, patience=patience, gpus=gpus, seed=seed)
    given = {name: value for name, value in given.items() if value is not None}
    from mmmilan.api.finetune_run import carry_out, planned  # and all that trains

    plan = planned(folder, given, changes, inspect.signature(finetune).parameters, resume)
    return carry_out(plan, folder, changes, gpus, resume)
