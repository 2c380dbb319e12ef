"""The one file writer: exact, deterministic, durable; whatever is not exactly what was written is refused."""

import errno
import json
import os
import random
import struct
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline import files
from pipeline.errors import ArtifactError, ParamsError, StorageError
from pipeline.runtime import atomic

SECTIONS = {
    "values": torch.tensor([1.5, -0.0, 3e-45]),
    "half": torch.arange(3, dtype=torch.bfloat16),
    "wide": torch.arange(4).reshape(2, 2),
    "flags": torch.tensor([True, False, True]),
    "none": torch.empty(0, 7, dtype=torch.float64),
    "one": torch.tensor(7, dtype=torch.int32),
    "bytes": torch.arange(5, dtype=torch.uint8),
}
META = {"digest": "ab" * 32, "info": {"seed": 1, "name": "é", "list": [1, 2.5, None, True]}}


def write(path: Path, **changes: Any) -> int:
    return files.write_file(
        path, **{"format": "thing", "version": 1, "meta": META, "sections": SECTIONS} | changes
    )


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return files.read_file(path, format="thing", version=1)


def forged(path: Path, head: Any, data: bytes = b"", *, text: bytes | None = None) -> Path:
    """Write a hostile file whose header checksum is right; ``head`` lacks it."""
    raw = text or json.dumps(head, separators=(",", ":")).encode()
    raw = raw.replace(b'"__metadata__":{', b'"__metadata__":{"checksum":"' + b"0" * 64 + b'",', 1)
    raw = struct.pack("<Q", len(raw)) + raw
    checksum = blake2b(raw, digest_size=32).hexdigest().encode()
    path.write_bytes(raw.replace(b"0" * 64, checksum, 1) + data)
    return path


def header(entries: dict[str, Any], data: dict[str, bytes], **about: Any) -> dict[str, Any]:
    sums = {name: blake2b(part, digest_size=32).hexdigest() for name, part in data.items()}
    text = {"format": "thing", "version": 1, "meta": {}, "sections": sums} | about
    return {"__metadata__": {"fishmask": json.dumps(text)}, **entries}


def test_round_trip_is_exact_and_readable_by_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert write(path) == path.stat().st_size
    meta, sections = read(path)
    assert meta == META and set(sections) == set(SECTIONS)
    with safe_open(path, "pt") as foreign:
        for name, expected in SECTIONS.items():
            for got in (sections[name], foreign.get_tensor(name)):
                assert got.dtype == expected.dtype and got.shape == expected.shape
                assert got.flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8))  # -0.0 too
    assert files.format_of(path) == "thing"


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", sections=dict(reversed(SECTIONS.items())), meta=dict(reversed(META.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_sections_are_aligned(tmp_path: Path) -> None:
    write(tmp_path / "a")
    raw = (tmp_path / "a").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    assert start % 8 == 0
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % SECTIONS[name].element_size() == 0


def test_a_view_of_a_larger_tensor_is_written_alone(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write(tmp_path / "a", sections={"column": base[:, 1], "turned": base.t()})
    sections = read(tmp_path / "a")[1]
    assert sections["column"].equal(base[:, 1]) and sections["turned"].equal(base.t())


def test_flipped_bits_of_every_byte_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path)
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    with open(path, "r+b", buffering=0) as file:
        for at in range(len(raw)):
            every = at < 8 or at >= start  # all bits of the length and the data; of the header, one bit a byte
            for bit in range(8) if every else (at % 8,):
                os.pwrite(file.fileno(), bytes([raw[at] ^ 1 << bit]), at)
                with pytest.raises(ArtifactError, match="a: ") as refusal:
                    read(path)
                assert "\n" not in str(refusal.value)
            os.pwrite(file.fileno(), raw[at : at + 1], at)
    read(path)


def test_a_flip_names_its_section(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path)
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__" and SECTIONS[name].numel():
            damaged = bytearray(raw)
            damaged[start + entry["data_offsets"][1] - 1] ^= 4
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError, match=f"'{name}' is corrupt: its checksum"):
                read(path)
    path.write_bytes(raw.replace(b"thing", b"thinG"))
    with pytest.raises(ArtifactError, match="'header' is corrupt: its checksum"):
        read(path)


def test_every_truncation_and_any_addition_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path)
    raw = path.read_bytes()
    for length in reversed(range(len(raw))):
        os.truncate(path, length)
        with pytest.raises(ArtifactError):
            read(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(ArtifactError, match="1 bytes after its last section"):
        read(path)


def test_what_the_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match="not one written by fishmask"):
        read(path)
    save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="not one written by fishmask"):
        read(path)
    path.write_bytes(b"PK\3\4" + bytes(range(200)))
    with pytest.raises(ArtifactError, match="header"):
        read(path)
    write(path, format="other")
    with pytest.raises(ArtifactError, match="is a other file; expected a thing"):
        read(path)
    write(path, version=3)
    with pytest.raises(ArtifactError, match="version 3, written by a newer fishmask.*version 1: upgrade"):
        read(path)
    with pytest.raises(ArtifactError, match="no such file"):
        read(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="is not a file"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="is not a file"):
        read(tmp_path / "pipe")


ROW = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
FOUR = {"x": b"\1\1\1\1"}


def test_a_forged_file_is_read_if_it_is_sound(tmp_path: Path) -> None:
    """The hostile cases below differ from this one in one thing each."""
    meta, sections = read(forged(tmp_path / "a", header({"x": ROW}, FOUR), FOUR["x"]))
    assert meta == {} and sections["x"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "entry",
    [
        ROW | {"dtype": "F8_E4M3"},
        ROW | {"dtype": ["U8"]},
        ROW | {"shape": [5]},
        ROW | {"shape": [-4]},
        ROW | {"shape": [4.0]},
        ROW | {"shape": [True, 4]},
        ROW | {"shape": 4},
        ROW | {"shape": [2**62, 2**62]},
        ROW | {"shape": [2**32, 2**32, 4]},
        ROW | {"shape": [2**64 + 4]},
        ROW | {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        ROW | {"data_offsets": [0, 5]},
        ROW | {"data_offsets": [4, 0]},
        ROW | {"data_offsets": [-4, 0]},
        ROW | {"data_offsets": [1, 5]},
        ROW | {"data_offsets": [0, 2**70], "shape": [2**70]},
        ROW | {"data_offsets": [0]},
        ROW | {"data_offsets": "04"},
        ROW | {"dtype": "BOOL", "data_offsets": [0, 4], "shape": [2]},
        {"dtype": "U8"},
        7,
    ],
)
def test_hostile_entries_are_refused(tmp_path: Path, entry: Any) -> None:
    with pytest.raises(ArtifactError, match="'x'|after its last"):
        read(forged(tmp_path / "a", header({"x": entry}, FOUR), FOUR["x"]))


def test_overlaps_and_holes_are_refused(tmp_path: Path) -> None:
    for second in ([0, 4], [2, 6], [5, 8]):
        entries = {"x": ROW, "y": ROW | {"shape": [second[1] - second[0]], "data_offsets": second}}
        with pytest.raises(ArtifactError, match="'y'"):
            read(forged(tmp_path / "a", header(entries, FOUR | {"y": b"\1\1\1\1"}), b"\1" * 8))


def test_a_boolean_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="neither 0 nor 1"):
        read(forged(tmp_path / "a", header({"x": ROW | {"dtype": "BOOL"}}, {"x": b"\1\0\2\0"}), b"\1\0\2\0"))


@pytest.mark.parametrize(
    "about",
    [
        {"version": True}, {"version": "1"}, {"version": 0}, {"version": 1.0}, {"format": None}, {"meta": []},
        {"sections": {}}, {"sections": []}, {"sections": {"x": "", "y": ""}},
    ],
)  # fmt: skip
def test_hostile_metadata_is_refused(tmp_path: Path, about: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="header"):
        read(forged(tmp_path / "a", header({"x": ROW}, FOUR, **about), FOUR["x"]))


@pytest.mark.parametrize(
    "text",
    [
        b'{"__metadata__":{"fishmask":"{}"}}',
        b'{"__metadata__":{"fishmask":3}}',
        b'{"__metadata__":{"fishmask":"{}"},"x":1,"x":2}',
        b'{"__metadata__":{"fishmask":"' + b"[" * 100_000 + b'"}}',
        b'{"__metadata__":{"x":' + b"[" * 200_000 + b"}}",
        b'{"__metadata__":{"x":NaN}}',
        b'{"__metadata__":{"x":' + b"9" * 10_000 + b"}}",
        b'{"__metadata__":{"x":"\xff"}}',
        b'{"__metadata__":{}} trailing',
    ],
)
def test_hostile_json_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(ArtifactError, match="header"):
        read(forged(tmp_path / "a", None, text=text))


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_is_believed_no_further_than_the_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with open(path, "r+b") as file:
        file.truncate(2**25)  # sparse: a real size beyond the header's cap
    with pytest.raises(ArtifactError, match="header"):
        read(path)


def test_what_cannot_be_stored_is_refused_before_writing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(ParamsError, match="complex64"):
        write(path, sections={"z": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(ParamsError, match="no JSON"):
        write(path, meta={"score": float("nan")})
    with pytest.raises(ParamsError, match="no JSON"):
        files.write_json(path, {"t": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_json_is_sorted_and_ends_in_a_newline(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": "é",\n  "b": 1\n}\n'


@pytest.mark.parametrize(
    ("function", "code", "advice"),
    [
        ("fsync", errno.ENOSPC, "free some space"),
        ("fsync", errno.EIO, "choose another folder"),
        ("replace", errno.EACCES, "may write to"),
        ("open", errno.EROFS, "read-only"),
        ("fchmod", errno.EPERM, "may write to"),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int, advice: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, function, fail)
        with pytest.raises(StorageError, match=advice) as refusal:
            files.write_bytes(path, b"new")
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_in_the_middle_of_the_data_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def parts() -> Any:
        yield b"new" * 100_000
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match="No space left.*free some space"):
        atomic.replace_file(path, parts())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(atomic.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_bad_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, why in (
        (tmp_path / "absent" / "a", "create the folder first"),
        (tmp_path / "file" / "a", "not a folder"),
        (tmp_path, "name a file"),
    ):
        with pytest.raises(StorageError, match=why) as refusal:
            files.write_bytes(path, b"x")
        assert "\n" not in str(refusal.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_file_and_its_folder_are_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", sync)
    monkeypatch.setattr(atomic.os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    files.write_bytes(tmp_path / "a", b"x")
    expected = ["file", "rename", "folder"]
    assert calls == expected if os.path.isdir("/proc/self/fd") else len(calls) == 3


def test_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a"
    old = os.umask(0o027)
    try:
        files.write_bytes(path, b"1")
        assert path.stat().st_mode & 0o777 == 0o640  # a new file honours the umask
        path.chmod(0o604)
        write(path)
        assert path.stat().st_mode & 0o777 == 0o604  # an existing one keeps its own
    finally:
        os.umask(old)


def test_random_damage_beyond_single_bits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path)
    raw, draw = path.read_bytes(), random.Random(0)
    for _ in range(500):
        damaged = bytearray(raw)
        start = draw.randrange(len(raw))
        damaged[start : start + draw.randrange(1, 40)] = draw.randbytes(draw.randrange(40))
        if damaged != raw:
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError):
                read(path)
