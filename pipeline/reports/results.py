"""What a report is made from: the cells of every stage, and how they are compared.

Differences between methods are paired by seed: both share the seed's head, examples and data order.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.reports.cells import Cell, MaskRecord
from pipeline.reports.chains import ChainCell
from pipeline.reports.shares import ShareCell
from pipeline.reports.statistics import bootstrap_interval, mean, paired_p

MIN_SEEDS = 3  # fewer never tell two methods apart, whatever their differences
_METHODS = (
    "dense", "fish", "random", "bitfit", "magnitude", "head", "lora", "shira", "deviation", "diff-pruning",
)  # fmt: skip


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
        shares: (task, method, setting) -> cell of the distribute stage.
    """

    cells: Mapping[tuple[str, str, str], Cell]
    masks: Mapping[tuple[str, str, str], MaskRecord] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chains: Mapping[tuple[str, str, str], ChainCell] = field(default_factory=dict)
    shares: Mapping[tuple[str, str, str], ShareCell] = field(default_factory=dict)

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

    @property
    def share_tasks(self) -> list[str]:
        """The tasks of the distribute stage, by name."""
        return sorted({cell.task for cell in self.shares.values()})

    def at(self, setting: str) -> list[Cell]:
        """The trained cells of a setting."""
        return [cell for cell in self.cells.values() if cell.setting == setting]

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
    base = method if method in _METHODS else method.partition("-")[0]  # variants stand behind their method
    return (_METHODS.index(base) if base in _METHODS else len(_METHODS), method)
