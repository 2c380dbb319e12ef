"""params.yaml as frozen, strict models.

A mistake becomes one line that names the file, the line, the key and what is allowed there.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from pipeline.errors import ParamsError, unknown
from pipeline.runtime.yaml_files import plain, read_yaml, row_of, set_key
from pipeline.schema import (
    CheckpointGrid,
    CheckpointParams,
    DistributeGrid,
    DistributeParams,
    GridParams,
    MethodParams,
    Name,
    Positive,
    Section,
    SettingParams,
    TaskParams,
)


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"each seed once, got {seeds}")
    return seeds


class Params(Section):
    """The whole file."""

    profile: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_different)]
    threads: Positive
    device: Literal["auto", "cuda", "mps", "cpu"]
    precision: Literal["auto", "fp32", "bf16"]
    grid: GridParams
    tasks: dict[Name, TaskParams]
    settings: dict[Name, SettingParams]
    checkpoints: dict[Name, CheckpointParams] = {}
    distribute: dict[Name, DistributeParams] = {"main": DistributeParams()}
    methods: dict[Name, MethodParams]

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
        for method in params.grid.learned:
            if "learn" not in params.methods[method].model_fields_set:
                where = f"{Path(path).name}:{row_of(raw, ['methods', method])}: methods.{method}.learn"
                raise ParamsError(f"{where}: missing; methods in grid.learned need it, such as {{epochs: 0}}")
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
        for task, method, setting in sorted(self.grid.cells):
            examples = self.settings[setting].examples if setting in self.settings else None
            if examples and method in self.grid.ranked and task in self.tasks:
                known = [str(count) for count in self.tasks[task].score.examples]
                yield f"settings.{setting}.examples", str(examples), known
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
