"""The trained cells and the masks of a project, as their metrics files tell them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.reports.statistics import Scored, mean


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
        mismatched: seed -> score on MNLI's second validation split, where there is one.
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
    mismatched: Mapping[int, float] = field(default_factory=dict)


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
        chosen: layer -> chosen coordinates.
        sizes: layer, in the model's order -> all coordinates.
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


def _by_seed(content: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    return dict(sorted((int(seed), dict(values)) for seed, values in content["seeds"].items()))


def cell_of(content: Mapping[str, Any], masks: Mapping[tuple[str, str, str], MaskRecord]) -> Cell:
    """Read a metrics file of the train stage; a key that is missing is a KeyError.

    Returns:
        The cell.
    """
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
        mismatched={seed: float(v["mismatched"]) for seed, v in seeds.items() if v.get("mismatched") is not None},
    )


def mask_of(content: Mapping[str, Any]) -> MaskRecord:
    """Read a metrics file of the mask stage; a key that is missing is a KeyError.

    Returns:
        The cell's masks.

    Raises:
        ValueError: if there is no seed.
    """
    seeds = _by_seed(content)
    if not seeds:
        raise ValueError("it has no seed")
    layers = [{layer["layer"]: layer for layer in values["layers"]} for values in seeds.values()]
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
