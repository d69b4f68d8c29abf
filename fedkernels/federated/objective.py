"""What clients minimise: the model, its loss and metric, and the dataset on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.datasets import Dataset
from .scores import SCORES

CROP_PADDING = 4
Precision = Literal["fp32", "bf16"]


class Objective:
    """A model and a dataset resident on one device, with their loss and metric.

    Images stay uint8 and are normalised (and augmented) in batches when they are used; there is no per-sample loader.

    Args:
        precision: `bf16` computes forward and backward under autocast; parameters and updates stay as they are.
        to_shard: leave the module where it is: it will be dealt out over ranks, and no device should hold all of it.
    """

    def __init__(
        self,
        module: nn.Module,
        data: Dataset,
        device: torch.device,
        precision: Precision = "fp32",
        *,
        to_shard: bool = False,
    ) -> None:
        self.module = module if to_shard else module.to(device)
        self.device = device
        self.precision = precision
        self.kind = data.kind
        self.augment = data.augment
        self.classes = data.classes
        self.metrics = data.metrics
        parameter = next(module.parameters())
        self.dtype = parameter.dtype
        # Convolutions run faster on channels-last activations; a patch projection is a matrix product in disguise.
        convolutions = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
        self.channels_last = any(child.kernel_size != child.stride for child in convolutions)
        self._memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        self._inputs = data.train_inputs.to(device)
        self._targets = data.train_targets.to(device)
        self._test_inputs = data.test_inputs.to(device)
        self._test_targets = data.test_targets.to(device)
        if self.kind == "image":
            std = torch.tensor(data.std, dtype=self.dtype, device=device)
            mean = torch.tensor(data.mean, dtype=self.dtype, device=device)
            # Whole images rather than one number a channel: the product then runs over contiguous memory.
            shape = self._inputs[:1].shape
            scale, shift = (1 / (255 * std)).view(-1, 1, 1), (-mean / std).view(-1, 1, 1)
            self._scale = scale.expand(shape).contiguous(memory_format=self._memory_format)
            self._shift = shift.expand(shape).contiguous(memory_format=self._memory_format)

    @property
    def test_samples(self) -> int:
        return len(self._test_targets)

    def train_batch(self, indices: Tensor, crops: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs `[C, b, ...]` and targets `[C, b, ...]` of training samples `indices [C, b]`.

        Args:
            crops: `[C, b, 3]` rows and columns of the crop in the padded image, and whether to flip; None for none.
        """
        flat = indices.flatten()
        images = self._inputs.index_select(0, flat)
        if crops is not None:
            images = _crop_and_flip(images, crops.flatten(0, 1))
        inputs = self._prepare(images).unflatten(0, indices.shape)
        return inputs, self._targets[flat].long().unflatten(0, indices.shape)

    def test_batch(self, part: slice) -> tuple[Tensor, Tensor]:
        """Inputs `[b, ...]` and targets of test samples."""
        return self._prepare(self._test_inputs[part]), self._test_targets[part].long()

    def _prepare(self, raw: Tensor) -> Tensor:
        if self.kind != "image":
            return raw.long()
        images = raw.to(self.dtype, memory_format=self._memory_format)
        return torch.addcmul(self._shift, images, self._scale)

    def loss(
        self,
        forward: Callable[[Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        count: Tensor | float | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the samples of weight 1, a scalar.

        Args:
            forward: inputs `[b, ...]` to logits.
            targets: `[b, ...]` labels, or the quantiles at which to draw them from the softmax of the logits.
            weights: `[b]`, 1 or 0.
            count: the number of samples to divide by, where these are a piece of a mini-batch; None for theirs.
        """
        with self.autocast():
            logits = forward(inputs)
        if targets.is_floating_point():
            targets = sample_labels(logits.detach().to(self.dtype), targets)
        if weights is None and count is None:
            return F.cross_entropy(logits.flatten(0, -2).to(self.dtype), targets.flatten())
        losses = self._per_sample(logits, targets)
        total = (losses if weights is None else losses * weights).sum()
        if count is not None:
            return total / count
        assert weights is not None
        return total / weights.sum()

    def _per_sample(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, -2).to(self.dtype), targets.flatten(), reduction="none")
        return losses.view(targets.shape).flatten(1).mean(1) if targets.dim() > 1 else losses

    def evaluate(self, part: slice) -> Tensor:
        """What `scores` needs, summed over test samples `part`, in float64.

        `[loss, accuracy, samples]`, where a sequence counts as one sample, and the flat confusion matrix, of targets by
        predictions, where a metric is made of it.
        """
        inputs, targets = self.test_batch(part)
        with torch.no_grad(), self.autocast():
            logits = self.module(inputs)
        predicted = logits.argmax(-1)
        hits = (predicted == targets).double().view(len(targets), -1).mean(1)
        samples = torch.tensor(len(targets), dtype=torch.float64, device=self.device)
        sums = torch.stack([self._per_sample(logits, targets).sum(dtype=torch.float64), hits.sum(), samples])
        if not self._confused:
            return sums
        cells = torch.bincount((targets * self.classes + predicted).flatten(), minlength=self.classes**2)
        return torch.cat([sums, cells.double()])

    @property
    def _confused(self) -> bool:
        return any(SCORES[name].of_confusion for name in self.metrics)

    @property
    def n_sums(self) -> int:
        """Length of what `evaluate` returns."""
        return 3 + (self.classes**2 if self._confused else 0)

    @property
    def score_names(self) -> tuple[str, ...]:
        """The keys of `scores`."""
        return ("test_loss", "test_accuracy", *(f"test_{name}" for name in self.metrics))

    def scores(self, sums: Tensor) -> dict[str, float]:
        """The metrics of the whole test set, from the sum of `evaluate` over all of its parts."""
        loss, hits, samples = sums[:3].tolist()
        confusion = sums[3:].view(self.classes, self.classes).cpu().numpy() if self._confused else None
        values = [loss / samples, hits / samples]
        values += [SCORES[name].value(loss / samples, confusion) for name in self.metrics]
        return dict(zip(self.score_names, values, strict=True))

    def autocast(self) -> AbstractContextManager[object]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def sample_labels(logits: Tensor, quantiles: Tensor) -> Tensor:
    """Labels from the softmax of `logits [..., classes]`: the class at which its cumulative sum exceeds the quantile.

    Args:
        quantiles: `[...]` in [0, 1); uniform ones make class c as likely as the softmax does.

    Example:
        >>> sample_labels(torch.tensor([1.0, 3.0]).log().expand(3, 2), torch.tensor([0.0, 0.2, 0.3])).tolist()
        [0, 0, 1]
    """
    below = logits.softmax(-1).cumsum(-1) <= quantiles[..., None]
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)  # the sum may round to less than the quantile


def draw_crops(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random crop offsets in an image padded by `CROP_PADDING`, and flips: `[*shape, 3]`."""
    high = (2 * CROP_PADDING + 1, 2 * CROP_PADDING + 1, 2)
    return rng.integers(0, high, size=(*shape, 3), dtype=np.int64)


def _crop_and_flip(images: Tensor, crops: Tensor) -> Tensor:
    """Crop every image of `[n, c, h, w]` at its own offset of the zero-padded image, and flip where asked."""
    n, channels, height, width = images.shape
    padded = F.pad(images, (CROP_PADDING,) * 4)
    rows = crops[:, 0, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = crops[:, 1, None] + torch.where(crops[:, 2, None] == 1, columns.flip(0), columns)
    samples = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return padded[samples, channel, rows[:, None, :, None], columns[:, None, None, :]]
