"""The cells of Tables 2 and 3 as their metrics files tell them: runs whose workers exchange what they trained."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.reports.statistics import Scored, mean, spread


@dataclass(frozen=True)
class Point:
    """A merge that was scored, over the seeds.

    Attributes:
        sent: bytes handed to collectives by all workers so far, mean over seeds.
        score: mean.
        spread: sample standard deviation; None for a single seed.
    """

    sent: float
    score: float
    spread: float | None


@dataclass(frozen=True)
class ShareCell(Scored):
    """One (task, method, setting) of the distribute stage; bytes are those of all workers, means over seeds.

    Attributes:
        task: the task.
        method: the method.
        setting: the setting.
        kind: ``text`` or ``image``.
        metric: the name of the task's metric.
        lr: the learning rate.
        own_rate: whether the setting has that rate for the method; else it is the method's of one worker.
        epochs: passes of each worker over its data.
        workers: how many.
        every: local steps between merges; 0 where the gradient is averaged at every step.
        average: ``mean`` or ``sum``.
        own_masks: every worker had a mask of its own.
        shard: every worker had a part of the data.
        warmup: dense epochs before the masks were chosen.
        density: trained by one worker at a time / all parameters.
        data: rows per split, remark and digest of the data.
        scores: seed -> score after the last merge; None for a seed that diverged.
        merges: seed -> the records of its merges.
        sent: purpose -> bytes.
        dense_bytes: parameters and buffers of one state.
    """

    task: str
    method: str
    setting: str
    kind: str
    metric: str
    lr: float
    own_rate: bool
    epochs: int
    workers: int
    every: int
    average: str
    own_masks: bool
    shard: bool
    warmup: int
    density: float
    data: Mapping[str, Any]
    scores: Mapping[int, float | None]
    merges: Mapping[int, Sequence[Mapping[str, float]]]
    sent: Mapping[str, float]
    dense_bytes: float | None

    @property
    def total(self) -> float:
        """Bytes sent, for all purposes."""
        return math.fsum(self.sent.values())

    @property
    def mask(self) -> str:
        """``own`` or ``shared``; empty where all parameters are trained, or there is one worker."""
        if self.method == "dense" or self.workers == 1:
            return ""
        return "own" if self.own_masks else "shared"

    @property
    def merge(self) -> str:
        """How workers come together."""
        if self.workers == 1:
            return "one worker"
        return "every gradient" if self.every == 0 else self.average

    @property
    def count(self) -> float:
        """Merges of a run."""
        return mean([float(len(rows)) for rows in self.merges.values()]) or 0.0

    @property
    def drift(self) -> float | None:
        """Mean over merges and seeds of the workers' distance from their mean."""
        return mean([row["drift"] for rows in self.merges.values() for row in rows if "drift" in row])

    def curve(self) -> list[Point]:
        """The scored merges, in order; those that every finished seed has."""
        finished = [rows for seed, rows in self.merges.items() if self.scores.get(seed) is not None]
        scored = [[row for row in rows if self.metric in row] for rows in finished]
        return [
            Point(
                mean([row["bytes"] for row in rows]) or 0.0,
                mean([row[self.metric] for row in rows]) or 0.0,
                spread([row[self.metric] for row in rows]),
            )
            for rows in zip(*scored, strict=False)
        ]

    def bytes_to(self, target: float) -> float | None:
        """Bytes sent until a score was reached; None unless every seed reached it."""
        reached = [
            next((row["bytes"] for row in rows if row.get(self.metric, -math.inf) >= target), None)
            for rows in self.merges.values()
        ]
        return (
            mean([sent for sent in reached if sent is not None]) if all(s is not None for s in reached) else None
        )


def share_cell(content: Mapping[str, Any]) -> ShareCell:
    """Read a metrics file of the distribute stage; a key that is missing is a KeyError.

    Returns:
        The cell.
    """
    seeds: dict[int, dict[str, Any]] = dict(sorted((int(s), dict(v)) for s, v in content["seeds"].items()))
    setting = content["params"][f"distribute.{content['setting']}"]
    sent = [values["bytes"] for values in seeds.values() if "bytes" in values]
    return ShareCell(
        task=content["task"],
        method=content["method"],
        setting=content["setting"],
        kind=content["kind"],
        metric=content["metric"],
        lr=content["lr"],
        own_rate=content["method"] in (setting["lr"] or {}),
        epochs=setting["epochs"] or content["params"][f"tasks.{content['task']}.train"]["epochs"],
        **{key: setting[key] for key in ("workers", "every", "average", "own_masks", "shard", "warmup")},
        density=mean([values["density"] for values in seeds.values() if "density" in values]) or 0.0,
        data=content.get("data") or {},
        scores={seed: values["metric"] for seed, values in seeds.items()},
        merges={seed: values.get("merges") or [] for seed, values in seeds.items()},
        sent={key: mean([of.get(key, 0) for of in sent]) or 0.0 for key in sorted({k for of in sent for k in of})},
        dense_bytes=mean([float(values["dense_bytes"]) for values in seeds.values() if "dense_bytes" in values]),
    )
