"""Read one data file into an Arrow table: parquet, csv, tsv, json, jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.errors import DataError

EXTENSIONS = ("parquet", "csv", "tsv", "jsonl", "json")


def read_table(path: Path, text: Sequence[str] = ()) -> pa.Table:
    """Read a data file.

    csv and tsv have a header line, are UTF-8 and quote with ``"``; their empty cells in columns of numbers are
    nulls. json is a list of objects, jsonl (or json) one object a line.

    Args:
        path: the file; its extension says the format.
        text: columns of csv and tsv files to be read as text even if they look like numbers.

    Returns:
        The table, with at least one row.

    Raises:
        DataError: if the file is missing, empty, unreadable, or names a column twice.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in EXTENSIONS:
        raise DataError(f"{path}: unknown format '.{kind}'; expected {', '.join('.' + e for e in EXTENSIONS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty; expected rows of examples")
    try:
        table = _READERS[kind](path, text)
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: cannot be read as {kind}: {why}") from None
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column '{twice[0]}' appears twice; expected each name once")
    if not table.num_rows:
        raise DataError(f"{path}: holds no rows; expected at least one example")
    return table


def _parquet(path: Path, _: Sequence[str]) -> pa.Table:
    return pq.ParquetFile(path).read()


def _csv(path: Path, text: Sequence[str]) -> pa.Table:
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(
            delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True
        ),
        convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in text}),
    )


def _jsonl(path: Path, _: Sequence[str]) -> pa.Table:
    return pyarrow.json.read_json(path)


def _json(path: Path, text: Sequence[str]) -> pa.Table:
    content = path.read_text(encoding="utf-8-sig")
    if not content.lstrip().startswith("["):
        return _jsonl(path, text)
    rows = json.loads(content)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects")
    return pa.Table.from_pylist(rows)


_READERS = {"parquet": _parquet, "csv": _csv, "tsv": _csv, "jsonl": _jsonl, "json": _json}
