"""Metrics against their definitions, counted out by hand."""

import numpy as np
import pytest

from pipeline.errors import ParamsError
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


def test_every_metric_leads_with_its_own_name():
    for metric in sorted(set(METRICS) - set(COMPLETION)):  # these are counted where tokens are, in evaluation.py
        shape = (20, 1) if needs_regression(metric) else (20, 2)
        labels = np.arange(20) % 2
        scores = score(metric, np.random.default_rng(0).normal(size=shape), labels)
        assert metric in scores and all(isinstance(value, float) for value in scores.values())


def test_an_unknown_metric_names_the_known():
    with pytest.raises(ParamsError, match="metric: 'mcc' is unknown; expected one of accuracy, f1, matthews"):
        score("mcc", np.zeros((2, 2)), np.zeros(2))
