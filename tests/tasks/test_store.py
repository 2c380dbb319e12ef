"""Fetched folders: read back equal, and refused once they are not what was written."""

import json

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.tasks.base import Task
from pipeline.tasks.store import read_manifest, read_split, table_digest, write_split

TABLE = pa.table({
    "row": pa.array([0, 1, 2]),
    "text": pa.array(["a", "", "ü"]),
    "input_ids": pa.array([[1], [], [2, 3]], pa.list_(pa.int32())),
    "pixels": pa.array([b"ab", b"cd", b"ef"], pa.binary(2)),
    "label": pa.array(np.float32([0.5, 1, 2])),
})


def test_a_split_reads_back_as_written(tmp_path):
    digest = write_split(tmp_path, "train", TABLE)
    table = read_split(tmp_path, "train", {"rows": 3, "digest": digest})
    assert table.to_pydict() == TABLE.to_pydict()
    assert table["pixels"].type == pa.binary(2) and table["label"].type == pa.float32()


def test_the_digest_ignores_chunks_and_offsets_but_no_value():
    digest = table_digest(TABLE)
    pieces = pa.concat_tables([pa.concat_tables([TABLE, TABLE]).slice(3, 2), TABLE.slice(2)])
    assert table_digest(pieces) == digest
    others = [TABLE.take(pa.array([1, 0, 2])), TABLE.slice(0, 2), TABLE.drop_columns(["row"])]
    for name, value in [("text", ["a", "ü", ""]), ("text", ["aü", "", ""]), ("pixels", [b"ab", b"cd", b"eg"])]:
        column = pa.array(value, TABLE[name].type)
        others.append(TABLE.set_column(TABLE.column_names.index(name), name, column))
    lists = pa.array([[1, 2], [], [3]], pa.list_(pa.int32()))
    others.append(TABLE.set_column(2, "input_ids", lists))
    assert len({digest, *map(table_digest, others)}) == 1 + len(others)


def test_a_changed_split_is_refused(tmp_path, make, folder, made, bert):
    make(folder)
    fetched = tmp_path / "fetched"
    whole = (fetched / "train.parquet").read_bytes()
    for damaged in (whole[:-9], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], b""):
        (fetched / "train.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"train\.parquet: .*run `fishmask fetch` again"):
            Task.load(fetched, made.Model(str(bert)), "accuracy").batches("train", 4)
    write_split(fetched, "train", TABLE)
    with pytest.raises(DataError, match="not the data that manifest.json describes"):
        Task.load(fetched, made.Model(str(bert)), "accuracy").batches("train", 4)
    (fetched / "train.parquet").unlink()
    with pytest.raises(DataError, match="no such file"):
        Task.load(fetched, made.Model(str(bert)), "accuracy").batches("train", 4)


def test_a_manifest_that_is_none_is_refused(tmp_path, make, folder):
    manifest = make(folder).manifest
    path = tmp_path / "fetched" / "manifest.json"
    assert read_manifest(path.parent) == manifest
    cases = {
        "{": "corrupt, no JSON",
        "[]": "not a manifest",
        json.dumps({"format": "other"}): "not a manifest",
        json.dumps(manifest | {"version": 2}): "version 2, this program reads 1",
        json.dumps(manifest | {"classes": ["x", "y", "z"]}): "its data_digest does not fit",
    }
    for text, why in cases.items():
        path.write_text(text)
        with pytest.raises(DataError, match=why):
            read_manifest(path.parent)
    path.unlink()
    with pytest.raises(DataError, match="expected a fetched folder"):
        read_manifest(path.parent)
