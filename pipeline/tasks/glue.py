"""GLUE (Wang et al. 2018, arXiv 1804.07461): its tasks in the column names and labels of ``nyu-mll/glue``."""

from typing import Any

from pipeline.errors import ParamsError
from pipeline.tasks.published import Published

_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")
_SEE = "see gluebenchmark.com; research use, not redistribution"


def _task(
    name: str, text: tuple[str, ...], classes: tuple[str, ...], rows: int, metric: str, licence: str = _SEE
) -> Published:
    return Published("text", f"nyu-mll/glue:{name}", text, "label", metric, classes, rows, licence)


TASKS = {
    "cola": _task(
        "cola", ("sentence",), ("unacceptable", "acceptable"), 8551, "matthews", "fair use; research use"
    ),
    "sst2": _task("sst2", ("sentence",), ("negative", "positive"), 67349, "accuracy"),
    "mrpc": _task(
        "mrpc",
        _PAIR,
        ("not_equivalent", "equivalent"),
        3668,
        "accuracy_f1",
        "Microsoft Shared Source; research use",
    ),
    "qqp": _task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), 363846, "accuracy_f1"),
    "stsb": _task("stsb", _PAIR, (), 5749, "pearson_spearman", "scores CC BY-SA 4.0"),
    "mnli": _task(
        "mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), 392702, "accuracy"
    ),
    "qnli": _task("qnli", ("question", "sentence"), _ENTAILS, 104743, "accuracy", "text CC BY-SA 4.0"),
    "rte": _task("rte", _PAIR, _ENTAILS, 2490, "accuracy"),
    "wnli": _task("wnli", _PAIR, ("not_entailment", "entailment"), 635, "accuracy"),
}


def defaults(task: str) -> dict[str, Any]:
    """The part of ``tasks.<task>`` in params.yaml that follows from the data set.

    Returns:
        ``kind``, ``data`` and ``metric``.

    Raises:
        ParamsError: if GLUE has no such task.
    """
    if task not in TASKS:
        raise ParamsError(f"GLUE has no task '{task}'; expected one of {', '.join(TASKS)}")
    return TASKS[task].defaults()
