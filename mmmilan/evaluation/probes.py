"""Quick measures of frozen features: k-NN and a linear probe by scikit-learn, in seconds; and those without labels."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, TestLoop
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.utils.data import DataLoader

from mmmilan.datasets.classes import class_names
from mmmilan.errors import InputError, count, listed
from mmmilan.evaluation.features import extract, join
from mmmilan.models.milan import MILAN
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import LOOPS

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO, arXiv 2104.14294
Split = tuple[np.ndarray, np.ndarray]  # features [M, D] and classes [M]


def vote(queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Share of each class in the votes of the k nearest neighbours, weighted by exp(similarity / temperature).

    Args:
        queries: Features [B, D] of length 1.
        bank: Features [M, D] of length 1 of labelled images.
        labels: Their classes [M], int64.
        num_classes: Number C of classes.
        k: Number of neighbours; all of them if the bank has fewer.
        temperature: Lower values give the nearest neighbours more weight.

    Returns:
        Shares [B, C]; each row sums to 1.
    """
    similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    weights = (similarity / temperature).softmax(dim=1)
    return weights.new_zeros(len(queries), num_classes).scatter_add_(1, labels[nearest], weights)


def knn_predictions(train: Split, features: np.ndarray) -> np.ndarray:
    """Classes [T] by the :func:`vote` of the nearest neighbours."""
    bank, queries = (F.normalize(torch.from_numpy(rows), dim=1) for rows in (train[0], features))
    labels = torch.from_numpy(train[1])
    return vote(queries, bank, labels, int(labels.max()) + 1, NEIGHBOURS, TEMPERATURE).argmax(1).numpy()


def linear_probe(inverse_penalty: float = 0.1) -> Pipeline:
    """Logistic regression on standardised features, not yet fitted."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=1000))


def linear_probe_predictions(train: Split, features: np.ndarray) -> np.ndarray:
    """Classes [T] by a :func:`linear_probe`."""
    return linear_probe().fit(*train).predict(features)


def knn_accuracy(train: Split, test: Split) -> float:
    """Top-1 accuracy in [0, 1] of the vote of the nearest neighbours."""
    return float((knn_predictions(train, test[0]) == test[1]).mean())


def linear_probe_accuracy(train: Split, test: Split) -> float:
    """Top-1 accuracy in [0, 1] of logistic regression on standardised features."""
    return float((linear_probe_predictions(train, test[0]) == test[1]).mean())


def rankme(features: np.ndarray) -> float:
    """RankMe, the effective rank of features (arXiv 2210.02885, equation 1).

    exp of the entropy of the singular values over their sum: 1 if all features are multiples of one, D if all
    directions are used alike. It cannot exceed the number of images, so compare it on the same images only.

    Args:
        features: [M, D], not centred.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def cosines_to_teacher(model: MILAN, images: Tensor) -> dict[str, Tensor]:
    """How close the predictions of whole images are to the teacher's features; for a model with a joint space.

    Args:
        model: With a teacher of features as its target.
        images: Normalised images [B, 3, H, W], of which nothing is masked.

    Returns:
        The cosine of class tokens and the mean cosine of patches [B], as ``cosine_class`` and ``cosine_patches``.
    """
    features, _ = model.head.run_teacher(images)
    cosine = torch.cosine_similarity(model.embed_joint(images), features.float(), dim=-1)
    return dict(cosine_class=cosine[:, 0], cosine_patches=cosine[:, 1:].mean(1))


@LOOPS.register_module()
class KNNLoop(TestLoop):
    """Test loop in which labelled images vote on each test image by the cosine of their features.

    The protocol of DINO (arXiv 2104.14294): 20 neighbours, temperature 0.07. Features are what ``model.extract_feat``
    gives; the model needs no head. The evaluator reads the shares of the votes from ``pred_score``. All features of the
    labelled images are kept on the model's device: 4 GB for ImageNet-1k and ViT-B.

    Args:
        runner: The runner.
        dataloader: Loader of the test images, or its config.
        evaluator: Evaluator, or its config.
        bank_dataloader: Config of the loader of the labelled images.
        k: Number of neighbours.
        temperature: Of the votes' weights.

    Raises:
        InputError: if the classes of the two data sets differ, or there are none.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        bank_dataloader: dict,
        k: int = NEIGHBOURS,
        temperature: float = TEMPERATURE,
    ) -> None:
        # first, as the test images are numbered by its classes
        self.bank_dataloader = runner.build_dataloader(bank_dataloader, seed=runner.seed)
        super().__init__(runner, dataloader, evaluator)
        self.k = k
        self.temperature = temperature
        self.num_classes = self.check_classes()

    def check_classes(self) -> int:
        """Number of classes; both data sets must number the same ones alike."""
        classes, test_classes = (class_names(each.dataset) for each in (self.bank_dataloader, self.dataloader))
        if not classes or classes != test_classes:
            raise InputError(
                f'The labelled images of test_cfg.bank_dataloader have {count(len(classes), "class")} '
                f'({listed(classes)}) and the test images {len(test_classes)} ({listed(test_classes)}); give data sets '
                'of the same classes, with_label=True.'
            )
        return len(classes)

    def run(self) -> dict:
        """Encode the labelled images, then test."""
        self.runner.model.eval()
        self.bank, self.labels = self.encode_bank()
        return super().run()

    def encode_bank(self) -> tuple[Tensor, Tensor]:
        """Features [M, D] and labels [M] of all labelled images, on every process."""
        model, loader = unwrap(self.runner.model), self.bank_dataloader
        options = dict(batch_size=loader.batch_size, num_workers=loader.num_workers)
        options['option'] = 'test_cfg.bank_dataloader.num_workers'
        batches = extract(
            loader.dataset,
            model.data_preprocessor,
            lambda images: dict(features=self.encode(images)),
            'Features of the labelled images',
            **options,
        )
        bank = join(batches)
        device = next(model.parameters()).device
        return tuple(torch.from_numpy(bank[name]).to(device) for name in ('features', 'label'))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> features [B, D] of length 1, float32."""
        return F.normalize(unwrap(self.runner.model).extract_feat(images)[-1].float(), dim=1)

    def run_iter(self, idx: int, data_batch: dict) -> None:
        """One batch of test images."""
        self.runner.call_hook('before_test_iter', batch_idx=idx, data_batch=data_batch)
        data = unwrap(self.runner.model).data_preprocessor(data_batch)
        shares = vote(self.encode(data['inputs']), self.bank, self.labels, self.num_classes, self.k, self.temperature)
        outputs = [sample.set_pred_score(share) for sample, share in zip(data['data_samples'], shares, strict=True)]
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook('after_test_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs)
