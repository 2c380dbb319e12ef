"""The one file writer: atomic, durable writes, and checksummed safetensors.

An artifact is a plain safetensors file, readable by any safetensors library::

    8 bytes   header length, little-endian
    header    {"__metadata__":{"checksum":"<64 hex>","fishmask":"<JSON>"},"<section>":{...},...}
              a section's entry is {"dtype", "shape", "data_offsets"}
    data      the sections, widest dtype first, then by name: no holes, each aligned to its items

``fishmask`` is canonical JSON: format, version, meta, and each section's BLAKE2b-256. ``checksum`` is the
BLAKE2b-256 of length and header with its own 64 digits read as zeros. The same content gives the same bytes.
Nothing is unpickled, and nothing is allocated before the file's real size and checksum vouch for it.
"""

import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from pipeline.errors import ArtifactError, ForeignError, ParamsError
from pipeline.parameters import tensor_bytes
from pipeline.runtime.atomic import replace_file
from pipeline.runtime.canonical import canonical_json, strict_json
from pipeline.runtime.canonical import plain_json as plain_json

DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 1 << 24  # bytes; a header costs ~250 per section
_START = b'{"__metadata__":{"checksum":"'
_ZEROS = b"0" * 64


def write_bytes(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
    """Write a file atomically and durably: after a crash it holds the old bytes or the new ones, never a mix.

    The bytes go to a temporary name in the same folder, are fsynced and renamed, and the folder is fsynced. An
    existing file's permissions are kept; a new file follows the umask.

    Raises:
        StorageError: if the disk is full or the folder missing or not writable; no temporary file stays behind.
    """  # noqa: DOC502 - raised by what it calls
    replace_file(Path(path), [data])


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON for people and git (indented, keys sorted, trailing newline), as ``write_bytes`` does.

    Raises:
        ParamsError: if the value is no JSON (NaN and infinities are not).
        StorageError: if it cannot be written.
    """  # noqa: DOC502 - raised by what it calls
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ParamsError(f"{path}: the value to write is no JSON ({error})") from None
    write_bytes(path, f"{text}\n".encode())


def write_file(
    path: str | os.PathLike[str],
    *,
    format: str,
    version: int,
    meta: Mapping[str, Any],
    sections: Mapping[str, Tensor],
) -> int:
    """Write an artifact, atomically and durably.

    Args:
        path: the file; its folder must exist.
        format: what it is (``fishmask-mask``, ``fishmask-delta``, ...).
        version: of that format's layout, from 1.
        meta: JSON-able metadata.
        sections: tensors by name, of any shape, in a dtype of ``DTYPES``, on any device.

    Returns:
        The file's size in bytes.

    Raises:
        ParamsError: if meta is no JSON, or a section's dtype has no place in the format.
        StorageError: if the file cannot be written.
    """  # noqa: DOC502 - raised by what it calls
    for name, tensor in sections.items():
        if tensor.dtype not in _NAMES or name == "__metadata__":
            raise ParamsError(f"{path}: section '{name}' of {tensor.dtype} cannot be stored")
    order = sorted(sections, key=lambda name: (-sections[name].element_size(), name))
    entries, end = {}, 0
    for name in order:
        tensor = sections[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    about = {
        "format": format,
        "version": version,
        "meta": plain_json(meta, f"{path}: meta"),
        "sections": {name: _checksum(tensor_bytes(tensor)) for name, tensor in sections.items()},
    }
    head = {"__metadata__": {"checksum": _ZEROS.decode(), "fishmask": canonical_json(about)}, **entries}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts 8-aligned in the file
    blank = struct.pack("<Q", len(text)) + text
    checksum = _checksum(blank).encode()
    header = blank[: 8 + len(_START)] + checksum + blank[8 + len(_START) + 64 :]
    replace_file(Path(path), (header if i == 0 else tensor_bytes(sections[n]) for i, n in enumerate(["", *order])))
    return len(header) + end


def read_file(
    path: str | os.PathLike[str], *, format: str, version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an artifact and verify all of it first: header, sizes, and the checksum of every section.

    Args:
        path: the file.
        format: what it must be.
        version: the newest layout the caller knows.

    Returns:
        meta, and the sections by name (CPU tensors that own their memory).

    Raises:
        ArtifactError: if the file is missing, corrupt, truncated, too long, foreign, of another format, or of a
            newer version; the message names the file, the section and the reason.
    """  # noqa: DOC502 - raised by what it calls
    with _opened(path) as (file, size):
        about, layout = _expected(path, file, size, format, version)
        sections = {name: _read_section(path, file, name, *layout[name]) for name in layout}
    for name, tensor in sections.items():
        if _checksum(tensor_bytes(tensor)) != about["sections"][name]:
            _corrupt(path, name, "its checksum does not match")
        if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            _corrupt(path, name, "a boolean is neither 0 nor 1")
    return about["meta"], sections


def read_header(
    path: str | os.PathLike[str], *, format: str, version: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Read what an artifact says of itself, its header and sizes verified, its sections left unread.

    Args:
        path: the file.
        format: what it must be.
        version: the newest layout the caller knows.

    Returns:
        meta, and the bytes of each section by name.

    Raises:
        ArtifactError: as in ``read_file``, but for the content of sections.
    """  # noqa: DOC502 - raised by what it calls
    with _opened(path) as (file, size):
        about, layout = _expected(path, file, size, format, version)
    return about["meta"], {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in layout.items()}


def format_of(path: str | os.PathLike[str]) -> str:
    """Tell what an artifact is, by its verified header.

    Returns:
        The format it was written with.

    Raises:
        ArtifactError: if the file is missing, foreign, or its header corrupt.
    """  # noqa: DOC502 - raised by what it calls
    with _opened(path) as (file, size):
        return str(_about(path, _read_header(path, file, size)[0])["format"])


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading, and tell its size."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: opening a named pipe would wait forever
            raise ArtifactError(f"{path}: is not a file; name an artifact file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; check the path, or make the file first") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None


def _corrupt(path: str | os.PathLike[str], section: str, why: str) -> NoReturn:
    raise ArtifactError(f"{path}: section '{section}' is corrupt: {why}; fetch or make the file again")


def _checksum(data: bytes | memoryview) -> str:
    return blake2b(data, digest_size=32).hexdigest()


def _read_header(path: str | os.PathLike[str], file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Read and verify the header; returns it parsed, and where the data starts."""
    raw = file.read(8)
    if len(raw) < 8:
        _corrupt(path, "header", f"the file has {size} bytes, too few for any safetensors file")
    length = struct.unpack("<Q", raw)[0]
    if length > size - 8:
        _corrupt(
            path, "header", f"it claims {length} bytes, the file has {size}: truncated, or no safetensors file"
        )
    if length > _MAX_HEADER:
        _corrupt(path, "header", f"it claims {length} bytes, more than the {_MAX_HEADER} allowed")
    raw += file.read(length)
    start = 8 + len(_START)
    known = raw[8:start] == _START and len(raw) >= start + 64
    if not known or _checksum(raw[:start] + _ZEROS + raw[start + 64 :]).encode() != raw[start : start + 64]:
        if _is_foreign(raw[8:]):
            raise ForeignError(f"{path}: is a safetensors file, but not one written by fishmask")
        _corrupt(path, "header", "its checksum does not match" if known else "it is no fishmask header")
    try:
        head = strict_json(raw[8:].decode())
    except ValueError as error:
        _corrupt(path, "header", str(error))
    return head, 8 + length


def _is_foreign(header: bytes) -> bool:
    """Tell another program's safetensors header from a damaged one of ours."""
    try:
        head = strict_json(header.decode())
    except ValueError:
        return False
    about = head.get("__metadata__", {}) if isinstance(head, dict) else None
    entries = [entry for name, entry in head.items() if name != "__metadata__"] if about is not None else []
    ours = isinstance(about, dict) and ("fishmask" in about or "checksum" in about)
    return about is not None and not ours and all(isinstance(e, dict) and "data_offsets" in e for e in entries)


def _expected(
    path: str | os.PathLike[str], file: BinaryIO, size: int, format: str, version: int
) -> tuple[dict[str, Any], dict[str, tuple[torch.dtype, list[int]]]]:
    """Read the header of a file that must be of a format and version; returns what it says, and the layout."""
    head, start = _read_header(path, file, size)
    about = _about(path, head)
    if about["format"] != format:
        raise ArtifactError(f"{path}: is a {about['format']} file; expected a {format} file")
    if about["version"] > version:
        raise ArtifactError(
            f"{path}: is a {format} file of version {about['version']}, written by a newer fishmask; this one "
            f"reads up to version {version}: upgrade fishmask"
        )
    return about, _layout(path, head, about["sections"], size - start)


def _about(path: str | os.PathLike[str], head: Any) -> dict[str, Any]:
    """Check what the file says it is; returns its format, version, meta and section checksums."""
    try:
        about = strict_json(head["__metadata__"]["fishmask"])
        found, number, meta, sums = about["format"], about["version"], about["meta"], about["sections"]
        if not (isinstance(found, str) and type(number) is int and number >= 1 and isinstance(meta, dict)):
            raise ValueError("format, version or meta is of the wrong type")
        if not isinstance(sums, dict) or set(sums) != set(head) - {"__metadata__"}:
            raise ValueError("its sections and checksums do not pair up")
    except (KeyError, TypeError, ValueError) as error:
        _corrupt(path, "header", f"its metadata is malformed ({error})")
    return dict(about)


def _layout(
    path: str | os.PathLike[str], head: Mapping[str, Any], sums: Mapping[str, str], size: int
) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Check dtypes, shapes and byte ranges against the ``size`` bytes of data; returns them in file order."""
    spans, layout = [], {}
    for name in sums:
        try:
            entry = head[name]
            dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            _corrupt(path, name, "its entry lacks a known dtype, a shape or two offsets")
        if not isinstance(shape, list) or any(
            type(v) is not int or not 0 <= v < 2**63 for v in [*shape, start, end]
        ):
            _corrupt(path, name, "its shape or offsets are no sizes")
        if prod(shape) * dtype.itemsize != end - start or end > size or start % dtype.itemsize:
            _corrupt(path, name, f"its shape {shape} and bytes {start}..{end} do not fit the {size} bytes of data")
        spans.append((start, end, name))
        layout[name] = (dtype, shape)
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            _corrupt(path, name, f"it starts at byte {start} of the data instead of {position}")
        position = end
    if position != size:
        raise ArtifactError(
            f"{path}: has {size - position} bytes after its last section; it was changed after it was written"
        )
    return {name: layout[name] for _, _, name in sorted(spans)}


def _read_section(
    path: str | os.PathLike[str], file: BinaryIO, name: str, dtype: torch.dtype, shape: list[int]
) -> Tensor:
    """Read one section into a tensor of its own."""
    try:
        tensor = torch.empty(shape, dtype=dtype)
    except (RuntimeError, TypeError) as error:  # such as 0 elements of a shape whose strides overflow
        _corrupt(path, name, f"its shape {shape} makes no tensor ({str(error).splitlines()[0]})")
    target = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    if file.readinto(target) != len(target):  # type: ignore[attr-defined]
        _corrupt(path, name, "the file ends before it does")
    return tensor
