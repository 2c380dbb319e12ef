"""What the authors' own code logged, beside our numbers: comparable where model and data are the same.

``reference.csv`` holds figures parsed from the logs that the authors of "Training Neural Networks with Fixed
Sparse Masks" (Sung, Nair, Raffel, NeurIPS 2021) published beside their code; its last column names file and run.
Table 2: GLUE validation scores of BERT-large (whole-word masking), seed 0 (means of a task's two metrics, or of
MNLI's two splits). Tables 3 and 4: CIFAR-10 top-1 of preliminary ResNet-9 runs, not of the paper's ResNet-34.
"""

import csv
from collections.abc import Collection
from importlib.resources import files

from pipeline.reports.table import MISSING, Entry, Table, percent

_WHOSE = {
    "2": "GLUE validation scores x 100 of BERT-large (whole-word masking), two workers that each saw all of the "
    "data (shard: false), 3.5 epochs, one seed.",
    "3": "CIFAR-10 test accuracy of preliminary ResNet-9 runs, 50 epochs, two workers that each saw all of the "
    "data, one seed. Not comparable with ResNet-34: another model, and a simulation that sent nothing.",
    "4": "CIFAR-10 test accuracy of preliminary ResNet-9 runs, 100 epochs, one seed. Not comparable with "
    "ResNet-34: another model; weight decay and momentum reached the frozen weights, rates were chosen on the "
    "test split.",
}

_ALIKE = " Comparable with rows above on the same task, of that model, whose workers see all of the data."
_APART = " Not comparable with the rows above: other tasks and another model."


def reference_rows() -> list[dict[str, str]]:
    """The rows of ``reference.csv``."""
    text = files("pipeline.reports").joinpath("reference.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def reference_table(number: str, tasks: Collection[str] = ()) -> Table:
    """What the first implementation logged for one of the paper's tables.

    Args:
        number: ``2``, ``3`` or ``4``.
        tasks: show these tasks' own rows; where none of them is there, means over the tasks that have all rows.

    Returns:
        The table; its csv has every row, with the run it comes from.
    """
    found = [row for row in reference_rows() if row["table"] == number]
    same = [row for row in found if row["task"] in tasks] if number == "2" else []
    shown = same or (_averaged(found) if number == "2" else found)
    rows = tuple(
        tuple(
            map(
                Entry,
                (
                    row["task"],
                    row["method"],
                    row["mask"] or MISSING,
                    row["merge"] or MISSING,
                    percent(float(row["density"])),
                    row["local_steps"] or row["lr"] or MISSING,
                    f"{100 * float(row['score']):.1f}",
                ),
            )
        )
        for row in shown
    )
    last = "lr" if number == "4" else "local steps"
    columns = ("task", "method", "mask", "merge", "density", last, "score")
    fit = "comparable on the same task and model" if same else "not comparable with the rows above"
    title = f"First implementation, logged (Table {number}): {fit}"
    why = _WHOSE[number] + (_ALIKE if same else _APART if number == "2" else "")
    return Table(f"reference-table{number}", title, columns, rows, tuple(found), (why,), words=4)


def _averaged(found: list[dict[str, str]]) -> list[dict[str, str]]:
    """Macro averages of each kind of run over the tasks, for kinds that every task has."""
    tasks = {row["task"] for row in found}
    kinds: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in found:
        kind = tuple(row[key] for key in ("method", "mask", "merge", "density", "local_steps"))
        kinds.setdefault(kind, {})[row["task"]] = row
    return [
        next(iter(of.values()))
        | {
            "task": f"mean of {len(tasks)}",
            "score": str(sum(float(row["score"]) for row in of.values()) / len(of)),
        }
        for of in kinds.values()
        if of.keys() == tasks
    ]
