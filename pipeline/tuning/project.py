"""From a tuned folder to the pipeline: its rows as a data folder, its settings as params.yaml; the same result."""

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline import profiles
from pipeline.errors import DataError, ParamsError
from pipeline.files import write_bytes
from pipeline.params import Params
from pipeline.runtime.atomic_folder import replace_folder
from pipeline.runtime.workspace import Workspace
from pipeline.schema import (
    DataParams,
    GridParams,
    MethodParams,
    ModelParams,
    ScoreParams,
    SettingParams,
    SweepGrid,
    TaskParams,
    TrainParams,
)
from pipeline.tasks.custom import read_own
from pipeline.tasks.fetch import fetch
from pipeline.tasks.sources import relocated
from pipeline.tuning.columns import choose
from pipeline.tuning.manifest import Tuned
from pipeline.tuning.pictures import Frame
from pipeline.tuning.rows import LABEL, prepare

_KEEP = 0.1  # of all coordinates, that a ranking keeps at least


def new_profile(folder: Path, *, force: bool = False) -> str:
    """Write params.yaml and the data of a tuned folder into the project around the current folder.

    Args:
        folder: what ``fishmask tune --out`` wrote.
        force: replace a params.yaml that was edited.

    Returns:
        What to do next.

    Raises:
        ParamsError: if params.yaml was edited and ``force`` is not given. Files that are not there, or not what
            they were when they were tuned on, are a DataError.
    """
    tuned, root = Tuned.load(folder), Workspace.here().root
    file = root / "params.yaml"
    known = {profiles.text_of(name) for name in profiles.names()}
    if not force and file.read_text(encoding="utf-8") not in known:
        raise ParamsError("params.yaml: edited since its profile was set; commit or copy it, then add --force")
    data = Path("data") / tuned.name
    params = _params(tuned, data, _model_source(tuned, root))
    with tempfile.TemporaryDirectory() as temporary:
        _rows(tuned, Path(temporary))
        _check(tuned, params, Path(temporary))
        with replace_folder(root / data) as made:
            for rows in Path(temporary).glob("*.parquet"):
                shutil.copyfile(rows, made / rows.name)
    write_bytes(file, _text(tuned, params).encode())
    cell = f"artifacts/train/{tuned.name}-{tuned.training.method}-main/seed-{tuned.training.seed}"
    return (
        f"{file}: the profile of {folder}; its rows are in {root / data}\n"
        f"run it with: fishmask repro\n"
        f"the same delta is then in {cell}/delta.safetensors (digest {tuned.delta.digest[:12]})"
    )


def _rows(tuned: Tuned, folder: Path) -> None:
    """The cleaned rows, again from the files."""
    own = read_own(tuned.data.train, tuned.data.validation, [], tuned.data.revision)
    choice = choose(own, tuned.columns.text, tuned.columns.label, tuned.objective)
    prepare(own, choice, Frame(*tuned.image.shape) if tuned.image else None, folder, [])


def _check(tuned: Tuned, params: Params, rows: Path) -> None:
    """Refuse files that changed since."""
    task = params.tasks[tuned.name]
    source = task.data.model_copy(update={"source": str(rows)})
    with tempfile.TemporaryDirectory() as out:
        found = fetch(tuned.name, kind=task.kind, data=source, model=task.model, out=Path(out), metric=task.metric)
    if found["data_digest"] != tuned.data.digest:
        raise DataError(
            f"{tuned.data.train}: gives other rows than it was tuned on (data digest {found['data_digest'][:12]}, "
            f"tune.json has {tuned.data.digest[:12]}); bring the files back, or tune again"
        )


def _model_source(tuned: Tuned, root: Path) -> str:
    """A folder or file named from where the run was, seen from the project."""
    return relocated(
        tuned.base.source,
        lambda path: path if path.is_absolute() else os.path.relpath(path.resolve(), root.resolve()),
    )


def _params(tuned: Tuned, data: Path, model: str) -> Params:
    training, name = tuned.training, tuned.name
    methods = [method for method in tuned.scores if method != "base"]
    task = TaskParams(
        kind=tuned.kind,
        data=DataParams(
            source=str(data), text=tuned.columns.text or None, label=tuned.columns.label or LABEL
        ),
        model=ModelParams(
            source=model, revision=tuned.base.revision, max_length=tuned.text.max_length if tuned.text else None
        ),
        head=training.head,
        metric=tuned.metric,
        density=training.density,
        score=ScoreParams(
            examples=[training.examples], batch_size=training.score_batch, keep=max(_KEEP, training.density)
        ),
        train=TrainParams(
            epochs=training.epochs, batch_size=training.batch_size, weight_decay=training.weight_decay,
            optimizer=training.optimizer, schedule=training.schedule,  # type: ignore[arg-type]
            warmup=training.warmup, clip=training.clip,
        ),
    )  # fmt: skip
    return Params(
        profile=name,
        seeds=[training.seed],
        threads=training.threads,
        device=training.device.partition(":")[0],  # type: ignore[arg-type]
        precision=training.precision,
        grid=GridParams(
            tasks=[name], methods=methods, ranked=["fish"], unranked=[m for m in methods if m != "fish"],
            settings=["main"], sweep=SweepGrid(),
        ),
        tasks={name: task},
        settings={"main": SettingParams()},
        methods={method: MethodParams(lr={name: training.lr[method]}) for method in methods},
    )  # fmt: skip


def _text(tuned: Tuned, params: Params) -> str:
    yaml = YAML()
    yaml.width = 110
    buffer = io.StringIO()
    document: dict[str, Any] = params.model_dump()
    yaml.dump(document, buffer)
    return (
        f"# The profile of one `fishmask tune` run ({tuned.data.train} on {tuned.base.source}), made by\n"
        f"# `fishmask profile new --from-tune`. It gives the same delta: {tuned.delta.digest[:12]}.\n"
        f"# More seeds, methods, densities: see README and `fishmask profile show demo`.\n{buffer.getvalue()}"
    )
