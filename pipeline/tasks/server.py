"""Test predictions as the GLUE server takes them: one TSV a task, ``index`` and ``prediction``.

Source: gluebenchmark.com, "Submission": file names, and labels by name for RTE, QNLI and MNLI, numbers elsewhere;
STS-B as a number in 0..5.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.errors import ParamsError
from pipeline.files import write_bytes
from pipeline.losses import outputs_of
from pipeline.tasks.base import Task
from pipeline.tasks.glue import TASKS

FILES = {
    "cola": {"test": "CoLA.tsv"},
    "sst2": {"test": "SST-2.tsv"},
    "mrpc": {"test": "MRPC.tsv"},
    "stsb": {"test": "STS-B.tsv"},
    "mnli": {"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
    "qnli": {"test": "QNLI.tsv"},
    "qqp": {"test": "QQP.tsv"},
    "rte": {"test": "RTE.tsv"},
    "wnli": {"test": "WNLI.tsv"},
}
"""GLUE task -> split -> the server's file."""

_BY_NAME = {"qnli", "rte", "mnli"}
_MOST = 5.0  # the largest similarity of STS-B


def outputs(task: Task, model: nn.Module, split: str, batch_size: int) -> np.ndarray:
    """Run a model over a split, labelled or not, in the split's own order.

    Args:
        task: the data.
        model: on its device, in eval mode.
        split: its name.
        batch_size: examples per batch.

    Returns:
        fp32 [N, C] logits, or [N, 1] numbers.
    """
    where = next(model.parameters()).device
    batches = task.ordered(split, batch_size, where)
    with torch.inference_mode():
        made = [outputs_of(model, batch).float().cpu() for batch in batches]
    found = torch.cat(made).reshape(len(batches.rows), -1).numpy()
    placed = np.empty_like(found)
    placed[batches.rows] = found
    return placed


def write_predictions(task: Task, model: nn.Module, glue: str, folder: Path, batch_size: int) -> list[Path]:
    """Write the server's files of one task.

    Args:
        task: fetched with its test split.
        model: trained, on its device.
        glue: the task's name in GLUE.
        folder: where to; it must be there.
        batch_size: examples per batch.

    Returns:
        The files.

    Raises:
        ParamsError: if GLUE has no such task or other labels, or no test split was fetched.
    """
    if glue not in FILES:
        raise ParamsError(f"GLUE's server knows no task '{glue}'; expected one of {', '.join(FILES)}")
    splits = [split for split in FILES[glue] if split in task.sizes]
    if "test" not in splits:
        raise ParamsError(
            f"task '{task.name}' was fetched without a test split; the server scores {FILES[glue]['test']}. "
            "Its source must hold test.parquet, as the hub's does"
        )
    names = _names(task, glue)
    files = []
    for split in splits:
        part = task.manifest["splits"][split]
        if part["rows"] < part["of"]:
            raise ParamsError(
                f"tasks.{task.name}.data.limit keeps {part['rows']} of {part['of']} rows of {split}; "
                "the server wants all of them"
            )
        found = outputs(task, model, split, batch_size)
        if names:
            words = [names[label] for label in found.argmax(axis=1)]
        else:
            words = [f"{value:.3f}" for value in np.clip(found[:, 0], 0.0, _MOST)]
        lines = ["index\tprediction", *(f"{index}\t{word}" for index, word in enumerate(words))]
        files.append(folder / FILES[glue][split])
        write_bytes(files[-1], ("\n".join(lines) + "\n").encode())
    return files


def _names(task: Task, glue: str) -> list[str]:
    """What the server calls each class of a task, whose files may name the classes, number them or sort them.

    Returns:
        Its name or its number in GLUE; empty for numbers from 0 to 5.

    Raises:
        ParamsError: if its labels are not that task's.
    """
    known, own = list(TASKS[glue].classes), list(task.classes or [])
    called = known if own == [str(number) for number in range(len(known))] else own
    if sorted(called) != sorted(known):
        told = {name: ", ".join(names) or "numbers" for name, names in (("own", own), ("known", known))}
        raise ParamsError(f"tasks.{task.name}: its labels are {told['own']}; those of {glue} are {told['known']}")
    return called if glue in _BY_NAME else [str(known.index(name)) for name in called]
