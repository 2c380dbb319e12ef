"""What is logged of a model: the deltas, the code that loads them, its signature, and what a host must have."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.files import write_bytes
from pipeline.runtime.mlflow_store import Store, project_root, tracking_uri
from pipeline.runtime.provenance import git_tags
from pipeline.runtime.workspace import VERSION
from pipeline.serving.asked import Asked
from pipeline.tasks.sources import parse
from pipeline.tuning.manifest import DELTA

DELTAS = "deltas"
"""The artifact: a folder that holds a folder for each delta."""
_PINNED = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas", "pyarrow")
_CODE = Path(__file__).with_name("pyfunc_model.py")


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


def stage(asked: Asked, folder: Path) -> None:
    """Copy a delta, and its description where there is one, into a new folder."""
    folder.mkdir(parents=True)
    write_bytes(folder / DELTA, asked.file.read_bytes())
    if asked.tuned is not None:
        asked.tuned.save(folder)


def log_model(
    store: Store, name: str, deltas: Path, asked: Mapping[str, Asked], rows: pa.Table,
    answers: Mapping[str, Mapping[str, pa.Array]], config: Mapping[str, Any],
) -> tuple[str, str]:  # fmt: skip
    """Log the model in a run of its own and register it.

    Args:
        store: of MLflow.
        name: of the registered model.
        deltas: the folder with a folder for each delta.
        asked: the deltas by name; what the first tells becomes the run's params.
        rows: the input example.
        answers: each delta's to them.
        config: of the model.

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
