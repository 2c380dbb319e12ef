"""One way in for every file format, and one line for every file that cannot be read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.tasks.tables import read_table

ROWS = [
    {"text": 'says "hi", twice', "label": 0},
    {"text": "line\nbreak\tand tab", "label": 1},
    {"text": "007", "label": 0},
    {"text": "null", "label": 1},
]


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def separated(path, mark):
    lines = [mark.join(["text", "label"])] + [mark.join([quoted(r["text"]), str(r["label"])]) for r in ROWS]
    path.write_text("\n".join(lines) + "\n")


WRITERS = {
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "csv": lambda path: separated(path, ","),
    "tsv": lambda path: separated(path, "\t"),
    "jsonl": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_reads_the_same_rows(tmp_path, kind):
    path = tmp_path / f"train.{kind}"
    WRITERS[kind](path)
    assert read_table(path, ("text",)).to_pylist() == ROWS


def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n007,1\n1e3,0\n")
    assert read_table(path, ("text",)).column("text").to_pylist() == ["007", "1e3"]


BAD = {
    "missing.csv": (None, "no such file"),
    "train.xlsx": (b"x", "unknown format '.xlsx'; expected .parquet, .csv"),
    "zero.parquet": (b"", "the file is empty"),
    "head.csv": (b"text,label\n", "holds no rows"),
    "torn.parquet": (b"PAR1 and then nothing", "cannot be read as parquet"),
    "ragged.csv": (b"text,label\na,0\nb,1,2\n", "cannot be read as csv"),
    "latin.csv": (b"text,label\ncaf\xe9,0\n", "cannot be read as csv"),
    "twice.csv": (b"text,text\na,b\n", "column 'text' appears twice"),
    "torn.jsonl": (b'{"text": "a"}\n{"text": ', "cannot be read as jsonl"),
    "torn.json": (b'[{"text": "a"}, ', "cannot be read as json"),
    "flat.json": (b"[1, 2]", "expected a list of objects"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unreadable_file_is_one_line_with_its_name(tmp_path, name):
    content, why = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / name, ("text",))
    message = str(caught.value)
    assert str(tmp_path / name) in message and why in message and "\n" not in message


def test_a_truncated_parquet_is_refused(tmp_path):
    path = tmp_path / "train.parquet"
    WRITERS["parquet"](path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_table(path)
