"""No flipped bit and no truncation of a file goes unseen, and no bytes whatever harm the decoder."""

import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import files
from pipeline.errors import ArtifactError
from pipeline.masks import codec, rice, stairs
from pipeline.masks.mask import FORMAT, VERSION, Mask
from pipeline.masks.ranking import Ranking
from pipeline.masks.squeeze import pack_integers, squeeze
from pipeline.masks.table import read_table
from pipeline.runtime.canonical import canonical_json


@pytest.fixture(params=["mask", "ranking"])
def saved(
    request: pytest.FixtureRequest, every_coder: Mask, tmp_path: Path
) -> tuple[Path, Callable[[Path], object]]:
    """A small file, and what reads it."""
    path = tmp_path / "small.safetensors"
    if request.param == "mask":
        every_coder.save(path)
        table = files.read_file(path, format=FORMAT, version=VERSION)[1]["tensors"]
        coders = set(read_table(table.numpy().tobytes())[1].values())
        assert {"none", "all", "stairs", "varint"} < coders and any(coder in codec.RICE for coder in coders)
        return path, Mask.load
    scores = {name: torch.rand(50, 20, generator=torch.Generator().manual_seed(0)) for name in ("a", "b")}
    Ranking.of(scores, keep=0.1, info={"seed": 1}).save(path)
    return path, Ranking.load


def sections_of(raw: bytes) -> list[str]:
    """Name the section of each byte."""
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    places = ["header"] * len(raw)
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, end = (start + offset for offset in entry["data_offsets"])
            places[first:end] = [name] * (end - first)
    return places


def test_ten_thousand_flips_are_refused_by_section(saved: tuple[Path, Callable[[Path], object]]) -> None:
    path, load = saved
    raw, draw = path.read_bytes(), random.Random(0)
    places = sections_of(raw)
    assert len(set(places)) >= 3
    flips = [draw.randrange(8 * len(raw)) for _ in range(10_000)]
    with open(path, "r+b", buffering=0) as file:
        for at, bit in (divmod(flip, 8) for flip in flips):
            os.pwrite(file.fileno(), bytes([raw[at] ^ 1 << bit]), at)
            with pytest.raises(ArtifactError) as refusal:
                load(path)
            assert str(refusal.value).startswith(f"{path}: section '{places[at]}' is corrupt: ")
            os.pwrite(file.fileno(), raw[at : at + 1], at)
    load(path)


def test_every_truncation_is_refused(saved: tuple[Path, Callable[[Path], object]]) -> None:
    path, load = saved
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(ArtifactError, match=r"small\.safetensors: section '[a-z]+' is corrupt: "):
            load(path)


# Without the file's checksums


def row(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def decoded(table: bytes, body: bytes) -> bool:
    """Decode in bounded memory; tell whether the bytes are a mask, which is then one in every respect."""
    tracemalloc.start()
    try:
        index, chosen = codec.decode({"tensors": row(table), "coordinates": row(body)}, "f")
    except ArtifactError as refusal:
        assert str(refusal).startswith("f: section '") and "\n" not in str(refusal)
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6 + 40 * 1024 * (len(table) + len(body))  # LZMA's window, and the bounds of squeeze.py
    assert list(chosen) == list(index)
    for name, part in chosen.items():
        if part is not None and part.numel():
            assert part.dtype == torch.int64 and int(part[0]) >= 0 and int(part[-1]) < index.numel(name)
            assert bool((part[1:] > part[:-1]).all())
    return True


@given(st.binary(max_size=400), st.binary(max_size=100))
def test_arbitrary_bytes(table: bytes, body: bytes) -> None:
    decoded(table, body)
    decoded(squeeze(table), body)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries({key: JSON for key in ("names", "shapes", "coders", "streams")}), st.binary(max_size=9)
)
def test_arbitrary_tables(table: dict[str, object], body: bytes) -> None:
    decoded(squeeze(canonical_json(table).encode()), body)


SIZE = st.one_of(st.integers(0, 70), st.integers(0, 2**62))
INTEGERS = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 2**63 - 1)), max_size=40)


def code_of(kind: str, values: list[int], raw: bytes) -> bytes:
    """Bytes that pass for a stream as far as possible."""
    if kind == "raw":
        return raw
    if kind == "rice":
        return rice.encode(np.array([value % 99 for value in values], dtype=np.int64), len(raw) % 5)
    return squeeze(pack_integers(np.array(values, dtype=np.int64)))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_tables_and_streams_that_nearly_fit(data: st.DataObject) -> None:
    """The right types, sums and coders, wrong or right numbers; some of these are masks."""
    coders = data.draw(
        st.lists(st.sampled_from(["none", "all", "stairs", "varint", "rice0h", "rice3h"]), max_size=4)
    )
    streams, body = [], b""
    for coder in sorted(set(coders) - {"none", "all"}):
        kind = data.draw(st.sampled_from(["raw", "packed", coder[:4] if coder in codec.RICE else "packed"]))
        values = data.draw(INTEGERS)
        code = code_of(kind, values, data.draw(st.binary(max_size=60)))
        streams.append([coder, data.draw(st.one_of(st.just(len(values)), SIZE)), len(code)])
        body += code
    shapes = [data.draw(st.lists(SIZE, max_size=3)) for _ in coders]
    table = {
        "names": [f"0 {i}" for i in range(len(coders))],
        "shapes": shapes,
        "coders": coders,
        "streams": streams,
    }
    decoded(squeeze(canonical_json(table).encode()), body)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_staircases_of_arbitrary_integers(data: st.DataObject) -> None:
    """Sizes that agree with the integers that follow, so that every later check is reached."""
    rows, columns, wrong = (data.draw(st.integers(0, 12)) for _ in range(3))
    rest = [data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for n in (rows, rows, columns, columns)]
    gaps = data.draw(st.lists(st.integers(0, 9), min_size=wrong, max_size=wrong))
    code = squeeze(pack_integers(np.array([rows, columns, wrong, *sum(rest, []), *gaps], dtype=np.int64)))
    shape = (data.draw(st.integers(0, 50)), data.draw(st.integers(0, 50)))
    try:
        (part,) = stairs.decode(np.frombuffer(code, dtype=np.uint8), [shape])
    except ValueError:
        return
    assert (np.diff(part) > 0).all() and (len(part) == 0 or 0 <= part[0] <= part[-1] < shape[0] * shape[1])
