"""Zero-shot classification: the classifier is made of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, TestLoop
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from mmmilan.errors import InputError
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import LOOPS


@LOOPS.register_module()
class ZeroShotLoop(TestLoop):
    """Test loop whose classifier is made of texts: a class is the mean embedding of its name in several prompts.

    The protocol of CLIP (arXiv 2103.00020), for a :class:`MaskCLIP`. The evaluator reads the probabilities of the
    classes from ``pred_score``.

    Args:
        runner: The runner.
        dataloader: Loader of the labelled test images, or its config.
        evaluator: Evaluator, or its config, e.g. of mmpretrain's ``Accuracy``.
        templates: Prompts with ``{}`` for the name of the class; 'openai' for CLIP's 80 prompts for ImageNet.
        class_names: Names in the order of the data set's classes; None for the data set's own, 'imagenet' for
            open_clip's names of the classes of ImageNet-1k.

    Raises:
        InputError: if the names are not as many as the classes, or a template has no ``{}``.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        templates: Sequence[str] | str = ('a photo of a {}.',),
        class_names: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(runner, dataloader, evaluator)
        self.prompts = read_templates(templates)
        self.class_names = self.read_class_names(class_names)

    def read_class_names(self, names: Sequence[str] | str | None) -> Sequence[str]:
        """What the texts call each class of the data set."""
        from open_clip import IMAGENET_CLASSNAMES

        classes = self.dataloader.dataset.metainfo.get('classes') or ()
        names = IMAGENET_CLASSNAMES if names == 'imagenet' else classes if names is None else names
        if len(names) != len(classes) or not names:
            raise InputError(
                f'test_cfg.class_names names {len(names)} classes and the data set has {len(classes)}; give a name '
                "for each (and the data set with_label=True), or 'imagenet'."
            )
        return names

    def run(self) -> dict:
        """Encode the prompts, then test."""
        self.runner.model.eval()
        self.classifier = self.encode_classes()
        return super().run()

    @property
    def clip(self) -> torch.nn.Module:
        return unwrap(self.runner.model)

    @torch.no_grad()
    def encode_classes(self) -> Tensor:
        """Embeddings [C, E] of length 1."""
        from open_clip.tokenizer import SimpleTokenizer

        tokenize = SimpleTokenizer(context_length=self.clip.text.context_length)
        classifier = []
        quiet = not is_main_process()
        for name in track(self.class_names, 'Embeddings of the class names', transient=True, disable=quiet):
            text = tokenize([prompt(name) for prompt in self.prompts]).to(self.clip.logit_scale.device)
            classifier.append(self.clip.encode_text(text).mean(0))
        return F.normalize(torch.stack(classifier), dim=1)

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: dict) -> None:
        """One batch of test images."""
        self.runner.call_hook('before_test_iter', batch_idx=idx, data_batch=data_batch)
        outputs = self.runner.model.test_step(data_batch)
        images = torch.stack([sample.image_embedding for sample in outputs])
        scores = (self.clip.logit_scale.exp() * images @ self.classifier.T).softmax(dim=1)
        for sample, score in zip(outputs, scores, strict=True):
            sample.set_pred_score(score)
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook('after_test_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs)


def read_templates(templates: Sequence[str] | str) -> list[Callable[[str], str]]:
    """Functions from the name of a class to a prompt."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    if templates == 'openai':
        return list(OPENAI_IMAGENET_TEMPLATES)
    faulty = [template for template in templates if '{}' not in template]
    if faulty or not templates:
        raise InputError(
            f"test_cfg.templates={templates!r}: give a list of prompts with {{}} for the class's name, or 'openai'."
        )
    return [template.format for template in templates]
