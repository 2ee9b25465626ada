"""k-NN evaluation of a frozen encoder: a quick check of a pretraining checkpoint, without training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.dist import all_gather, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, TestLoop
from mmpretrain.structures import DataSample
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from mmmilan.datasets.classes import class_names, listed
from mmmilan.errors import InputError
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import LOOPS


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


@LOOPS.register_module()
class KNNLoop(TestLoop):
    """Test loop in which labelled images vote on each test image by the cosine of their features.

    The protocol of DINO (arXiv 2104.14294): 20 neighbours, temperature 0.07. Features are what ``model.extract_feat``
    gives; the model needs no head. The evaluator reads the shares of the votes from ``pred_score``. All features of the
    labelled images are kept on the model's device: 4 GB for ImageNet-1k and ViT-B, three times that while they are
    gathered.

    Args:
        runner: The runner.
        dataloader: Loader of the test images, or its config.
        evaluator: Evaluator, or its config.
        bank_dataloader: Config of the loader of the labelled images, with MMEngine's ``DefaultSampler``.
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
        k: int = 20,
        temperature: float = 0.07,
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
                f'The labelled images of test_cfg.bank_dataloader have {len(classes)} classes ({listed(classes)}) and '
                f'the test images {len(test_classes)} ({listed(test_classes)}); give data sets of the same classes, '
                'with_label=True.'
            )
        return len(classes)

    def run(self) -> dict:
        """Encode the labelled images, then test."""
        self.runner.model.eval()
        self.bank, self.labels = self.encode_bank()
        return super().run()

    def encode_bank(self) -> tuple[Tensor, Tensor]:
        """Features [M, D] and labels [M] of all labelled images, on every process."""
        features, labels = [], []
        quiet = not is_main_process()
        for data_batch in track(self.bank_dataloader, 'Features of the labelled images', transient=True, disable=quiet):
            encoded, data_samples = self.encode(data_batch)
            features.append(encoded)
            labels.append(torch.cat([sample.gt_label for sample in data_samples]))
        return self.gather(torch.cat(features)), self.gather(torch.cat(labels))

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all processes in the sampler's order, without the rows that it repeats to fill the last batch."""
        return torch.stack(all_gather(rows), dim=1).flatten(0, 1)[: len(self.bank_dataloader.dataset)]

    @torch.no_grad()
    def encode(self, data_batch: dict) -> tuple[Tensor, list[DataSample]]:
        """Features [B, D] of length 1, float32, and the data samples of a batch."""
        model = unwrap(self.runner.model)
        data = model.data_preprocessor(data_batch)
        return F.normalize(model.extract_feat(data['inputs'])[-1].float(), dim=1), data['data_samples']

    def run_iter(self, idx: int, data_batch: dict) -> None:
        """One batch of test images."""
        self.runner.call_hook('before_test_iter', batch_idx=idx, data_batch=data_batch)
        features, data_samples = self.encode(data_batch)
        shares = vote(features, self.bank, self.labels, self.num_classes, self.k, self.temperature)
        outputs = [sample.set_pred_score(share) for sample, share in zip(data_samples, shares, strict=True)]
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook('after_test_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs)
