"""Zero-shot classification: the classifier is made of texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, TestLoop
from torch import Tensor
from torch.utils.data import DataLoader

from mmmilan.datasets.classes import class_names, wordnet_ids
from mmmilan.errors import InputError, count, listed, warn
from mmmilan.evaluation.features import progress
from mmmilan.files import read_lines
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import LOOPS
from mmmilan.teachers.base import TextTower


@LOOPS.register_module()
class ZeroShotLoop(TestLoop):
    """Test loop whose classifier is made of texts: a class is the mean embedding of its name in several prompts.

    The protocol of CLIP (arXiv 2103.00020), for a :class:`MaskCLIP`, or a :class:`MILAN` whose teacher has a text
    tower. The evaluator reads the probabilities of the classes from ``pred_score``.

    Args:
        runner: The runner.
        dataloader: Loader of the labelled test images, or its config.
        evaluator: Evaluator, or its config, e.g. of mmpretrain's ``Accuracy``.
        templates: Prompts with ``{}`` for the name of the class, in a list or a text file (.txt), one a line; 'openai'
            for CLIP's 80 prompts for ImageNet.
        class_names: A dictionary from the data set's classes to their names, or names in the order of its classes;
            None for the data set's own, 'imagenet' for open_clip's names of the classes of ImageNet-1k, of which the
            data set may have some.

    Raises:
        InputError: if the names are not those of the classes, a template has no ``{}``, or the model has no text
            tower.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        templates: Sequence[str] | str = ('a photo of a {}.',),
        class_names: Mapping[str, str] | Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(runner, dataloader, evaluator)
        self.prompts = read_templates(templates)
        self.class_names = self.read_class_names(class_names)

    def read_class_names(self, names: Mapping[str, str] | Sequence[str] | str | None) -> Sequence[str]:
        """What the texts call each class of the data set."""
        dataset = self.dataloader.dataset
        if names is None:
            names = dataset.metainfo.get('classes') or ()
        return name_classes(class_names(dataset), names, 'test_cfg.class_names')

    @torch.no_grad()
    def run(self) -> dict:
        """Encode the prompts, then test."""
        self.runner.model.eval()
        model = unwrap(self.runner.model)
        tower = model.text_tower().to(next(model.parameters()).device)
        self.classifier, self.scale = embed_classes(tower, self.class_names, self.prompts), tower.scale
        return super().run()

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: dict) -> None:
        """One batch of test images."""
        self.runner.call_hook('before_test_iter', batch_idx=idx, data_batch=data_batch)
        model = unwrap(self.runner.model)
        data = model.data_preprocessor(data_batch)
        scores = (self.scale * model.encode_image(data['inputs']) @ self.classifier.T).softmax(dim=1)
        outputs = [sample.set_pred_score(score) for sample, score in zip(data['data_samples'], scores, strict=True)]
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook('after_test_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs)


def name_classes(classes: Sequence[str], names: Mapping[str, str] | Sequence[str] | str, option: str) -> Sequence[str]:
    """What texts call each class of a data set.

    Args:
        classes: The classes, as their folders are named.
        names: A dictionary from the classes to their names, or names in the order of the classes; 'imagenet' for
            open_clip's names of the classes of ImageNet-1k.
        option: What gives these names, for errors.

    Raises:
        InputError: there are other numbers of names and classes, a class has no name, or the names are classes in
            another order.
    """
    if isinstance(names, str) and names == 'imagenet':
        names = imagenet_names()
    if isinstance(names, Mapping):
        lacking = [name for name in classes if name not in names]
        if lacking or not classes:
            raise InputError(
                f'{len(lacking)} of the {len(classes)} classes of the data set have no name in {option} '
                f'({listed(lacking)}); name the folders as they are named there, and set with_label=True.'
            )
        return [names[name] for name in classes]
    if isinstance(names, str) or len(names) != len(classes) or not names:
        count = repr(names) if isinstance(names, str) else f'{len(names)} classes'
        raise InputError(
            f'{option} names {count} and the data set has {len(classes)}; give a name for each (and the data set '
            "with_label=True), or 'imagenet'."
        )
    moved = [name for name, folder in zip(names, classes, strict=True) if name != folder and name in classes]
    if moved:
        raise InputError(
            f'{option} has {listed(moved)} at other places than the data set, whose classes are {listed(classes)}; '
            'give a dictionary from the classes to their names.'
        )
    return names


def names_of_folders(folders: Sequence[str]) -> Sequence[str]:
    """What texts call classes of which only the folders are known: of ImageNet-1k, whose folders are codes, its names.

    The log warns of other folders that have no word for a name.
    """
    names = imagenet_names()
    if set(folders) <= set(names):
        return [names[folder] for folder in folders]
    codes = [folder for folder in folders if re.fullmatch(r'n\d{8}|[\W\d_]*', folder)]
    if codes:
        warn(f'Texts name {count(len(codes), "class")} as the folder, {listed(codes)}; give class_names in words.')
    return folders


def imagenet_names() -> dict[str, str]:
    """The names of folders of ImageNet-1k -> open_clip's names of their classes."""
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
    from open_clip import IMAGENET_CLASSNAMES

    return dict(zip(wordnet_ids(IMAGENET_CATEGORIES), IMAGENET_CLASSNAMES, strict=True))


def embed_classes(tower: TextTower, names: Sequence[str], prompts: Sequence[Callable[[str], str]]) -> Tensor:
    """Embeddings [C, E] of length 1: for each class the mean of the embeddings of its name in all prompts."""
    steps = progress(names, 'Embeddings of the class names')
    return F.normalize(torch.stack([tower([prompt(name) for prompt in prompts]).mean(0) for name in steps]), dim=1)


def nearest_text(
    spaces: Mapping[str, Callable[[Tensor], Tensor]], classifier: Tensor
) -> Callable[[Tensor], dict[str, Tensor]]:
    """A classifier made of texts, for :func:`mmmilan.evaluation.features.extract`.

    Args:
        spaces: Functions from normalised images [B, 3, H, W] to embeddings [B, C], by name.
        classifier: Embeddings of the classes [K, C], see :func:`embed_classes`.

    Returns:
        Function from normalised images to their classes [B] in each space.
    """
    return lambda images: {name: (embed(images) @ classifier.T).argmax(1) for name, embed in spaces.items()}


def read_templates(templates: Sequence[str] | str) -> list[Callable[[str], str]]:
    """Functions from the name of a class to a prompt.

    Raises:
        InputError: there is no such file, or a prompt has no place for the name.
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    if templates == 'openai':
        return list(OPENAI_IMAGENET_TEMPLATES)
    if isinstance(templates, str):
        if not Path(templates).is_file():
            raise InputError(f"templates={templates!r} is neither 'openai' nor a file; correct its path.")
        templates = read_lines(templates)
    faulty = [template for template in templates if '{}' not in template]
    if faulty or not templates:
        raise InputError(
            f'test_cfg.templates={templates!r} has no place for the name of a class; give a list of prompts '
            "with {} in each, or 'openai'."
        )
    return [partial(str.replace, template, '{}') for template in templates]  # other braces are part of the text
