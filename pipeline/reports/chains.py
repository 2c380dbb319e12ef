"""The cells of Table 4 as their metrics files tell them: runs whose every epoch is a step of a chain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.reports.statistics import Scored, mean

PARTS = ("coordinates", "values", "buffers", "header")


@dataclass(frozen=True)
class ChainCell(Scored):
    """One (task, method, setting) of the checkpoint stage; bytes are means over all checkpoints of all seeds.

    Attributes:
        task: the task.
        method: the method.
        setting: the setting.
        metric: the name of the task's metric.
        lr: the learning rate.
        weight_decay: its strength.
        leak: whether it reached the frozen values.
        every: epochs between two masks; None for a fixed one.
        density: trained at a time / all parameters.
        data: rows per split, remark and digest of the data.
        scores: seed -> score of the last checkpoint; None for a seed that diverged.
        checkpoints: all that were taken, each restored and compared bit for bit.
        parts: what a checkpoint's bytes are made of.
        dense_bytes: parameters and buffers of one state.
        epochs: seed -> what each epoch's checkpoint says.
    """

    task: str
    method: str
    setting: str
    metric: str
    lr: float
    weight_decay: float
    leak: bool
    every: int | None
    density: float
    data: Mapping[str, Any]
    scores: Mapping[int, float | None]
    checkpoints: int
    parts: Mapping[str, float]
    dense_bytes: float | None
    epochs: Mapping[int, Sequence[Mapping[str, Any]]]

    @property
    def checkpoint_bytes(self) -> float | None:
        """Mean bytes of a checkpoint; None without one."""
        return sum(self.parts.values()) if self.parts else None

    @property
    def mask(self) -> str:
        """``fixed``, or how often the mask was chosen anew."""
        if self.every is None:
            return "fixed"
        return "every epoch" if self.every == 1 else f"every {self.every} epochs"

    def decay(self) -> list[tuple[float, float]]:
        """How the frozen values and the score went together, epoch by epoch, as means over seeds.

        Returns:
            (‖frozen now‖ / ‖frozen at the start‖, score); empty where the mask is not fixed.
        """
        rows: dict[int, list[tuple[float, float]]] = {}
        for epochs in self.epochs.values():
            for row in epochs:
                if "frozen_norm" in row and self.metric in row:
                    rows.setdefault(int(row["epoch"]), []).append((row["frozen_norm"], row[self.metric]))
        columns = [list(zip(*pairs, strict=True)) for _, pairs in sorted(rows.items())]
        return [(mean(norms) or 0.0, mean(scores) or 0.0) for norms, scores in columns]


def chain_cell(content: Mapping[str, Any]) -> ChainCell:
    """Read a metrics file of the checkpoint stage; a key that is missing is a KeyError.

    Returns:
        The cell.
    """
    seeds: dict[int, dict[str, Any]] = dict(sorted((int(s), dict(v)) for s, v in content["seeds"].items()))
    rows = [row for values in seeds.values() for row in values["epochs"]]
    sizes = [float(values["dense_bytes"]) for values in seeds.values() if "dense_bytes" in values]
    return ChainCell(
        task=content["task"],
        method=content["method"],
        setting=content["setting"],
        metric=content["metric"],
        lr=content["lr"],
        weight_decay=content["weight_decay"],
        leak=content["weight_decay_scope"] == "all",
        every=content["every"],
        density=mean([values["density"] for values in seeds.values()]) or 0.0,
        data=content.get("data") or {},
        scores={seed: values["metric"] for seed, values in seeds.items()},
        checkpoints=len(rows),
        parts={part: mean([row["bytes"][part] for row in rows]) or 0.0 for part in PARTS} if rows else {},
        dense_bytes=mean(sizes),
        epochs={seed: values["epochs"] for seed, values in seeds.items()},
    )
