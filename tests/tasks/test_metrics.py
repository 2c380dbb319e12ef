"""Metrics against their definitions, counted out by hand."""

import numpy as np
import pytest
import torch

from pipeline.errors import ParamsError
from pipeline.losses import IGNORED
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.metrics import COMPLETION, METRICS, needs_regression, score


@pytest.fixture
def binary():
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(200, 2)), rng.integers(0, 2, 200)
    predicted = outputs.argmax(1)
    counts = {(p, y): int(((predicted == p) & (labels == y)).sum()) for p in (0, 1) for y in (0, 1)}
    return outputs, labels, counts


def test_classification_by_its_counts(binary):
    outputs, labels, n = binary
    tp, tn, fp, fn = n[1, 1], n[0, 0], n[1, 0], n[0, 1]
    accuracy = (tp + tn) / 200
    f1 = 2 * tp / (2 * tp + fp + fn)
    matthews = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert score("accuracy", outputs, labels) == {"accuracy": accuracy}
    assert score("f1", outputs, labels) == pytest.approx({"f1": f1, "accuracy": accuracy})
    assert score("matthews", outputs, labels) == pytest.approx({"matthews": matthews, "accuracy": accuracy})
    pair = {"accuracy_f1": (accuracy + f1) / 2, "accuracy": accuracy, "f1": f1}
    assert score("accuracy_f1", outputs, labels) == pytest.approx(pair)


def test_f1_of_more_classes_is_their_mean():
    outputs = np.eye(3)[[0, 0, 1, 2, 2]]
    assert score("f1", outputs, np.array([0, 1, 1, 2, 0]))["f1"] == pytest.approx((0.5 + 2 / 3 + 2 / 3) / 3)


def test_correlations_by_their_sums():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 6, 50).astype(np.float32)
    outputs = labels[:, None] + rng.normal(size=(50, 1))
    rank = np.array([[np.mean(np.flatnonzero(np.sort(v) == x)) for x in v] for v in (outputs[:, 0], labels)])
    expected = {"pearson": np.corrcoef(outputs[:, 0], labels)[0, 1], "spearman": np.corrcoef(*rank)[0, 1]}
    assert score("pearson", outputs, labels) == pytest.approx(expected)
    assert score("pearson_spearman", outputs, labels)["pearson_spearman"] == pytest.approx(
        sum(expected.values()) / 2
    )


def test_degenerate_outputs_score_nothing_and_do_not_warn():
    labels = np.arange(6.0)
    for outputs in (np.ones((6, 1)), np.full((6, 1), np.nan), np.array([[np.inf], [0], [1], [2], [3], [4]])):
        assert score("pearson_spearman", outputs, labels)["pearson_spearman"] == 0
    assert score("matthews", np.eye(2)[[0] * 4], np.array([0, 1, 0, 1]))["matthews"] == 0
    assert score("f1", np.eye(2)[[0] * 4], np.array([0, 1, 0, 1]))["f1"] == 0
    assert score("matthews", np.eye(2)[[1] * 4], np.ones(4, dtype=np.int64)) == {"matthews": 0, "accuracy": 1}


class Says(torch.nn.Module):
    """A model that puts out what it is given."""

    def forward(self, inputs):
        return inputs


def test_tokens_by_their_counts():
    rng = np.random.default_rng(2)
    outputs, labels = rng.normal(size=(7, 6, 5)).astype(np.float32), rng.integers(0, 5, (7, 6))
    labels[rng.random((7, 6)) < 0.4] = IGNORED
    labels[3] = IGNORED  # nothing is asked of it
    right, surprises, means = 0, [], []
    for row in range(7):
        own = []
        for position in range(1, 6):  # a token is judged by what is put out before it
            if (label := labels[row, position]) != IGNORED:
                said = outputs[row, position - 1].astype(np.float64)
                right += said.argmax() == label
                own.append(np.log(np.exp(said).sum()) - said[label])
        surprises += own
        means.append(np.mean(own) if own else 0.0)
    expected = {"token_accuracy": right / len(surprises), "perplexity": np.exp(np.mean(surprises))}
    assert 0 < right < len(surprises)
    for size in (1, 3, 7):
        batches = list(zip(*(torch.from_numpy(a).split(size) for a in (outputs, labels)), strict=True))
        scores = evaluate(Says(), batches, "token_accuracy", torch.device("cpu"))
        assert scores == pytest.approx(expected | {"loss": np.mean(means)}, rel=1e-6)


def test_every_metric_leads_with_its_own_name():
    for metric in METRICS:
        shape = (20, 3, 2) if metric in COMPLETION else (20, 1) if needs_regression(metric) else (20, 2)
        outputs = torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32))
        labels = torch.arange(20) % 2
        if metric in COMPLETION:
            labels = labels[:, None].expand(20, 3)
        batch = (outputs, labels.float() if needs_regression(metric) else labels)
        scores = evaluate(Says(), [batch], metric, torch.device("cpu"))
        assert list(scores)[0] == metric and list(scores)[-1] == "loss"
        assert all(isinstance(value, float) for value in scores.values())


def test_an_unknown_metric_names_the_known():
    with pytest.raises(ParamsError, match="metric: 'mcc' is unknown; expected one of accuracy, f1, matthews"):
        score("mcc", np.zeros((2, 2)), np.zeros(2))
