"""`fishmask register`: deltas as a model of MLflow's registry, by code over safetensors.

What is logged is small and holds no pickle: the deltas with their descriptions, the code file, and the base by
reference and digest. MLflow's own loaders (``mlflow models serve``, ``mlflow models predict``,
``mlflow.pyfunc.load_model``) load the base from its source and refuse it if its digest is another.
"""

import contextlib
import io
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.artifacts.application import Done
from pipeline.errors import FishmaskError, ParamsError, StorageError
from pipeline.runtime.mlflow_store import connect, tracking_uri
from pipeline.serving.asked import Asked, parse_deltas
from pipeline.serving.example import as_request, example_rows
from pipeline.serving.logged import DELTAS, log_model, stage
from pipeline.serving.predictor import Predictor
from pipeline.tasks.sources import absolute

EXPERIMENT = "fishmask-models"
LIMITS = {"max_rows": 10_000, "max_characters": 1_000_000}
"""What a request may hold: rows, and characters of one text."""


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
    rows = example_rows(asked, example)
    answers = {delta: predictor.answer(rows, by=delta).columns for delta in asked}
    table = as_request(rows, asked)
    source = absolute(next(iter(asked.values())).interface.base)
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
            stage(one, Path(folder) / DELTAS / delta)
        store = connect(EXPERIMENT)
        version, run_id = log_model(store, name, Path(folder) / DELTAS, asked, table, answers, config | LIMITS)
        uri = f"models:/{name}/{version}"
        try:
            _check_answers(uri, table, answers)
        except BaseException:
            store.client.delete_model_version(name, version)
            raise
        if alias is not None:
            store.client.set_registered_model_alias(name, alias, version)
    return _done(name, version, run_id, source, asked, alias)


def _check_names(name: str, alias: str | None) -> None:
    if not re.fullmatch(r"[^/:\s][^/:]{0,199}", name) or name in {".", ".."} or not name.isprintable():
        raise ParamsError(f"--name '{name}': expected a name without '/' and ':', of at most 200 characters")
    if alias is not None and not re.fullmatch(r"(?!latest$|[vV]\d+$)[\w-]{1,255}", alias):
        raise ParamsError(
            f"--alias '{alias}': expected letters, digits, '_' and '-', and neither 'latest' nor 'v1'"
        )


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
