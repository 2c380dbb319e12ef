"""What `fishmask tune` was asked for, and the plan that it makes of it: all that a resumed run needs to know."""

import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import ArtifactError, ParamsError
from pipeline.files import write_json
from pipeline.schema import DataParams, ModelParams, ScoreParams, TaskParams, TrainParams
from pipeline.tuning.columns import Choice

PLAN = "plan.json"
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Asked:
    """The options of the command, as given.

    Attributes:
        model: the base's source.
        train: file, folder or hub id.
        validation: likewise; None holds rows of train out.
        text: text columns.
        label: label column.
        objective: classification, regression or completion.
        metric: of ``pipeline.tasks.metrics``.
        density: updated / all parameters.
        dense: also train every parameter, to compare.
        seed: of everything drawn.
        epochs: passes over train.
        batch_size: examples per step.
        lr: fish's peak learning rate, in place of a search.
        max_length: tokens to which texts are cut.
        image_size: pixels of a side.
        budget: time for all training, such as ``10m``.
        revision: of hub ids.
        name: of the task.
        threads: CPU threads.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32 or bf16.
    """

    model: str | None = None
    train: str | None = None
    validation: str | None = None
    text: tuple[str, ...] = ()
    label: str | None = None
    objective: str | None = None
    metric: str | None = None
    density: float = 0.005
    dense: bool = False
    seed: int = 0
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    max_length: int | None = None
    image_size: int | None = None
    budget: str | None = None
    revision: str | None = None
    name: str | None = None
    threads: int | None = None
    device: str = "auto"
    precision: str = "auto"

    def check_against(self, earlier: "Asked", where: Path) -> None:
        """Refuse to resume a run as another one: options may be left out, but not be others.

        Raises:
            ParamsError: naming the first that differs.
        """
        blank = Asked()
        for field in fields(self):
            now, then = getattr(self, field.name), getattr(earlier, field.name)
            if now not in (getattr(blank, field.name), then):
                option = "--" + field.name.replace("_", "-")
                raise ParamsError(
                    f"{option} is {now}, the unfinished run of {where} has {then}; leave it out to go on, or "
                    "start anew with --force"
                )

    def seconds(self) -> float | None:
        """Read the budget.

        Returns:
            Seconds; None where there is none.

        Raises:
            ParamsError: if it is no time.
        """
        if self.budget is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", self.budget.strip())
        if match is None or float(match[1]) == 0:
            raise ParamsError(f"--budget {self.budget}: expected a time such as 90s, 10m or 1.5h")
        return float(match[1]) * _UNITS[match[2]]


class Plan(BaseModel):
    """A run, settled.

    Attributes:
        asked: the options it came from.
        task: as params.yaml would have it; its epochs stand once the budget is known.
        objective: classification, regression or completion.
        columns: text columns and label column of the user's files.
        methods: what is trained, in order.
        lr: method -> peak rate; filled by the search.
        settled: whether epochs and rates stand.
        threads, device, precision: where it computes.
        told: what was said of the data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    asked: dict[str, Any]
    name: str
    task: TaskParams
    objective: str
    text: list[str]
    label: str
    methods: list[str]
    lr: dict[str, float] = {}
    settled: bool = False
    threads: int
    device: str
    precision: str
    told: list[str]

    def save(self, folder: Path) -> None:
        """Keep the plan with the unfinished run."""
        write_json(folder / PLAN, self.model_dump())

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Read the plan of an unfinished run.

        Returns:
            The plan.

        Raises:
            ArtifactError: if it is damaged.
        """
        try:
            return cls.model_validate_json((folder / PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError, ValidationError) as error:
            why = str(error).splitlines()[0]
            raise ArtifactError(f"{folder / PLAN}: damaged ({why}); start anew with --force") from None

    @property
    def options(self) -> Asked:
        """The options it came from."""
        return Asked(**(self.asked | {"text": tuple(self.asked["text"])}))

    def with_training(self, **changes: Any) -> "Plan":
        """The same plan with other keys of ``task.train``."""
        train = self.task.train.model_copy(update=changes)
        return self.model_copy(update={"task": self.task.model_copy(update={"train": train})})


def plan(
    asked: Asked, choice: Choice, data: Path, model: ModelParams, head: list[str], metric: str, name: str,
    rows: int, threads: int, told: list[str],
) -> Plan:  # fmt: skip
    """Settle everything but the rates, and the epochs where a budget is to decide.

    Returns:
        The plan.
    """
    batch = asked.batch_size or (DEFAULT_BATCH if choice.kind != "causal" else DEFAULT_BATCH // 2)
    train = TrainParams(
        epochs=asked.epochs or default_epochs(rows, batch), batch_size=batch, optimizer="adamw", schedule="linear",
        warmup=0.1, clip=1.0,
    )  # fmt: skip
    pictures = choice.kind == "image"
    task = TaskParams(
        kind=choice.kind,  # type: ignore[arg-type]
        data=DataParams(
            source=str(data), text=list(choice.text) or None, label="label" if pictures else choice.label
        ),
        model=model,
        head=head,
        metric=metric,
        density=asked.density,
        score=ScoreParams(examples=[SCORED], batch_size=batch),
        train=train,
    )
    return Plan(
        asked=asdict(replace(asked, text=asked.text)) | {"text": list(asked.text)},
        name=name,
        task=task,
        objective=choice.objective,
        text=list(choice.text),
        label=choice.label,
        methods=[m for m in METHODS if m in (("dense",) if asked.dense else ()) or m in _compared(choice)],
        threads=threads,
        device=asked.device,
        precision=asked.precision,
        told=told,
    )


METHODS = ("head", "dense", "fish")
SCORED = 512
"""Examples that the Fisher scores are averaged over."""
DEFAULT_BATCH = 16
STEPS = 240
"""Optimizer steps that a run has at least by default: few rows are passed over more often."""


def default_epochs(rows: int, batch: int) -> int:
    """Passes over train: enough for ``STEPS`` steps; 3 at least, 12 at most."""
    return min(12, max(3, -(-STEPS // -(-rows // batch))))


def _compared(choice: Choice) -> tuple[str, ...]:
    """What every run trains: beside fish the head alone, where there is a head."""
    return ("fish",) if choice.kind == "causal" else ("head", "fish")
