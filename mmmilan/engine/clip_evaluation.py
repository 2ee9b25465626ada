"""What a CLIP knows without training for it: zero-shot classification, and retrieval between images and texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, TestLoop
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from mmmilan.errors import InputError
from mmmilan.registry import LOOPS, METRICS

CHUNK = 1024  # rows of a matrix of similarities that are held at a time


@LOOPS.register_module()
class ZeroShotLoop(TestLoop):
    """Test loop whose classifier is made of texts: a class is the mean embedding of its name in several prompts.

    The protocol of CLIP (arXiv 2103.00020), for a :class:`MaskCLIP`. The evaluator finds the probabilities of the
    classes as ``pred_score``.

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
        model = self.runner.model
        return model.module if is_model_wrapper(model) else model

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


@METRICS.register_module()
class RetrievalRecall(BaseMetric):
    """Recall at k, in percent, of texts by images and of images by texts, over the whole test set.

    Of several texts of an image, one among the k best is enough; each text is a query of its own; a tie counts as a
    failure. The model gives each data sample ``image_embedding`` [E] and ``text_embedding`` [T, E], of length 1.

    Args:
        topk: The values of k.
        collect_device: As for MMEngine's ``BaseMetric``.
    """

    default_prefix = 'retrieval'

    def __init__(self, topk: Sequence[int] = (1, 5, 10), collect_device: str = 'cpu') -> None:
        super().__init__(collect_device)
        self.topk = topk

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            if 'text_embedding' not in sample:
                raise InputError(
                    f'{sample.get("img_path", "A test image")} has no text; add TokenizeCaption with '
                    "all_captions=True and PackInputs with algorithm_keys=('text',) to the test pipeline."
                )
            self.results.append((sample['image_embedding'].float().cpu(), sample['text_embedding'].float().cpu()))

    def compute_metrics(self, results: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        images, texts = torch.stack([image for image, _ in results]), torch.cat([text for _, text in results])
        owner = torch.repeat_interleave(torch.tensor([len(text) for _, text in results]))
        ranks = dict(text=text_rank(images, texts, owner), image=image_rank(images, texts, owner))
        return {
            f'{name}_recall@{k}': 100 * float((rank < k).float().mean())
            for name, rank in ranks.items()
            for k in self.topk
        }


def text_rank(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """How many other texts are as close to an image as the closest of its own.

    Args:
        images: Embeddings [I, E].
        texts: Embeddings [T, E].
        owner: The image [T] of each text, int64.

    Returns:
        Numbers [I]; what cannot be compared (NaN) counts as closer.
    """
    ranks = []
    for start in range(0, len(images), CHUNK):
        similarity = images[start : start + CHUNK] @ texts.T
        own = owner == torch.arange(start, start + len(similarity))[:, None]
        best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~own & ~(similarity < best)).sum(1))
    return torch.cat(ranks)


def image_rank(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """How many other images are as close to a text as its own: numbers [T]; arguments as for :func:`text_rank`."""
    ranks = []
    for start in range(0, len(texts), CHUNK):
        similarity = texts[start : start + CHUNK] @ images.T
        own = similarity.gather(1, owner[start : start + CHUNK, None])
        ranks.append((~(similarity < own)).sum(1) - 1)
    return torch.cat(ranks)
