"""How a task is scored, by scikit-learn and scipy.

``accuracy_f1`` and ``pearson_spearman`` are GLUE's pairs: their value is the mean of the two. ``token_accuracy``,
of language models, is the share of a completion's tokens that are the likeliest one given those before them.
"""

import numpy as np

from pipeline.errors import ParamsError

CLASSIFICATION: dict[str, tuple[str, ...]] = {
    "accuracy": ("accuracy",),
    "f1": ("f1", "accuracy"),
    "matthews": ("matthews", "accuracy"),
    "accuracy_f1": ("accuracy", "f1"),
}
REGRESSION: dict[str, tuple[str, ...]] = {
    "pearson": ("pearson", "spearman"),
    "spearman": ("spearman", "pearson"),
    "pearson_spearman": ("pearson", "spearman"),
}
COMPLETION: dict[str, tuple[str, ...]] = {"token_accuracy": ("token_accuracy", "perplexity")}
METRICS = (*CLASSIFICATION, *REGRESSION, *COMPLETION)
OBJECTIVES = {"classification": CLASSIFICATION, "regression": REGRESSION, "completion": COMPLETION}


def objective_of(metric: str) -> str:
    """Tell what a metric judges.

    Returns:
        ``classification``, ``regression`` or ``completion``.

    Raises:
        ParamsError: if there is no such metric.
    """
    if metric not in METRICS:
        raise ParamsError(f"metric: '{metric}' is unknown; expected one of {', '.join(METRICS)}")
    return next(objective for objective, known in OBJECTIVES.items() if metric in known)


def needs_regression(metric: str) -> bool:
    """Tell what a metric compares: numbers, or classes.

    Returns:
        True for numbers. A ParamsError if there is no such metric.
    """
    return objective_of(metric) == "regression"


def score(metric: str, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score a model's outputs.

    ``f1`` is that of class 1 where there are two classes, and the mean over classes of more. ``matthews`` of one
    predicted class, and the correlations of constant or non-finite outputs, are 0.

    Args:
        metric: one for classes or numbers (``token_accuracy`` is counted in ``evaluation``).
        outputs: [N, C] logits; [N] or [N, 1] for regression.
        labels: [N] int64 classes, or floats.

    Returns:
        ``metric``, and what else is usually shown beside it.
    """
    if needs_regression(metric):
        parts = _correlations(outputs.reshape(-1).astype(np.float64), labels.astype(np.float64))
        names = REGRESSION[metric]
    else:
        parts = _agreements(outputs.argmax(axis=1), labels, outputs.shape[1], CLASSIFICATION[metric])
        names = CLASSIFICATION[metric]
    scores = {name: parts[name] for name in names}
    return scores if metric in scores else {metric: float(np.mean(list(scores.values())))} | scores


def _correlations(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    if not np.isfinite(predicted).all() or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, labels).statistic),
        "spearman": float(spearmanr(predicted, labels).statistic),
    }


def _agreements(
    predicted: np.ndarray, labels: np.ndarray, classes: int, names: tuple[str, ...]
) -> dict[str, float]:
    parts = {"accuracy": float(np.mean(predicted == labels))}
    if "f1" in names:
        from sklearn.metrics import f1_score

        average = "binary" if classes == 2 else "macro"
        parts["f1"] = float(f1_score(labels, predicted, average=average, zero_division=0))
    if "matthews" in names:
        from sklearn.metrics import matthews_corrcoef

        varied = len(np.union1d(labels, predicted)) > 1  # of a single label scikit-learn warns
        parts["matthews"] = float(matthews_corrcoef(labels, predicted)) if varied else 0.0
    return parts
