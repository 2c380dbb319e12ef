"""The metrics of a project, read from its JSON files into what tables and figures are made from.

Differences between methods are paired by seed: both share the seed's head, examples and data order.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import DataError
from pipeline.reports.chains import ChainCell, chain_cell
from pipeline.reports.statistics import Scored, bootstrap_interval, mean, paired_p

MIN_SEEDS = 3  # fewer never tell two methods apart, whatever their differences
_METHODS = ("dense", "fish", "random", "bitfit", "magnitude", "head")
_AS_THEY_ARE = ("fetch", "score")
Name = tuple[str, str, str]  # task, method, setting
Record = TypeVar("Record", "Cell", "MaskRecord", ChainCell)


@dataclass(frozen=True)
class Cell(Scored):
    """One (task, method, setting) after training.

    Attributes:
        task: the task.
        method: the method.
        setting: the setting.
        metric: the name of the task's metric.
        lr: the learning rate, None where it is not recorded.
        density: updated / all parameters.
        nnz: updated parameters.
        parameters: all parameters.
        examples: examples the scores were computed from; None for methods without scores.
        data: rows per split, remark and digest of the data.
        scores: seed -> score; None for a seed without a finite one.
        diverged: the seeds marked as diverged.
        delta_bytes: the mean size of the delta file (coordinates, values and buffers).
        dense_bytes: the size of a dense checkpoint of the same model.
        curves: seed -> the metrics of each epoch.
    """

    task: str
    method: str
    setting: str
    metric: str
    lr: float | None
    density: float | None
    nnz: int | None
    parameters: int | None
    examples: int | None
    data: Mapping[str, Any]
    scores: Mapping[int, float | None]
    diverged: tuple[int, ...]
    delta_bytes: float | None
    dense_bytes: float | None
    curves: Mapping[int, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class MaskRecord:
    """One cell's masks: size on disk and chosen coordinates per layer, as means over its seeds.

    Attributes:
        task: the task.
        method: the method.
        setting: the setting.
        nnz: chosen coordinates.
        density: chosen / all.
        bytes: size of the mask file.
        examples: examples the scores were computed from, where recorded.
        digests: one per seed.
        chosen: tensor name -> chosen coordinates.
        sizes: tensor name -> all coordinates.
    """

    task: str
    method: str
    setting: str
    nnz: float
    density: float
    bytes: float
    examples: int | None
    digests: Mapping[int, str]
    chosen: Mapping[str, float]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Difference:
    """``method`` minus ``other`` on the seeds that both have.

    Attributes:
        task: the task.
        method: the method.
        other: what it is compared with.
        values: the difference of each common seed, in the metric's own unit.
    """

    task: str
    method: str
    other: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """The mean difference."""
        return mean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % bootstrap interval of the mean; None for fewer than two seeds."""
        return bootstrap_interval(self.values)

    @property
    def p(self) -> float | None:
        """Two-sided p of the paired t-test; None for fewer than two seeds or equal differences."""
        return paired_p(self.values)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below zero, else 0; always 0 for fewer than three seeds."""
        if self.interval is None or len(self.values) < MIN_SEEDS:
            return 0
        return (self.interval[0] > 0) - (self.interval[1] < 0)


@dataclass(frozen=True)
class Results:
    """Everything a report is made from.

    Attributes:
        cells: (task, method, setting) -> cell.
        masks: (task, method, setting) -> masks.
        records: stage -> cell's name -> the file's content, for the stages that are shown as they are.
        chains: (task, method, setting) -> cell of the checkpoint stage.
    """

    cells: Mapping[tuple[str, str, str], Cell]
    masks: Mapping[tuple[str, str, str], MaskRecord] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chains: Mapping[tuple[str, str, str], ChainCell] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The tasks, the one with the largest model first, then by name."""
        sizes: dict[str, int] = {}
        for cell in self.cells.values():
            sizes[cell.task] = max(sizes.get(cell.task, 0), cell.parameters or 0)
        return sorted(sizes, key=lambda task: (-sizes[task], task))

    @property
    def methods(self) -> list[str]:
        """The methods, in the paper's order, then by name."""
        return sorted({method for _, method, _ in self.cells}, key=method_order)

    @property
    def chain_tasks(self) -> list[str]:
        """The tasks of the checkpoint stage, by name."""
        return sorted({cell.task for cell in self.chains.values()})

    def main(self, task: str, method: str) -> Cell | None:
        """The cell of the main setting, None if it was not run."""
        return self.cells.get((task, method, "main"))

    def difference(self, task: str, method: str, other: str) -> Difference | None:
        """Pair two methods of the main setting by seed.

        Args:
            task: the task.
            method: the first method.
            other: the one that is subtracted.

        Returns:
            The difference; None where they have no seed in common.
        """
        one, two = self.main(task, method), self.main(task, other)
        if one is None or two is None:
            return None
        pairs = [(a, two.scores.get(seed)) for seed, a in one.scores.items()]
        values = tuple(a - b for a, b in pairs if a is not None and b is not None)
        return Difference(task, method, other, values) if values else None

    def best_sparse(self, task: str) -> str | None:
        """Name the sparse method that is told apart from every other one.

        Args:
            task: the task.

        Returns:
            The method whose paired difference to each other sparse method has an interval above zero; None where
            there is none, or nothing to compare with.
        """
        sparse = [m for m in self.methods if m != "dense" and (cell := self.main(task, m)) and cell.values]
        for method in sparse:
            differences = [self.difference(task, method, other) for other in sparse if other != method]
            if differences and all(d is not None and d.sign > 0 for d in differences):
                return method
        return None

    def sweep(self, task: str, method: str, axis: str) -> list[Cell]:
        """Collect the cells that differ from the main setting in one quantity only.

        Args:
            task: the task.
            method: the method.
            axis: ``density`` or ``examples``.

        Returns:
            The cells in ascending order of that quantity, the main setting included; empty where the main setting
            is the only one.
        """
        main = self.main(task, method)
        if main is None:
            return []
        other = "examples" if axis == "density" else "density"

        def same(a: float | None, b: float | None) -> bool:
            return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-3))

        cells = [
            cell
            for (t, m, _), cell in sorted(self.cells.items())
            if (t, m) == (task, method)
            and getattr(cell, axis) is not None
            and same(getattr(cell, other), getattr(main, other))
            and (cell is main or not same(getattr(cell, axis), getattr(main, axis)))
        ]
        return sorted(cells, key=lambda cell: getattr(cell, axis)) if len(cells) > 1 else []


def method_order(method: str) -> tuple[int, str]:
    """Sort key: the paper's order, then by name."""
    return (_METHODS.index(method) if method in _METHODS else len(_METHODS), method)


def load_results(
    metrics: Path,
    only: Collection[tuple[str, str, str]] | None = None,
    chains: Collection[tuple[str, str, str]] | None = None,
) -> Results:
    """Read the metrics files of a project.

    Args:
        metrics: the folder ``metrics/``, with one folder per stage and one JSON file per cell.
        only: the (task, method, setting) wanted; files of other cells, such as a former profile's, are left out.
            None: all that are there.
        chains: the same of the checkpoint stage.

    Returns:
        The results; what is not there is absent, nothing is filled in.

    Raises:
        DataError: if a file is no JSON or lacks a key; names both.
    """  # noqa: DOC502 - raised by what it calls
    masks = _records(metrics, "mask", "a mask", _mask, only)
    cells = _records(metrics, "train", "a training", lambda content: _cell(content, masks), only)
    found = _records(metrics, "checkpoint", "a chain of checkpoints", chain_cell, chains)
    records = {
        stage: {file.stem: content for file, content in _documents(metrics, stage)} for stage in _AS_THEY_ARE
    }
    return Results(cells, masks, records, found)


def _records(
    metrics: Path,
    stage: str,
    what: str,
    parse: Callable[[dict[str, Any]], Record],
    only: Collection[Name] | None,
) -> dict[Name, Record]:
    """Parse the metrics files of a stage: (task, method, setting) -> what each says."""
    records = {}
    for file, content in _documents(metrics, stage):
        try:
            record = parse(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{file}: not the metrics of {what}: {_cause(error)}; run its stage again") from None
        name = (record.task, record.method, record.setting)
        if only is None or name in only:
            records[name] = record
    return records


def _documents(metrics: Path, stage: str) -> Iterable[tuple[Path, dict[str, Any]]]:
    for file in sorted((metrics / stage).glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: not readable as JSON: {error}; run its stage again") from None
        if not isinstance(content, dict):
            raise DataError(
                f"{file}: expected a JSON object, found a {type(content).__name__}; run its stage again"
            )
        yield file, content


def _cause(error: Exception) -> str:
    return f"the key {error} is missing" if isinstance(error, KeyError) else str(error)


def _by_seed(content: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    return dict(sorted((int(seed), dict(values)) for seed, values in content["seeds"].items()))


def _cell(content: Mapping[str, Any], masks: Mapping[tuple[str, str, str], MaskRecord]) -> Cell:
    seeds = _by_seed(content)
    mask = masks.get((content["task"], content["method"], content["setting"]))

    def one(key: str) -> Any:
        """A quantity of the cell: recorded once, or with every seed."""
        return content.get(key, next((seed[key] for seed in seeds.values() if key in seed), None))

    def average(key: str) -> float | None:
        return mean([float(seed[key]) for seed in seeds.values() if seed.get(key) is not None])

    return Cell(
        task=content["task"],
        method=content["method"],
        setting=content["setting"],
        metric=content["metric"],
        lr=content.get("lr"),
        density=one("density"),
        nnz=one("nnz"),
        parameters=one("parameters"),
        examples=content.get("examples", mask.examples if mask else None),
        data=content.get("data") or {},
        scores={seed: _finite(values["metric"]) for seed, values in seeds.items()},
        diverged=tuple(seed for seed, values in seeds.items() if values.get("diverged")),
        delta_bytes=average("delta_bytes"),
        dense_bytes=average("dense_bytes"),
        curves={seed: values.get("epochs") or [] for seed, values in seeds.items()},
    )


def _mask(content: Mapping[str, Any]) -> MaskRecord:
    seeds = _by_seed(content)
    if not seeds:
        raise ValueError("it has no seed")
    layers = [values["layers"] for values in seeds.values()]
    return MaskRecord(
        task=content["task"],
        method=content["method"],
        setting=content["setting"],
        nnz=mean([values["nnz"] for values in seeds.values()]) or 0.0,
        density=mean([values["density"] for values in seeds.values()]) or 0.0,
        bytes=mean([values["bytes"] for values in seeds.values()]) or 0.0,
        examples=content.get("examples"),
        digests={seed: str(values["digest"]) for seed, values in seeds.items()},
        chosen={name: mean([layer[name]["count"] for layer in layers]) or 0.0 for name in layers[0]},
        sizes={name: int(layer["numel"]) for name, layer in layers[0].items()},
    )


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
