"""What a fetched folder holds: one parquet file a split and ``manifest.json``; same content, same bytes."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.files import write_bytes, write_json

FORMAT, VERSION = "fishmask-data", 1
_AGAIN = "run `fishmask fetch` again"


def write_split(folder: Path, split: str, table: pa.Table, metadata: dict[str, str] | None = None) -> str:
    """Write one split; nothing in the bytes depends on time or place.

    Args:
        folder: where.
        split: its name.
        table: its rows.
        metadata: what the file says besides; no part of the digest.

    Returns:
        The digest of its content (see ``table_digest``).
    """
    table = table.replace_schema_metadata(metadata).combine_chunks()
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, version="2.6", compression="zstd", compression_level=3, write_statistics=False,
        store_schema=metadata is not None, row_group_size=1 << 20,
    )  # fmt: skip
    write_bytes(folder / f"{split}.parquet", buffer.getbuffer())
    return table_digest(table)


def read_split(folder: Path, split: str, expected: dict[str, Any]) -> pa.Table:
    """Read one split back and compare it with its manifest.

    Args:
        folder: the fetched folder.
        split: its name.
        expected: ``rows`` and ``digest`` of the manifest.

    Returns:
        The table, each column in one chunk.

    Raises:
        DataError: if the file is missing or corrupt, or not the one the manifest was written with.
    """
    path = folder / f"{split}.parquet"
    try:
        table = pq.ParquetFile(path).read().combine_chunks()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {_AGAIN}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: corrupt ({str(error).splitlines()[0]}); {_AGAIN}") from None
    if table.num_rows != expected["rows"] or table_digest(table) != expected["digest"]:
        raise DataError(f"{path}: not the data that manifest.json describes; {_AGAIN}")
    return table


def table_digest(table: pa.Table) -> str:
    """Digest a table's values: BLAKE2b-256 over each column's name, type, lengths and bytes, in order.

    It depends on neither the file format nor the chunks, so that equal data has equal digests in any version.

    Returns:
        64 hex digits.
    """
    state = hashlib.blake2b(digest_size=32)
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        # parquet renames the field inside a list, so its type is spelt out here
        kind = f"list of {column.type.value_type}" if pa.types.is_list(column.type) else str(column.type)
        state.update(f"{name} {kind} {len(column)}\n".encode())
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            texts = [text.encode() if isinstance(text, str) else text for text in column.to_pylist()]
            state.update(np.array([len(text) for text in texts], dtype="<i8").tobytes() + b"".join(texts))
        elif pa.types.is_list(column.type):
            state.update(np.diff(values_of(column.offsets)).astype("<i8").tobytes())
            state.update(values_of(column.flatten()).tobytes())
        elif pa.types.is_fixed_size_binary(column.type):
            width = column.type.byte_width
            state.update(
                memoryview(column.buffers()[1])[column.offset * width : (column.offset + len(column)) * width]
            )
        else:
            state.update(values_of(column).tobytes())
    return state.hexdigest()


def values_of(column: pa.Array) -> np.ndarray:
    """View the numbers of a column; ``to_numpy`` would import pandas first.

    Returns:
        [N], read-only, of the column's type.
    """
    return np.from_dlpack(column)


def data_digest(manifest: dict[str, Any]) -> str:
    """Digest all of a fetched folder that reaches a model: its splits, classes and normalisation.

    Returns:
        BLAKE2b-256 (hex).
    """
    parts = {
        "kind": manifest["kind"],
        "classes": manifest["classes"],
        "image": manifest.get("image"),
        "splits": {name: split["digest"] for name, split in manifest["splits"].items()},
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=32).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, last: a folder without one is not a fetched folder."""
    write_json(folder / "manifest.json", manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a fetched folder.

    Returns:
        Its content.

    Raises:
        DataError: if it is missing, no manifest, or newer than this version reads.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise DataError(f"{path}: cannot be read; expected a fetched folder, {_AGAIN}") from None
    except ValueError:
        raise DataError(f"{path}: corrupt, no JSON; {_AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of fetched data; {_AGAIN}")
    if manifest.get("version") != VERSION:
        raise DataError(f"{path}: version {manifest.get('version')}, this program reads {VERSION}; {_AGAIN}")
    if manifest.get("data_digest") != data_digest(manifest):
        raise DataError(f"{path}: edited by hand or corrupt, its data_digest does not fit; {_AGAIN}")
    return manifest
