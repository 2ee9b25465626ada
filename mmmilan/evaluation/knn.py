"""k-NN evaluation of a frozen encoder: a quick check of a pretraining checkpoint, without training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, TestLoop
from torch import Tensor
from torch.utils.data import DataLoader

from mmmilan.datasets.classes import class_names, listed
from mmmilan.errors import InputError
from mmmilan.evaluation.features import extract, join
from mmmilan.evaluation.probes import NEIGHBOURS, TEMPERATURE, vote
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import LOOPS


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
        model, loader = unwrap(self.runner.model), self.bank_dataloader
        options = dict(batch_size=loader.batch_size, num_workers=loader.num_workers)
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
