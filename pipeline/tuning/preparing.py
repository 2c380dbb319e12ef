"""From the options to a plan: read the data, clean and tokenise it, find the head."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import torch

from pipeline.errors import ParamsError
from pipeline.schema import ModelParams
from pipeline.tasks.base import Task
from pipeline.tasks.custom import Own, read_own
from pipeline.tasks.fetch import fetch
from pipeline.tasks.metrics import needs_regression
from pipeline.tasks.sources import parse
from pipeline.tasks.text import Tokenizer, longest_text
from pipeline.tuning.columns import Choice, choose
from pipeline.tuning.frames import frame_of
from pipeline.tuning.head import head_of
from pipeline.tuning.plan import Asked, Plan, plan
from pipeline.tuning.rows import prepare

_METRICS = {"classification": "accuracy", "regression": "pearson", "completion": "token_accuracy"}
_SHOWN = 6  # class names in a line


def prepared_plan(asked: Asked, folder: Path, out: Path, say: Callable[[str], None]) -> Plan:
    """Read the data, clean and tokenise it, and settle all but the rates and what a budget decides.

    Args:
        asked: the options.
        folder: of the unfinished run; gets ``data/`` (the cleaned rows), ``fetched/`` (tokenised) and the plan.
        out: whose name is the task's by default.
        say: shows a sentence.

    Returns:
        The plan.
    """
    told: list[str] = []

    def tell(sentence: str) -> None:
        told.append(sentence)
        say(sentence)

    asked = _with_objective(asked)
    notes: list[str] = []
    own = read_own(str(asked.train), asked.validation, notes, asked.revision)
    choice = choose(own, asked.text, asked.label, asked.objective)
    for sentence in [*notes, *([choice.said] if choice.said else [])]:
        tell(sentence)
    model = ModelParams(
        source=str(asked.model),
        revision=asked.revision if parse(str(asked.model)).kind == "hub" else None,
        max_length=asked.max_length,
    )
    if choice.kind != "image" and model.max_length is None:
        model = model.model_copy(update={"max_length": longest_text(model)})
    metric = _metric(asked, choice, own)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", asked.name or out.resolve().name).strip("-") or "tuned"
    data = folder / "data"
    data.mkdir(parents=True)
    notes = []
    prepare(own, choice, frame_of(model, asked.image_size) if choice.kind == "image" else None, data, notes)
    for sentence in notes:
        tell(sentence)
    settings = plan(asked, choice, data, model, [], metric, name, 1, 1, [])
    fetched = folder / "fetched"
    fetched.mkdir()
    found = fetch(name, kind=choice.kind, data=settings.task.data, model=model, out=fetched, metric=metric)
    task = Task.load(fetched, model, metric)
    notes = []
    if choice.kind != "image":
        _tell_cut(data, choice, model, notes)
    outputs = len(found["classes"] or [0])
    head: list[str] = []
    if choice.kind == "causal":
        task.model(asked.seed)  # refuses what is no language model, before a run begins
    else:
        head = head_of(task.model, outputs, asked.density, notes)
    for sentence in notes:
        tell(sentence)
    threads = asked.threads or torch.get_num_threads()
    settled = plan(asked, choice, data, model, head, metric, name, task.sizes["train"], threads, told)
    say(f"rows: {', '.join(f'{count:,} {split}' for split, count in task.sizes.items())}; {_kind(choice, task)}")
    if asked.lr is not None:
        settled = settled.model_copy(update={"lr": {"fish": asked.lr}})
    settled.save(folder)
    return settled


def _tell_cut(data: Path, choice: Choice, model: ModelParams, told: list[str]) -> None:
    """Say how many texts are longer than the model takes."""
    tokenizer = Tokenizer(model)
    for split in ("train", "validation"):
        table = pq.read_table(data / f"{split}.parquet", columns=list(choice.text))
        cut = tokenizer.count_cut([table.column(name).combine_chunks() for name in choice.text])
        if cut:
            told.append(
                f"{split}: {cut} of {table.num_rows} texts are cut at {tokenizer.settings['max_length']} tokens "
                "(--max-length changes that)"
            )


def _kind(choice: Choice, task: Task) -> str:
    if not task.classes:
        return choice.objective
    more = ", …" if len(task.classes) > _SHOWN else ""
    return f"{len(task.classes)} classes ({', '.join(task.classes[:_SHOWN])}{more})"


def _with_objective(asked: Asked) -> Asked:
    """A metric of numbers asks for regression."""
    if asked.objective is None and asked.metric is not None and needs_regression(asked.metric):
        return replace(asked, objective="regression")
    return asked


def _metric(asked: Asked, choice: Choice, own: Own) -> str:
    if asked.metric is not None:
        if needs_regression(asked.metric) != (choice.objective == "regression"):
            raise ParamsError(
                f"--metric {asked.metric}: does not fit {choice.objective}; leave it out, or choose another"
            )
        return asked.metric
    known = own.published
    if known and needs_regression(known.metric) == (choice.objective == "regression"):
        return known.metric
    return _METRICS[choice.objective]
