"""Metrics against scikit-learn and the standard library, over any division of the test set."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from adapters import adapter_engine, adapters_on_ranks
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef
from support import on_ranks, run_rounds
from torch import Tensor, nn

from fedkernels.data.datasets import Dataset
from fedkernels.federated.objective import Objective
from fedkernels.federated.scores import f1, matthews, perplexity

CPU = torch.device("cpu")


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_metrics_of_random_labels_are_those_of_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    for skew in (0.2, 1.0, 5.0):
        targets = rng.choice(classes, 200, p=rng.dirichlet([skew] * classes))
        predicted = np.where(rng.random(200) < 0.5, targets, rng.integers(0, classes, 200))
        confusion = confusion_matrix(targets, predicted, labels=range(classes))
        assert matthews(confusion) == pytest.approx(matthews_corrcoef(targets, predicted), abs=1e-12)
        if classes == 2:
            assert f1(confusion) == pytest.approx(f1_score(targets, predicted, zero_division=0), abs=1e-12)


def test_metrics_of_constant_labels() -> None:
    for confusion in ([[7, 0], [0, 0]], [[0, 7], [0, 0]], [[3, 0], [4, 0]], [[0, 0], [0, 5]]):
        targets, predicted = zip(*[(t, p) for t in (0, 1) for p in (0, 1) for _ in range(confusion[t][p])], strict=True)
        assert matthews(np.array(confusion)) == matthews_corrcoef(targets, predicted)
        assert f1(np.array(confusion)) == f1_score(targets, predicted, zero_division=0)
    assert perplexity(1e4) == math.inf
    assert perplexity(1.5) == pytest.approx(math.e**1.5)


class Table(nn.Module):
    """Logits by token, for a text those of its first one."""

    def __init__(self, classes: int, text: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, classes, dtype=torch.float64))
        self.text = text

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x[:, 0] if self.text else x]


@pytest.mark.parametrize("cuts", [[0, 37], [0, 1, 20, 37], list(range(38))])
def test_sums_over_any_shards_give_the_scores_of_the_whole(cuts: list[int]) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randint(9, (37, 4)), torch.randint(2, (37,))
    data = Dataset("text", inputs, targets, inputs, targets, 2, targets, None, metrics=("matthews", "f1"))
    objective = Objective(Table(2, text=True), data, CPU)
    parts = [objective.evaluate(slice(a, b)) for a, b in itertools.pairwise(cuts)]
    assert all(len(part) == objective.n_sums for part in parts)
    found = objective.scores(torch.stack(parts).sum(0))
    predicted = objective.module(inputs).argmax(1)
    assert tuple(found) == objective.score_names == ("test_loss", "test_accuracy", "test_matthews", "test_f1")
    assert found["test_accuracy"] == pytest.approx(accuracy_score(targets, predicted))
    assert found["test_matthews"] == pytest.approx(matthews_corrcoef(targets, predicted))
    assert found["test_f1"] == pytest.approx(f1_score(targets, predicted))
    # A mean of the metrics of parts would be something else.
    if len(cuts) == 4:
        means = [f1_score(targets[a:b], predicted[a:b]) for a, b in itertools.pairwise(cuts)]
        assert abs(statistics.mean(means) - found["test_f1"]) > 1e-3


def test_perplexity_is_the_inverse_geometric_mean_of_the_probabilities() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randint(9, (11, 6)), torch.randint(7, (11, 6))
    data = Dataset("language", inputs, targets, inputs, targets, 7, targets[:, 0], None, metrics=("perplexity",))
    objective = Objective(Table(7, text=False), data, CPU)
    found = objective.scores(objective.evaluate(slice(0, 4)) + objective.evaluate(slice(4, 11)))
    chances = objective.module(inputs).softmax(-1).gather(2, targets[..., None]).flatten().tolist()
    assert found["test_perplexity"] == pytest.approx(1 / statistics.geometric_mean(chances), rel=1e-12)


def test_scores_are_the_same_on_several_ranks() -> None:
    """Shares of 17, 17 and 16 samples."""
    engine = adapter_engine("roberta", "fedadamw")
    run_rounds(engine, 3)
    data = engine.objective
    measured = engine.evaluate()["test_matthews"]  # and the module has the server's parameters
    predicted = torch.cat([engine.objective.module(data.test_batch(slice(i, i + 1))[0]) for i in range(50)]).argmax(1)
    expected = matthews_corrcoef(data.test_batch(slice(0, 50))[1], predicted)
    assert abs(expected) > 0.01
    assert measured == pytest.approx(expected, abs=1e-12)
    for found in on_ranks(3, adapters_on_ranks):
        assert found["roberta", "fedadamw"]["rows"][-1]["test_matthews"] == pytest.approx(expected, abs=1e-12)
