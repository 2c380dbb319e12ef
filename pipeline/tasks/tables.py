"""Read one data file into an Arrow table: parquet, csv, tsv, json, jsonl, each of them gzipped or not.

Two readings: a strict one for a pipeline's data, and one that takes files as people have them and tells what it
did.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.errors import DataError

EXTENSIONS = ("parquet", "csv", "tsv", "jsonl", "json")
_DELIMITERS = (",", "\t", ";", "|")


class FileName(NamedTuple):
    """The parts of a data file's name: ``train.csv.gz`` is stem ``train``, kind ``csv``, zipped."""

    stem: str
    kind: str
    zipped: bool


def parts_of(path: Path) -> FileName:
    """Take a data file's name apart; its kind is one of ``EXTENSIONS`` if it is one."""
    zipped = path.suffix.lower() == ".gz"
    inner = Path(path.stem) if zipped else path
    return FileName(inner.stem, inner.suffix.removeprefix(".").lower(), zipped)


def read_table(path: Path, text: Sequence[str] = (), *, told: list[str] | None = None) -> pa.Table:
    """Read a data file.

    csv and tsv have a header line, are UTF-8 and quote with ``"``; their empty cells in columns of numbers are
    nulls. json is a list of objects, jsonl (or json) one object a line. With ``told`` a file may also be in
    another encoding, or in two of them, its delimiter may be ``;``, ``|`` or a tab, rows with too few or too many
    cells are left out, every column of a csv is text as it stands in the file, and objects may differ in their
    keys.

    Args:
        path: the file; its extension says the format.
        text: columns of csv and tsv files to be read as text even if they look like numbers.
        told: takes a sentence for each liberty taken; None reads strictly.

    Returns:
        The table, with at least one row.

    Raises:
        DataError: if the file is missing, empty, unreadable, or names a column twice.
    """
    name = parts_of(path)
    if name.kind not in EXTENSIONS:
        raise DataError(
            f"{path}: unknown format '.{name.kind}'; expected {', '.join('.' + e for e in EXTENSIONS)}, each "
            "with .gz or without"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty; expected rows of examples")
    try:
        with pa.input_stream(str(path), compression="gzip" if name.zipped else None) as stream:
            if name.kind == "parquet":
                table = pq.ParquetFile(pa.BufferReader(stream.read()) if name.zipped else path).read()
            elif told is None:
                table = _strict(stream, name.kind, text)
            else:
                table = _lenient(stream, name.kind, path, told)
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: cannot be read as {name.kind}: {why}") from None
    twice = sorted({column for column in table.column_names if table.column_names.count(column) > 1})
    if twice:
        raise DataError(f"{path}: column '{twice[0]}' appears twice; expected each name once")
    if not table.num_rows:
        raise DataError(f"{path}: holds no rows; expected at least one example")
    return table


def _strict(stream: Any, kind: str, text: Sequence[str]) -> pa.Table:
    if kind in ("csv", "tsv"):
        return pyarrow.csv.read_csv(
            stream,
            parse_options=pyarrow.csv.ParseOptions(
                delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True
            ),
            convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in text}),
        )
    if kind == "jsonl":
        return pyarrow.json.read_json(stream)
    content = stream.read().decode("utf-8-sig")
    if not content.lstrip().startswith("["):
        return pyarrow.json.read_json(pa.BufferReader(content.encode()))
    rows = json.loads(content)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects")
    return pa.Table.from_pylist(rows)


def _lenient(stream: Any, kind: str, path: Path, told: list[str]) -> pa.Table:
    content = _decoded(stream.read(), path, told)
    if not content.strip():
        raise ValueError("it holds nothing but blanks")
    return _objects(content) if kind in ("json", "jsonl") else _cells(content, kind, path, told)


def _decoded(data: bytes, path: Path, told: list[str]) -> str:
    """Decode UTF-8, UTF-16 with its mark, and line by line what is neither as Windows-1252."""
    for mark in (b"\xff\xfe", b"\xfe\xff"):
        if data.startswith(mark):
            told.append(f"{path.name} is in UTF-16")
            return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    lines, odd = [], 0
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            odd += 1
            lines.append(line.decode("cp1252", errors="replace"))
    told.append(f"{path.name}: {odd} of {len(lines)} lines are no UTF-8 and were read as Windows-1252")
    return "\n".join(lines)


def _cells(content: str, kind: str, path: Path, told: list[str]) -> pa.Table:
    """A csv or tsv whose columns are all text, as it stands in the file."""
    content = content.lstrip("\r\n")
    first = content.splitlines()[0]
    usual = "\t" if kind == "tsv" else ","
    heads = {mark: next(csv.reader([first], delimiter=mark)) for mark in _DELIMITERS}
    delimiter = max(_DELIMITERS, key=lambda mark: (len(heads[mark]), mark == usual))
    if delimiter != usual:
        shown = "a tab" if delimiter == "\t" else f"'{delimiter}'"
        told.append(f"{path.name}: columns are parted by {shown}")
    odd: list[Any] = []

    def leave_out(row: Any) -> str:
        odd.append(row)
        return "skip"

    table = pyarrow.csv.read_csv(
        pa.BufferReader(content.encode("utf-8", errors="replace")),
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=leave_out
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in heads[delimiter]}, strings_can_be_null=False
        ),
    )
    if odd:
        told.append(
            f"{path.name}: left out {len(odd)} of {table.num_rows + len(odd)} rows: another number of cells than "
            f"the header's {odd[0].expected_columns}"
        )
    if content.count('"') % 2:
        what = "a quotation mark opens and is never closed, so that what follows it was read as one cell"
        if not table.num_rows:
            raise ValueError(f"{what}; close it, or double the marks inside of texts")
        told.append(f"warning: {path.name}: {what}; look at its last rows")
    return table


def _objects(content: str) -> pa.Table:
    """A list of objects, or one object a line; a column of mixed values becomes text."""
    rows = _as_one(content)
    if rows is None:
        rows = []
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected objects with a key for each column")
    names = dict.fromkeys(key for row in rows for key in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _as_one(content: str) -> list[Any] | None:
    """The rows of a file that is one value: a list of them, a list under the only key, or columns by name.

    Columns are lists of equal length, or objects with the same keys (as pandas writes a frame).

    Returns:
        The rows; None where the file is read line by line.
    """
    if content.lstrip().startswith("["):
        return list(json.loads(content))
    try:
        whole = json.loads(content)
    except ValueError:
        return None  # one object a line
    values = list(whole.values()) if isinstance(whole, dict) else []
    if len(values) == 1 and isinstance(values[0], list) and values[0] and isinstance(values[0][0], dict):
        return list(values[0])
    for kind in (list, dict):
        if len(values) > 1 and all(type(v) is kind and len(v) == len(values[0]) for v in values):
            places = values[0] if kind is dict else range(len(values[0]))
            if kind is list or all(v.keys() == values[0].keys() for v in values):
                return [{name: column[place] for name, column in whole.items()} for place in places]
    return None


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) == 1 and kinds <= {str, bool}:
        return pa.array(values)
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    return pa.array(texts, pa.string())
