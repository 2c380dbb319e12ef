"""The sections of params.yaml as frozen, strict models; ``pipeline.params`` reads and checks the whole file."""

import re
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import ParamsError, unknown


def _name(name: str) -> str:
    if not re.fullmatch(r"\w[\w-]*", name):
        raise ValueError(
            f"'{name}' is part of keys, stages and folders; expected letters, digits, '-' and '_' alone"
        )
    return name


Name = Annotated[str, AfterValidator(_name)]
"""Of a task, method or setting: DVC takes what stands behind a dot for another key."""

Density = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Refuses keys that it does not know, and changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataParams(Section):
    """Where a task's data comes from, and which columns and rows of it are used."""

    source: str
    revision: str | None = None
    text: list[str] | None = None
    label: str | None = None
    limit: dict[str, Positive] | None = None


class ModelParams(Section):
    """Where the base model comes from."""

    source: str
    revision: str | None = None
    max_length: Positive | None = None


Kind = Literal["label", "expect"]
Power = Literal["square", "absolute"]
Selection = Literal["global", "per-layer", "per-tensor", "layer-mean", "tensor-mean", "tensor-root", "sampled"]


class ScoreVariant(Section):
    """What a method ``fish-<name>`` scores otherwise than ``fish``; null means the same."""

    kind: Kind | None = None
    power: Power | None = None
    selection: Selection | None = None
    exclude: list[str] | None = None
    heads: Positive | None = None
    warm_head: Annotated[int, Field(ge=0)] | None = None


class ScoreParams(Section):
    """How coordinates are scored and made comparable; every count of ``examples`` becomes one ranking."""

    kind: Kind = "label"
    power: Power = "square"
    selection: Selection = "global"
    exclude: list[str] = []
    heads: Positive = 1
    warm_head: Annotated[int, Field(ge=0)] = 0
    examples: list[Positive]
    batch_size: Positive
    keep: Density = 0.1
    variants: dict[str, ScoreVariant] = {}

    @model_validator(mode="after")
    def _ascending(self) -> "ScoreParams":
        if not self.examples or self.examples != sorted(set(self.examples)):
            raise ValueError(f"examples must be a list of ascending counts, got {self.examples}")
        return self

    def variant(self, name: str) -> "ScoreParams":
        """Look up how ``fish-<name>`` scores.

        Returns:
            The settings; those of ``fish`` where the name is empty.

        Raises:
            ParamsError: if there is no such variant.
        """
        if not name:
            return self
        if name not in self.variants:
            raise ParamsError(f"score.variants: unknown {unknown(name, self.variants)}")
        return self.model_copy(update=self.variants[name].model_dump(exclude_none=True))

    def how(self, *, fresh: bool = True) -> dict[str, Any]:
        """The arguments of ``pipeline.tasks.scoring.scores_for``, but for the number of examples.

        Args:
            fresh: the head is as it was drawn; one that was trained is scored as it is.

        Returns:
            Keyword arguments.
        """
        how = self.model_dump(include={"kind", "power", "selection", "exclude", "batch_size"})
        return how | ({"heads": self.heads, "warm_head": self.warm_head} if fresh else {})


class TrainParams(Section):
    """How a masked model is trained; the learning rate stands with its method."""

    epochs: Positive
    batch_size: Positive
    accumulate: Positive = 1
    optimizer: Literal["adamw", "adam", "sgd"]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Fraction = 0.9
    schedule: Literal["linear", "piecewise", "constant"]
    warmup: Fraction = 0.0
    clip: Annotated[float, Field(gt=0)] | None = None


class TaskParams(Section):
    """One task: its data, its base model, its budget and how it is scored and trained."""

    kind: Literal["text", "image", "causal"]
    data: DataParams
    model: ModelParams
    head: list[str]
    metric: str
    density: Density
    score: ScoreParams
    train: TrainParams


class SettingParams(Section):
    """A named variation of a task's mask; null means the task's own value.

    ``lr`` (task -> method -> rate) holds the rates of methods that want another one here.
    """

    density: Density | None = None
    examples: Positive | None = None
    lr: dict[str, dict[str, Annotated[float, Field(gt=0)]]] = {}


class CheckpointParams(Section):
    """How a chain of sparse checkpoints is trained (Table 4); null means the task's or the method's own value."""

    density: Density | None = None
    every: Positive | None = None
    epochs: Positive | None = None
    examples: Positive | None = None
    lr: dict[str, Annotated[float, Field(gt=0)]] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    weight_decay_scope: Literal["mask", "all"] = "mask"


class OuterParams(Section):
    """The outer optimizer of local SGD: Nesterov SGD on the merged change."""

    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class DistributeParams(Section):
    """How workers share a run (Tables 2 and 3); null means the task's or the method's own value."""

    workers: Positive = 2
    every: Annotated[int, Field(ge=0)] = 30
    average: Literal["mean", "sum"] = "mean"
    own_masks: bool = False
    shard: bool = True
    warmup: Annotated[int, Field(ge=0)] = 0
    renew: Annotated[int, Field(ge=0)] = 0
    outer: OuterParams | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    seeds: Positive | None = None
    epochs: Positive | None = None
    density: Density | None = None
    examples: Positive | None = None
    lr: dict[str, Annotated[float, Field(gt=0)]] | None = None


class LearnParams(Section):
    """How a method learns its mask, at the rate of ``dense``; 0 epochs are the task's own.

    Written out for the methods of ``grid.learned``: DVC compares the section, and knows no defaults.
    """

    epochs: Annotated[int, Field(ge=0)] = 0
    penalty: Annotated[float, Field(ge=0)] = 1.25e-7


class MethodParams(Section):
    """A method of ``pipeline.training.methods`` by name, with its learning rate per task."""

    lr: dict[str, Annotated[float, Field(gt=0)]]
    learn: LearnParams = LearnParams()


class SweepParams(Section):
    """Cells that are crossed, such as those of Figure 2; none by default."""

    tasks: list[str] = []
    methods: list[str] = []
    settings: list[str] = []

    @property
    def cells(self) -> set[tuple[str, str, str]]:
        """Every (task, method, setting)."""
        return set(product(self.tasks, self.methods, self.settings))


class SweepGrid(SweepParams):
    """The cells of Figure 2: of methods cut from a ranking, and of others beside them."""

    unranked: SweepParams = SweepParams()

    @property
    def cells(self) -> set[tuple[str, str, str]]:
        """Every (task, method, setting)."""
        return super().cells | self.unranked.cells


class CheckpointGrid(SweepParams):
    """The cells of Table 4, and those that show what decaying frozen weights costs."""

    leak: SweepParams = SweepParams()

    @property
    def cells(self) -> set[tuple[str, str, str]]:
        """Every (task, method, setting)."""
        return super().cells | self.leak.cells


class DistributeGrid(Section):
    """The cells of Tables 2 and 3: sparse methods, and what dense training is compared with at fewer settings."""

    table2: SweepParams = SweepParams()
    table2_dense: SweepParams = SweepParams()
    table3: SweepParams = SweepParams()
    table3_dense: SweepParams = SweepParams()

    @property
    def cells(self) -> set[tuple[str, str, str]]:
        """Every (task, method, setting)."""
        return self.table2.cells | self.table2_dense.cells | self.table3.cells | self.table3_dense.cells


def group_of(method: str) -> str:
    """The list of the grid that a method belongs in, by what its masks come from: scores, training, or neither."""
    if method in ("deviation", "diff-pruning"):
        return "learned"
    return "ranked" if method.partition("-")[0] == "fish" else "unranked"


class GridParams(Section):
    """What the pipeline crosses."""

    tasks: list[str]
    methods: list[str]
    ranked: list[str]
    unranked: list[str]
    learned: list[str] = []
    settings: list[str]
    sweep: SweepGrid
    checkpoint: CheckpointGrid = CheckpointGrid()
    distribute: DistributeGrid = DistributeGrid()

    @property
    def cells(self) -> set[tuple[str, str, str]]:
        """Every (task, method, setting) that the pipeline trains."""
        return set(product(self.tasks, self.methods, self.settings)) | self.sweep.cells

    @model_validator(mode="after")
    def _partition(self) -> "GridParams":
        if sorted(self.methods) != sorted(self.ranked + self.unranked + self.learned):
            raise ValueError(
                "every method of grid.methods must stand in exactly one of ranked, unranked and learned"
            )
        for group in ("ranked", "unranked", "learned"):
            for method in getattr(self, group):
                if (right := group_of(method)) != group:
                    raise ValueError(f"'{method}' belongs in {right}, not in {group}")
        return self
