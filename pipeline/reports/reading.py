"""A project's metrics files, read into ``Results``."""

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import DataError
from pipeline.reports.cells import Cell, MaskRecord, cell_of, mask_of
from pipeline.reports.chains import ChainCell, chain_cell
from pipeline.reports.results import Results
from pipeline.reports.shares import ShareCell, share_cell

_AS_THEY_ARE = ("fetch", "score", "tune-lr", "forget")
Name = tuple[str, str, str]  # task, method, setting
Record = TypeVar("Record", Cell, MaskRecord, ChainCell, ShareCell)


def load_results(
    metrics: Path,
    only: Collection[tuple[str, str, str]] | None = None,
    chains: Collection[tuple[str, str, str]] | None = None,
    shares: Collection[tuple[str, str, str]] | None = None,
) -> Results:
    """Read the metrics files of a project.

    Args:
        metrics: the folder ``metrics/``, with one folder per stage and one JSON file per cell.
        only: the (task, method, setting) wanted; files of other cells, such as a former profile's, are left out.
            None: all that are there.
        chains: the same of the checkpoint stage.
        shares: the same of the distribute stage.

    Returns:
        The results; what is not there is absent, nothing is filled in.

    Raises:
        DataError: if a file is no JSON or lacks a key; names both.
    """  # noqa: DOC502 - raised by what it calls
    masks = _records(metrics, "mask", "a mask", mask_of, only)
    cells = _records(metrics, "train", "a training", lambda content: cell_of(content, masks), only)
    found = _records(metrics, "checkpoint", "a chain of checkpoints", chain_cell, chains)
    shared = _records(metrics, "distribute", "a distributed run", share_cell, shares)
    records = {
        stage: {file.stem: content for file, content in _documents(metrics, stage)} for stage in _AS_THEY_ARE
    }
    return Results(cells, masks, records, found, shared)


def _records(
    metrics: Path,
    stage: str,
    what: str,
    parse: Callable[[dict[str, Any]], Record],
    only: Collection[Name] | None,
) -> dict[Name, Record]:
    """Parse the metrics files of a stage: (task, method, setting) -> what each says."""
    records = {}
    wanted = None if only is None else {"-".join(name) for name in only}
    for file, content in _documents(metrics, stage):
        if wanted is not None and file.stem not in wanted:
            continue  # of a former grid, perhaps of a former version
        try:
            record = parse(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{file}: not the metrics of {what}: {_cause(error)}; run its stage again") from None
        name = (record.task, record.method, record.setting)
        if only is None or name in only:
            records[name] = record
    return records


def _documents(metrics: Path, stage: str) -> Iterable[tuple[Path, dict[str, Any]]]:
    for file in sorted((metrics / stage).glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: not readable as JSON: {error}; run its stage again") from None
        if not isinstance(content, dict):
            raise DataError(
                f"{file}: expected a JSON object, found a {type(content).__name__}; run its stage again"
            )
        yield file, content


def _cause(error: Exception) -> str:
    return f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
