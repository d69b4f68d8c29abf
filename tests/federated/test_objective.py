"""Batches, losses and augmentation against per-image loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import CLASSES, run_rounds, tiny_data, tiny_engine, tiny_model
from torch import Tensor, nn

from fedkernels.algorithms import FedAvg, Scaffold
from fedkernels.data.datasets import Dataset
from fedkernels.federated.objective import CROP_PADDING, Objective, draw_crops

CPU = torch.device("cpu")


def images(augment: bool = False) -> Dataset:
    """Six uint8 images `[3, 5, 4]`, rectangular so that sides cannot be swapped."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (6, 3, 5, 4)).astype(np.uint8))
    targets = torch.arange(6) % CLASSES
    mean, std = (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)
    return Dataset("image", pixels, targets, pixels[:4], targets[:4], CLASSES, targets, None, mean, std, augment)


def prepared(image: Tensor, data: Dataset) -> Tensor:
    """`(pixel / 255 - mean) / std`, channel by channel."""
    channels = zip(image, data.mean, data.std, strict=True)
    return torch.stack([(channel.double() / 255 - mean) / std for channel, mean, std in channels])


def linear(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(60, CLASSES)).to(dtype)


@pytest.mark.parametrize("module", [linear(), nn.Conv2d(3, 2, 3).double(), nn.Conv2d(3, 2, 2, stride=2).double()])
def test_images_are_normalised(module: nn.Module) -> None:
    data = images()
    objective = Objective(module, data, CPU)
    indices = torch.tensor([[0, 5], [3, 3], [1, 2]])
    inputs, targets = objective.train_batch(indices, None)
    assert (inputs.shape, inputs.dtype, targets.dtype) == ((3, 2, 3, 5, 4), torch.float64, torch.int64)
    for c, k in np.ndindex(3, 2):
        i = int(indices[c, k])
        torch.testing.assert_close(inputs[c, k], prepared(data.train_inputs[i], data), rtol=1e-13, atol=1e-13)
        assert targets[c, k] == data.train_targets[i]
    inputs, targets = objective.test_batch(slice(1, 3))
    torch.testing.assert_close(inputs[0], prepared(data.test_inputs[1], data), rtol=1e-13, atol=1e-13)
    assert targets.tolist() == data.test_targets[1:3].tolist()


def test_convolutions_get_channels_last() -> None:
    for module, channels_last in ((nn.Conv2d(3, 2, 3), True), (nn.Conv2d(3, 2, 2, stride=2), False), (linear(), False)):
        inputs, _ = Objective(module, images(), CPU).train_batch(torch.tensor([[0, 1]]), None)
        assert inputs[0].is_contiguous(memory_format=torch.channels_last) == channels_last


def test_crops_and_flips() -> None:
    """Every image on its own: a window of the zero-padded uint8 image, mirrored or not, then normalised."""
    data = images(augment=True)
    objective = Objective(linear(), data, CPU)
    crops = torch.tensor([[top, left, flip] for top in (0, 3, 4, 8) for left in (0, 4, 8) for flip in (0, 1)])
    indices = torch.arange(len(crops)).view(2, -1) % 6
    inputs, _ = objective.train_batch(indices, crops.view(2, -1, 3))
    for index, (top, left, flip), found in zip(indices.flatten(), crops, inputs.flatten(0, 1), strict=True):
        image = data.train_inputs[index]
        window = torch.zeros_like(image)
        for row, column in np.ndindex(5, 4):
            y = row + int(top) - CROP_PADDING
            x = (3 - column if flip else column) + int(left) - CROP_PADDING
            if 0 <= y < 5 and 0 <= x < 4:
                window[:, row, column] = image[:, y, x]
        torch.testing.assert_close(found, prepared(window, data), rtol=1e-13, atol=1e-13)


def test_crops_are_uniform() -> None:
    crops = draw_crops(np.random.default_rng(0), (90, 100))
    assert crops.shape == (90, 100, 3)
    for axis, values in enumerate((9, 9, 2)):
        counts = np.bincount(crops[..., axis].flatten(), minlength=values)
        assert len(counts) == values
        assert np.abs(counts - 9000 / values).max() < 5 * math.sqrt(9000 / values)


def test_augmentation_is_for_training_alone() -> None:
    plain, augmented = Objective(linear(), images(), CPU), Objective(linear(), images(augment=True), CPU)
    assert torch.equal(plain.test_batch(slice(0, 4))[0], augmented.test_batch(slice(0, 4))[0])
    engine = tiny_engine(FedAvg())
    engine.objective.augment = True
    first, again, other = (next(engine.batches.draw([3], r)).inputs for r in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def cross_entropy(logits: Tensor, target: int) -> float:
    weights = [math.exp(v) for v in logits.tolist()]
    return -math.log(weights[target] / sum(weights))


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
def test_the_loss_is_the_mean_over_samples(weights: list[float] | None) -> None:
    objective = Objective(linear(), images(), CPU)
    inputs, targets = objective.train_batch(torch.tensor([[0, 1, 2, 3]]), None)
    logits = objective.module(inputs[0])
    each = [cross_entropy(row, int(t)) for row, t in zip(logits, targets[0], strict=True)]
    chosen = [loss for loss, w in zip(each, weights or [1.0] * 4, strict=True) if w]
    found = objective.loss(objective.module, inputs[0], targets[0], None if weights is None else torch.tensor(weights))
    assert found.item() == pytest.approx(sum(chosen) / len(chosen), rel=1e-12)


class NextToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, CLASSES, generator=torch.Generator().manual_seed(0)).double())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def language() -> Objective:
    rng = np.random.default_rng(1)
    tokens = torch.from_numpy(rng.integers(0, 7, (5, 6)).astype(np.uint8))
    targets = torch.from_numpy(rng.integers(0, CLASSES, (5, 6)))
    data = Dataset("language", tokens, targets, tokens, targets, CLASSES, targets[:, 0], None)
    return Objective(NextToken(), data, CPU)


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 1.0]])
def test_the_loss_of_a_sequence_is_the_mean_over_tokens(weights: list[float] | None) -> None:
    objective = language()
    inputs, targets = objective.train_batch(torch.tensor([[4, 0, 2]]), None)
    assert inputs.dtype == torch.int64
    each = [
        sum(cross_entropy(row, int(t)) for row, t in zip(objective.module(sequence), target, strict=True)) / 6
        for sequence, target in zip(inputs[0], targets[0], strict=True)
    ]
    chosen = [loss for loss, w in zip(each, weights or [1.0] * 3, strict=True) if w]
    found = objective.loss(objective.module, inputs[0], targets[0], None if weights is None else torch.tensor(weights))
    assert found.item() == pytest.approx(sum(chosen) / len(chosen), rel=1e-12)


@pytest.mark.parametrize("objective", [Objective(linear(), images(), CPU), language()], ids=["images", "sequences"])
def test_evaluation_sums_over_samples(objective: Objective) -> None:
    inputs, targets = objective.test_batch(slice(1, 4))
    logits = objective.module(inputs)
    loss = hits = 0.0
    for sample in range(3):
        rows, wanted = logits[sample].reshape(-1, CLASSES), targets[sample].reshape(-1).tolist()
        loss += sum(cross_entropy(row, t) for row, t in zip(rows, wanted, strict=True)) / len(wanted)
        hits += sum(int(row.argmax()) == t for row, t in zip(rows, wanted, strict=True)) / len(wanted)
    assert objective.evaluate(slice(1, 4)).tolist() == pytest.approx([loss, hits, 3.0], rel=1e-12)


@pytest.mark.parametrize("algorithm", [FedAvg(server_momentum=0.5), Scaffold()])
@pytest.mark.parametrize("evaluator", ["loop", "batched"])
def test_bf16_computes_under_autocast_and_keeps_float32_vectors(algorithm: FedAvg | Scaffold, evaluator: str) -> None:
    def module() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, CLASSES))

    runs = {}
    for precision in ("fp32", "bf16"):
        engine = tiny_engine(algorithm, module=module(), dtype=torch.float32, evaluator=evaluator, lr=0.3)
        start = engine.server.x.clone()
        engine.objective.precision = precision
        seen = []
        engine.objective.module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.dtype))
        state, _ = run_rounds(engine, 2)
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        runs[precision] = state["x"]
    update = (runs["fp32"] - start).norm()
    # Products are rounded to 8 bits; the update keeps its direction, and small steps are not lost in a bf16 sum.
    assert 1e-5 * update < (runs["bf16"] - runs["fp32"]).norm() < 0.05 * update


def test_the_test_set_is_shared_out_in_batches() -> None:
    """Test loss and accuracy of the engine equal torch's on the whole set."""
    engine = tiny_engine(FedAvg(), lr=0.5)
    engine.run_round()
    model = tiny_model()
    model.load_state_dict(engine.named_parameters())
    data = tiny_data()
    logits = model(torch.stack([prepared(image, data) for image in data.test_inputs]))
    found = engine.evaluate()
    assert found["test_loss"] == pytest.approx(F.cross_entropy(logits, data.test_targets).item(), rel=1e-12)
    assert found["test_accuracy"] == pytest.approx((logits.argmax(1) == data.test_targets).double().mean().item())
