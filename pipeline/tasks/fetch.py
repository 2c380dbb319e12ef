"""fetch(): bring a task's data into one normal form, checked, tokenised or decoded once.

Each split's parquet has ``row`` (int64, its row in the source split), ``label`` (int64 classes or float32; absent
where the split is unlabelled), for texts ``text``, ``text_pair``, ``input_ids``, ``token_type_ids``, for images
``pixels`` (uint8 [C, H, W]), for completions (kind ``causal``) ``text`` (the prompt), ``text_pair`` (the
completion), ``input_ids`` of both and ``start`` (int32, where the completion begins), and ``group`` where rows
belong together.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError, ParamsError
from pipeline.tasks.columns import encode_labels, text_column
from pipeline.tasks.decode import decode
from pipeline.tasks.draws import Rows, permutation
from pipeline.tasks.image import pixel_array, pixel_column, statistics
from pipeline.tasks.metrics import needs_regression
from pipeline.tasks.raw import RawData, read_raw
from pipeline.tasks.settings import DataSettings, ModelSettings
from pipeline.tasks.store import FORMAT, VERSION, data_digest, write_manifest, write_split
from pipeline.tasks.text import Tokenizer

_LOSSY = {"JPEG", "WEBP"}
_Columns = dict[str, pa.Array]


def fetch(
    task: str,
    *,
    kind: str,
    data: DataSettings,
    model: ModelSettings,
    out: Path,
    metric: str | None = None,
    files: Mapping[str, Path | str] | None = None,
) -> dict[str, Any]:
    """Fetch one task's data into ``out``, an existing folder.

    ``data.limit`` keeps the first so many rows of a shuffle with seed 0, in their old order: a smaller limit's
    rows are among a larger one's.

    Args:
        task: its name.
        kind: ``text``, ``image`` or ``causal``, whose label column holds completions.
        data: where from, which columns and rows.
        model: whose tokenizer is used, for text.
        out: where to write ``<split>.parquet`` and ``manifest.json``.
        metric: the task's metric; it settles whether numbers are classes or regressed. None lets the label's
            type decide: decimal numbers are regressed.
        files: split -> file, in place of ``data.source``.

    Returns:
        The manifest: source, revision, licence, classes (None for regression), per split ``rows``, ``of`` (rows
        before the limit), ``labelled``, ``remark`` and ``digest``, and one ``data_digest``.

    Raises:
        ParamsError: if the kind is unknown. Data that is missing or does not fit is a DataError, a model without
            tokenizer a ModelError, a folder that cannot be written a StorageError.
    """
    raw = read_raw(task, data, files)
    regression = None if metric is None else needs_regression(metric)
    known = raw.published
    name = data.label or (known.label if known else "label")
    labels: dict[str, np.ndarray | None] = dict.fromkeys(raw.splits)
    classes: list[str] | None = None
    if kind != "causal":
        labels, classes = encode_labels(raw.splits, name, known.classes if known else (), regression=regression)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "task": task,
        "kind": kind,
        "source": ", ".join(f"{k}={v}" for k, v in files.items()) if files else data.source,
        "revision": raw.revision,
        "licence": raw.licence,
        "classes": classes,
    }
    rows = {split: _limited(task, split, raw, data.limit) for split in raw.splits}
    if kind == "text":
        columns = _texts(task, data, model, raw, rows, manifest)
    elif kind == "causal":
        columns = _completions(task, data, name, model, raw, rows, manifest)
    elif kind == "image":
        columns = _images(raw, rows, manifest)
    else:
        raise ParamsError(f"tasks.{task}.kind: '{kind}'; expected text, image or causal")
    manifest["splits"] = {
        split: _write(out, split, columns[split], labels[split], rows[split], raw) for split in raw.splits
    }
    manifest["data_digest"] = data_digest(manifest)
    write_manifest(out, manifest)
    return manifest


def _limited(task: str, split: str, raw: RawData, limit: Mapping[str, int] | None) -> Rows:
    """The rows of a split that are kept."""
    for name in limit or {}:
        if name not in raw.splits:
            raise ParamsError(f"tasks.{task}.data.limit: no split '{name}'; expected {', '.join(raw.splits)}")
    count = raw.splits[split].table.num_rows
    return np.sort(permutation(count, 0)[: (limit or {}).get(split, count)])


def _texts(
    task: str,
    data: DataSettings,
    model: ModelSettings,
    raw: RawData,
    rows: dict[str, Rows],
    manifest: dict[str, Any],
) -> dict[str, _Columns]:
    names = list(data.text or (raw.published.text if raw.published else ("text",)))
    if len(names) not in (1, 2):
        raise ParamsError(f"tasks.{task}.data.text: {len(names)} columns; expected one, or two for pairs of texts")
    texts = {
        split: [text_column(part, name).take(pa.array(rows[split])) for name in names]
        for split, part in raw.splits.items()
    }
    tokenizer = Tokenizer(model)
    manifest["tokenizer"] = tokenizer.settings
    return {
        split: dict(zip(("text", "text_pair"), columns, strict=False)) | tokenizer.columns(columns)
        for split, columns in texts.items()
    }


def _completions(
    task: str, data: DataSettings, label: str, model: ModelSettings, raw: RawData, rows: dict[str, Rows],
    manifest: dict[str, Any],
) -> dict[str, _Columns]:  # fmt: skip
    names = list(data.text or ("prompt",))
    if len(names) != 1:
        raise ParamsError(f"tasks.{task}.data.text: {len(names)} columns; a completion has one, its prompt")
    tokenizer = Tokenizer(model)
    manifest["tokenizer"] = tokenizer.settings
    columns: dict[str, _Columns] = {}
    for split, part in raw.splits.items():
        prompts, completions = (text_column(part, name).take(pa.array(rows[split])) for name in (*names, label))
        made = tokenizer.completions(prompts, completions)
        columns[split] = {"text": prompts, "text_pair": completions} | made
    return columns


def _images(raw: RawData, rows: dict[str, Rows], manifest: dict[str, Any]) -> dict[str, _Columns]:
    pixels: dict[str, np.ndarray] = {}
    lossy: set[str] = set()
    for split, part in raw.splits.items():
        if raw.shape:
            pixels[split] = pixel_array(part.table.column("pixels").combine_chunks(), raw.shape)[rows[split]]
        else:
            pixels[split], formats = decode(part, rows[split])
            lossy |= _LOSSY & set(formats.split("+"))
        if pixels[split].shape[1:] != pixels["train"].shape[1:]:
            raise DataError(
                f"{part.where}: images are {list(pixels[split].shape[1:])} (C, H, W); "
                f"expected {list(pixels['train'].shape[1:])} as in train"
            )
    mean, std = statistics(pixels["train"])
    augment = raw.published.augment if raw.published else None
    manifest["image"] = {"shape": list(pixels["train"].shape[1:]), "mean": mean, "std": std, "augment": augment}
    if lossy:
        manifest["image"]["remark"] = "+".join(sorted(lossy))
    return {split: {"pixels": pixel_column(array)} for split, array in pixels.items()}


def _write(
    out: Path, split: str, columns: _Columns, labels: np.ndarray | None, rows: Rows, raw: RawData
) -> dict[str, Any]:
    """Write one split; what the manifest says of it."""
    content: dict[str, Any] = {"row": pa.array(rows)} | columns
    if labels is not None:
        content["label"] = pa.array(labels[rows])
    if raw.group:
        content["group"] = raw.splits[split].table.column(raw.group).take(pa.array(rows))
    digest = write_split(out, split, pa.table(content))
    labelled = labels is not None or "start" in content
    of = raw.splits[split].table.num_rows
    remark = raw.splits[split].remark
    if len(rows) < of:
        remark = "; ".join(filter(None, [remark, f"{len(rows)} of {of} rows"]))
    return {"rows": len(rows), "of": of, "labelled": labelled, "remark": remark, "digest": digest}
