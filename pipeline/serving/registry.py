"""`fishmask register`: deltas as a model of MLflow's registry, by code over safetensors.

What is logged is small and holds no pickle: the deltas with their descriptions, the code file, and the base by
reference and digest. MLflow's own loaders (``mlflow models serve``, ``mlflow models predict``,
``mlflow.pyfunc.load_model``) load the base from its source and refuse it if its digest is another.
"""

import contextlib
import importlib.metadata
import io
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.artifacts.application import Done
from pipeline.errors import DataError, FishmaskError, ParamsError, StorageError
from pipeline.files import write_bytes
from pipeline.runtime.mlflow_store import Store, connect, project_root, tracking_uri
from pipeline.runtime.provenance import git_tags
from pipeline.runtime.workspace import VERSION
from pipeline.serving.interface import Asked, parse_deltas
from pipeline.serving.predictor import Predictor
from pipeline.serving.questions import IMAGE, columns_to_read, read_rows
from pipeline.tasks.custom import FILE
from pipeline.tasks.raw import RawSplit
from pipeline.tasks.sources import parse
from pipeline.tuning.manifest import DELTA

EXPERIMENT = "fishmask-models"
DELTAS = "deltas"
"""The artifact: a folder that holds a folder for each delta."""
LIMITS = {"max_rows": 10_000, "max_characters": 1_000_000}
"""What a request may hold: rows, and characters of one text."""
_EXAMPLE_ROWS = 3
_PINNED = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas", "pyarrow")
_CODE = Path(__file__).with_name("pyfunc_model.py")


def register(
    deltas: Sequence[str],
    name: str,
    *,
    base: str | None = None,
    text: Sequence[str] = (),
    max_length: int | None = None,
    example: str | None = None,
    alias: str | None = None,
    max_new_tokens: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
) -> Done:
    """Log a model and register it; base and deltas are verified first, and the registered model is asked last.

    Args:
        deltas: as ``parse_deltas`` takes them. A request names one by the param ``delta``; without, the first
            answers.
        name: of the registered model; another version where it exists.
        base: the base's source, where it is another than the one that the deltas name.
        text: the columns to read, where a delta does not say.
        max_length: tokens to which texts are cut, in place of what a delta says.
        example: rows, as ``read_rows`` takes them, whose first are the input example; None makes them up.
        alias: to be moved to this version.
        max_new_tokens: of a completion.
        device: where the served model computes.
        precision: likewise.
        batch_size: rows that go through the model together.

    Returns:
        What was registered, and how to serve it.

    Raises:
        ParamsError: if a name is not legal in MLflow.
        StorageError: if MLflow fails; nothing is registered.
    """  # noqa: DOC502 - raised by what it calls
    _check_names(name, alias)
    predictor = Predictor(
        dict(parse_deltas(deltas)), base, text=text or None, max_length=max_length, device=device,
        precision=precision, batch_size=batch_size, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    asked = {delta: predictor.use(delta).asked for delta in predictor.names}
    rows = _example(asked, example)
    read = {delta: _columns(one, rows) for delta, one in asked.items()}
    answers = {delta: predictor.answer(rows, by=delta).columns for delta in asked}
    source = _absolute(next(iter(asked.values())).interface.base)
    config = {
        "base": source,
        DELTAS: list(asked),
        "text": list(text) or None,
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "device": device,
        "precision": precision,
        "batch_size": batch_size,
    }
    with _as_our_errors(), tempfile.TemporaryDirectory() as folder:
        for delta, one in asked.items():
            _stage(one, Path(folder) / DELTAS / delta)
        store = connect(EXPERIMENT)
        table, folders = rows.table.select(_distinct(read)), Path(folder) / DELTAS
        version, run_id = _log(store, name, folders, asked, table, answers, config | LIMITS)
        uri = f"models:/{name}/{version}"
        try:
            _check_answers(uri, table, answers)
        except BaseException:
            store.client.delete_model_version(name, version)
            raise
        if alias is not None:
            store.client.set_registered_model_alias(name, alias, version)
    return _done(name, version, run_id, source, asked, alias)


def requirements(source: str) -> list[str]:
    """What a serving host must have: this package, the base's where it is one, and what computes the answers.

    Args:
        source: of the base.

    Returns:
        pip requirements, pinned to what is installed here.
    """
    named = parse(source)
    packages = [*([named.name] if named.kind == "package" else []), *_PINNED]
    versions = {package: importlib.metadata.version(package).partition("+")[0] for package in packages}
    return [f"fishmask=={VERSION}", *(f"{package}=={version}" for package, version in versions.items())]


def _check_names(name: str, alias: str | None) -> None:
    if not re.fullmatch(r"[^/:\s][^/:]{0,199}", name) or name in {".", ".."} or not name.isprintable():
        raise ParamsError(f"--name '{name}': expected a name without '/' and ':', of at most 200 characters")
    if alias is not None and not re.fullmatch(r"(?!latest$|[vV]\d+$)[\w-]{1,255}", alias):
        raise ParamsError(
            f"--alias '{alias}': expected letters, digits, '_' and '-', and neither 'latest' nor 'v1'"
        )


def _absolute(source: str) -> str:
    """The base's reference: a folder's must hold wherever the server is started."""
    return str(Path(source).expanduser().resolve()) if parse(source).kind == "folder" else source


def _example(asked: Mapping[str, Asked], source: str | None) -> RawSplit:
    """A few rows to ask: of a file, or made up."""
    if source is not None:
        found = read_rows(source, [])
        table = found.table.slice(0, _EXAMPLE_ROWS)
        if FILE in table.column_names and any(one.interface.image for one in asked.values()):
            table = pa.table({IMAGE: [Path(file).read_bytes() for file in table.column(FILE).to_pylist()]})
        return RawSplit(table, source)
    columns: dict[str, Any] = {}
    for one in asked.values():
        if one.interface.image is not None:
            columns[IMAGE] = [_grey(), _grey()]
        for name in one.interface.text or ([] if one.interface.image else ["text"]):
            columns[name] = ["An example.", "Another example."]
    return RawSplit(pa.table(columns), "the example")


def _grey() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "grey").save(buffer, "PNG")
    return buffer.getvalue()


def _columns(asked: Asked, rows: RawSplit) -> list[str]:
    if asked.interface.image is None:
        return columns_to_read(asked.interface.text, rows)
    if IMAGE not in rows.table.column_names:
        raise DataError(
            f"{rows.where}: no column '{IMAGE}' of encoded images; expected one, or a folder of images"
        )
    return [IMAGE]


def _distinct(columns: Mapping[str, Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in columns.values() for name in names))


def _stage(asked: Asked, folder: Path) -> None:
    folder.mkdir(parents=True)
    write_bytes(folder / DELTA, asked.file.read_bytes())
    if asked.tuned is not None:
        asked.tuned.save(folder)


def _log(
    store: Store, name: str, deltas: Path, asked: Mapping[str, Asked], rows: pa.Table,
    answers: Mapping[str, Mapping[str, pa.Array]], config: Mapping[str, Any],
) -> tuple[str, str]:  # fmt: skip
    """Log the model in a run of its own and register it.

    Returns:
        Version and run.
    """
    import mlflow
    import mlflow.pyfunc

    first = next(iter(asked.values()))
    digests = {delta: one.delta.digest for delta, one in asked.items()}
    tags = {"base": config["base"], "base.digest": first.delta.base, "fishmask": VERSION}
    tags |= {f"delta.{delta}": digest for delta, digest in digests.items()}
    run = store.client.create_run(store.experiment, run_name=name)
    run_id = run.info.run_id
    status = "FAILED"
    try:
        store.write(run_id, params=_params(first), tags=tags | git_tags(project_root()))
        mlflow.set_tracking_uri(tracking_uri())
        with mlflow.start_run(run_id=run_id):
            _log_scores(store, run_id, asked)
            info = mlflow.pyfunc.log_model(
                name=_legal(name),
                python_model=str(_CODE),
                artifacts={DELTAS: str(deltas)},
                signature=_signature(rows.schema, answers),
                input_example=rows.to_pandas(),
                model_config=dict(config),
                pip_requirements=requirements(config["base"]),
                metadata={"fishmask": {"base": config["base"], "base_digest": first.delta.base, DELTAS: digests}},
            )
            made = mlflow.register_model(info.model_uri, name, tags=tags)
        status = "FINISHED"
    finally:
        store.client.set_terminated(run_id, status)
    return str(made.version), run_id


def _params(asked: Asked) -> dict[str, str]:
    """What the first delta is; MLflow itself logs the model's configuration."""
    interface, mask = asked.interface, asked.delta.mask
    values = {
        "kind": interface.kind,
        "columns": ", ".join(interface.text),
        "classes": ", ".join(interface.classes or []),
        "tokens": interface.max_length,
        "density": mask.density,
        "values": mask.nnz,
    }
    return {key: str(value)[:6000] for key, value in values.items() if value}


def _legal(name: str) -> str:
    return re.sub(r"[^\w-]", "_", name)


def _log_scores(store: Store, run_id: str, asked: Mapping[str, Asked]) -> None:
    """The scores that the tuned folders tell: names are cleaned as MLflow wants them."""
    points = []
    for delta, one in asked.items():
        prefix = f"{_legal(delta)}/" if len(asked) > 1 else ""
        scores = one.tuned.scores.get(one.tuned.training.method, {}) if one.tuned else {}
        points += [(prefix + key, value, 0, 0) for key, value in scores.items()]
    store.write(run_id, points=points)


def _signature(columns: pa.Schema, answers: Mapping[str, Mapping[str, pa.Array]]) -> Any:
    """What a request holds: texts, and the delta to ask; and, where all deltas answer alike, what comes back."""
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    forms = [{name: values.type for name, values in found.items()} for found in answers.values()]
    inputs: list[Any] = [
        ColSpec("binary" if pa.types.is_binary(field.type) else "string", field.name, required=len(answers) == 1)
        for field in columns
    ]
    outputs: list[Any] = [
        ColSpec("float" if pa.types.is_floating(kind) else "string", name) for name, kind in forms[0].items()
    ]
    alike = all(form == forms[0] for form in forms)
    params: Any = ParamSchema([ParamSpec("delta", "string", next(iter(answers)))])
    return ModelSignature(Schema(inputs), Schema(outputs) if alike else None, params)


def _check_answers(uri: str, rows: pa.Table, answers: Mapping[str, Mapping[str, pa.Array]]) -> None:
    """Load the registered model as a server does, and ask it."""
    import mlflow.pyfunc

    from pipeline.serving.served import frame

    model = mlflow.pyfunc.load_model(uri)
    for delta, wanted in answers.items():
        if not model.predict(rows.to_pandas(), params={"delta": delta}).equals(frame(dict(wanted))):
            raise StorageError(f"{uri}: answers another way than delta '{delta}' does here; do not serve it")


@contextlib.contextmanager
def _as_our_errors() -> Iterator[None]:
    """MLflow in silence; whatever it raises is one line."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except FishmaskError:
        raise
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise StorageError(f"MLflow at {tracking_uri()} failed: {why}") from error


def _done(
    name: str, version: str, run_id: str, source: str, asked: Mapping[str, Asked], alias: str | None
) -> Done:
    uri, store = f"models:/{name}/{version}", tracking_uri()
    digests = {delta: one.delta.digest for delta, one in asked.items()}
    held = ", ".join(f"{delta} {digest[:12]}" for delta, digest in digests.items())
    lines = [
        f"{uri}: delta {held} over {source}; it answers as here" + (f"; alias '{alias}'" if alias else ""),
        f"serve it:  MLFLOW_TRACKING_URI={store} mlflow models serve -m '{uri}' --env-manager local --port 5001",
    ]
    facts = {"name": name, "version": version, "uri": uri, "run": run_id, "store": store, "base": source}
    return Done("\n".join(lines), facts | {"alias": alias, "deltas": digests})
