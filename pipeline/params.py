"""params.yaml as frozen, strict models.

A mistake becomes one line that names the file, the line, the key and what is allowed there.
"""

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ParamsError, unknown
from pipeline.runtime.yaml_files import plain, read_yaml, row_of, set_key

Density = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataParams(_Strict):
    """Where a task's data comes from, and which columns and rows of it are used."""

    source: str
    revision: str | None = None
    text: list[str] | None = None
    label: str | None = None
    limit: dict[str, Positive] | None = None


class ModelParams(_Strict):
    """Where the base model comes from."""

    source: str
    revision: str | None = None
    max_length: Positive | None = None


Kind = Literal["label", "expect"]
Power = Literal["square", "absolute"]
Selection = Literal["global", "per-layer", "per-tensor", "layer-mean", "tensor-mean", "tensor-root"]


class ScoreVariant(_Strict):
    """What a method ``fish-<name>`` scores otherwise than ``fish``; null means the same."""

    kind: Kind | None = None
    power: Power | None = None
    selection: Selection | None = None
    exclude: list[str] | None = None
    heads: Positive | None = None
    warm_head: Annotated[int, Field(ge=0)] | None = None


class ScoreParams(_Strict):
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


class TrainParams(_Strict):
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


class TaskParams(_Strict):
    """One task: its data, its base model, its budget and how it is scored and trained."""

    kind: Literal["text", "image", "causal"]
    data: DataParams
    model: ModelParams
    head: list[str]
    metric: str
    density: Density
    score: ScoreParams
    train: TrainParams


class SettingParams(_Strict):
    """A named variation of a task's mask; null means the task's own value.

    ``lr`` (task -> method -> rate) holds the rates of methods that want another one here.
    """

    density: Density | None = None
    examples: Positive | None = None
    lr: dict[str, dict[str, Annotated[float, Field(gt=0)]]] = {}


class CheckpointParams(_Strict):
    """How a chain of sparse checkpoints is trained (Table 4); null means the task's or the method's own value."""

    density: Density | None = None
    every: Positive | None = None
    epochs: Positive | None = None
    examples: Positive | None = None
    lr: dict[str, Annotated[float, Field(gt=0)]] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    weight_decay_scope: Literal["mask", "all"] = "mask"


class OuterParams(_Strict):
    """The outer optimizer of local SGD: Nesterov SGD on the merged change."""

    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class DistributeParams(_Strict):
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


class LearnParams(_Strict):
    """How a method learns its mask, at the rate of ``dense``; 0 epochs are the task's own."""

    epochs: Annotated[int, Field(ge=0)] = 0
    penalty: Annotated[float, Field(ge=0)] = 1.25e-7


class MethodParams(_Strict):
    """A method of ``pipeline.training.methods`` by name, with its learning rate per task."""

    lr: dict[str, Annotated[float, Field(gt=0)]]
    learn: LearnParams = LearnParams()


class SweepParams(_Strict):
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


class DistributeGrid(_Strict):
    """The cells of Tables 2 and 3: sparse methods, and what dense training is compared with at fewer settings."""

    table2: SweepParams = SweepParams()
    table2_dense: SweepParams = SweepParams()
    table3: SweepParams = SweepParams()
    table3_dense: SweepParams = SweepParams()

    @property
    def cells(self) -> set[tuple[str, str, str]]:
        """Every (task, method, setting)."""
        return self.table2.cells | self.table2_dense.cells | self.table3.cells | self.table3_dense.cells


class GridParams(_Strict):
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
        return self


class Params(_Strict):
    """The whole file."""

    profile: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    threads: Positive
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    grid: GridParams
    tasks: dict[str, TaskParams]
    settings: dict[str, SettingParams]
    checkpoints: dict[str, CheckpointParams] = {}
    distribute: dict[str, DistributeParams] = {"main": DistributeParams()}
    methods: dict[str, MethodParams]

    @classmethod
    def load(cls, path: Path | str = "params.yaml", overrides: Mapping[str, Any] | None = None) -> "Params":
        """Read and check a params file.

        Args:
            path: the file.
            overrides: dotted key -> value, set before the check (``{"tasks.words.density": 0.01}``).

        Returns:
            The checked parameters.

        Raises:
            ParamsError: one line per the first mistake: file, line, key, what is allowed.
        """
        raw = read_yaml(path)
        for key, value in (overrides or {}).items():
            set_key(raw, key, value, Path(path).name)
        try:
            params = cls.model_validate(plain(raw))
        except ValidationError as error:
            raise ParamsError(_line(Path(path).name, raw, error, overrides or {})) from None
        for key, name, known in params._references():
            if name not in known:
                where = f"{Path(path).name}:{row_of(raw, key.split('.'))}: {key}"
                raise ParamsError(f"{where}: unknown {unknown(name, known)}")
        return params

    def _references(self) -> Iterable[tuple[str, str, Iterable[str]]]:
        """Names used in one section that must be defined in another: (key, name, defined names)."""
        sets: dict[str, Iterable[str]] = {
            "tasks": self.tasks,
            "methods": self.methods,
            "settings": self.settings,
        }
        sweep = self.grid.sweep
        grids = {"grid": self.grid, "grid.sweep": sweep, "grid.sweep.unranked": sweep.unranked}
        for section, known in sets.items():
            for key, grid in grids.items():
                for name in getattr(grid, section):
                    yield f"{key}.{section}", name, known
        experiments: tuple[tuple[str, CheckpointGrid | DistributeGrid, Iterable[str]], ...] = (
            ("checkpoint", self.grid.checkpoint, self.checkpoints),
            ("distribute", self.grid.distribute, self.distribute),
        )
        for stage, grid_of, settings in experiments:
            for task, method, setting in sorted(grid_of.cells):
                yield f"grid.{stage}.tasks", task, self.tasks
                yield f"grid.{stage}.methods", method, self.methods
                yield f"grid.{stage}.settings", setting, settings
                yield f"methods.{method}.lr", task, self.methods[method].lr
        for name in sweep.methods:
            yield "grid.sweep.methods", name, self.grid.ranked
        for name in sweep.unranked.methods:
            yield "grid.sweep.unranked.methods", name, self.grid.unranked
        for setting, own in self.settings.items():
            for task, rates in own.lr.items():
                yield f"settings.{setting}.lr", task, self.tasks
                for method in rates:
                    yield f"settings.{setting}.lr.{task}", method, self.methods
        for task in self.grid.tasks:
            for method in self.grid.ranked:
                variant = method.partition("-")[2]
                if variant and task in self.tasks:
                    yield f"tasks.{task}.score.variants", variant, self.tasks[task].score.variants
        for task in self.grid.tasks:
            for method in self.grid.methods:
                if method in self.methods:
                    yield f"methods.{method}.lr", task, self.methods[method].lr
            if self.grid.learned:
                yield "methods", "dense", self.methods
                yield "methods.dense.lr", task, self.methods["dense"].lr

    def rate_key(self, task: str, method: str, setting: str) -> str:
        """The key of the learning rate of a cell: the setting's own where it has one."""
        own = self.settings[setting].lr.get(task, {}) if setting in self.settings else {}
        return f"settings.{setting}.lr.{task}.{method}" if method in own else f"methods.{method}.lr.{task}"

    def at(self, key: str) -> Any:
        """Look a dotted key up, such as ``tasks.words.train`` or ``methods.fish.lr.words``.

        Returns:
            The sub-model or value there.

        Raises:
            ParamsError: if there is no such key; names the closest one.
        """
        here: Any = self
        done: list[str] = []
        for part in key.split("."):
            known = list(here) if isinstance(here, dict) else list(type(here).model_fields)
            if part not in known:
                what = {"tasks": "task", "methods": "method", "settings": "setting"}.get(
                    ".".join(done), "key " + ".".join(done)
                )
                raise ParamsError(f"params.yaml: unknown {what} {unknown(part, known)}")
            here = here[part] if isinstance(here, dict) else getattr(here, part)
            done.append(part)
        return here


def _line(file: str, raw: Any, error: ValidationError, overrides: Iterable[str]) -> str:
    """The first mistake as one line; a misspelt key before the key that it leaves missing."""
    mistakes = error.errors()
    first = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    parts = [part for part in first["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in parts)
    given = any(f"{key}.".startswith(f"{own}.") for own in overrides)
    where = f"{key} as given in place of {file}'s" if given else f"{file}:{row_of(raw, parts)}: {key}"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {unknown(str(parts[-1]), _fields(parts[:-1]))}"
    if first["type"] == "missing":
        return f"{where}: missing; it is required"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: expected {message}, got {first['input']!r}"


def _fields(parts: Iterable[Any]) -> list[str]:
    """The keys allowed at a path of the schema."""
    model: Any = Params
    for part in parts:
        fields = getattr(model, "model_fields", None)
        if fields is not None:
            model = fields[part].annotation
        elif isinstance(model, type) is False and getattr(model, "__args__", None):
            model = model.__args__[-1]
    return list(getattr(model, "model_fields", {}))
