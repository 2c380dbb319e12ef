"""Writing a changed copy of a checkpoint, tensor by tensor: the same files, names and layout, all or nothing."""

import json
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pipeline.artifacts.checkpoints import DTYPES, Checkpoint
from pipeline.parameters import Shape, put_, tensor_bytes
from pipeline.runtime.atomic import replace_file
from pipeline.runtime.atomic_folder import replace_folder

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_CHUNK = 1 << 20  # elements or bytes copied at once
# weights in other forms would be the unchanged ones
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf",
    ".tflite", ".mlmodel",
}  # fmt: skip
_ASIDE = {".git", ".cache", "__pycache__"}


@dataclass
class Edit:
    """What is different in the copy, tensors named as ``Checkpoint.named_like`` made them.

    Attributes:
        values: name -> coordinates (int64 [count], None: all) and the values [count] to put there.
        dtypes: name -> the dtype to store it in, where it is another; values are of that dtype.
        new: tensors that the checkpoint does not have.
        gone: names that the copy does not have.
        files: name -> bytes of further files of the folder, in place of those copied.
    """

    values: dict[str, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    new: dict[str, Tensor] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)

    def parts(self, source: Mapping[str, Tensor], name: str) -> Iterator[memoryview]:
        """Make the bytes of a tensor of the copy, some MiB at a time.

        Yields:
            Its bytes, in the dtype it is stored in.
        """
        flat = (self.new[name] if name in self.new else source[name]).reshape(-1)
        at, values = self.values.get(name, (None, None))
        if values is not None and at is None:
            flat = values.reshape(-1)
        dtype = self.dtypes.get(name, flat.dtype)
        for start in range(0, flat.numel(), _CHUNK):
            part = flat[start : start + _CHUNK].to(dtype)
            if at is not None and values is not None:
                first, last = torch.searchsorted(at, torch.tensor([start, start + _CHUNK])).tolist()
                part = part.clone()
                put_(part, at[first:last] - start, values[first:last])
            yield tensor_bytes(part)


def rewrite(source: Checkpoint, out: Path, edit: Edit) -> int:
    """Write a changed copy of a checkpoint.

    A file gives a file. A folder gives a folder with the same shards; its other files (config, tokenizer, README)
    are copied with their permissions, weights in other forms are not. New tensors go to the last shard. What
    stood at ``out`` is replaced at once, after all was written.

    Args:
        source: the checkpoint.
        out: the file or folder to write.
        edit: what is different.

    Returns:
        Bytes of tensors written.
    """
    shards: dict[str, list[str]] = {file: [] for file in source.metadata}
    for name, entry in source.entries.items():
        if name not in edit.gone:
            shards[entry.file].append(name)
    shards[list(shards)[-1]] += edit.new
    if source.alone:
        return sum(_write_shard(source, edit, file, names, out) for file, names in shards.items())
    with replace_folder(out) as folder:
        _copy_others(source, folder, skip=edit.files)
        for name, data in edit.files.items():
            replace_file(folder / name, [data], mode=_mode(source.folder / name))
        shards = {file: names for file, names in shards.items() if names or source.index is None}
        total = sum(_write_shard(source, edit, file, names, folder / file) for file, names in shards.items())
        if source.index is not None:
            _write_index(source, edit, shards, total, folder)
    return total


def _write_shard(source: Checkpoint, edit: Edit, file: str, names: list[str], path: Path) -> int:
    forms: dict[str, tuple[torch.dtype, Shape]] = {}
    origin = {}
    for name in names:
        tensor = edit.new.get(name)
        if tensor is None:
            entry = source.entries[name]
            form = edit.dtypes.get(name, entry.dtype), entry.shape
        else:
            form = tensor.dtype, tuple(tensor.shape)
        forms[source.written(name)] = form
        origin[source.written(name)] = name
    mode = _mode(source.folder / file)
    metadata = source.metadata[file]
    return write_tensors(path, forms, lambda name: edit.parts(source, origin[name]), metadata, mode)


def write_tensors(
    path: Path,
    forms: Mapping[str, tuple[torch.dtype, Shape]],
    parts_of: Callable[[str], Iterable[memoryview]],
    metadata: Mapping[str, str] | None,
    mode: int | None = None,
) -> int:
    """Write a safetensors file, byte for byte as that library does, one tensor in memory at a time.

    Args:
        path: the file.
        forms: name -> dtype and shape.
        parts_of: gives the bytes of a tensor.
        metadata: of its header.
        mode: permissions of a new file.

    Returns:
        Bytes of tensors written.
    """
    order = sorted(forms, key=lambda name: (-_RANKS[forms[name][0]], name))
    head: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = forms[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        head[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for name in order:
            yield from parts_of(name)

    replace_file(path, parts(), mode=mode)
    return end


def _write_index(source: Checkpoint, edit: Edit, shards: dict[str, list[str]], total: int, folder: Path) -> None:
    assert source.index is not None
    name, index = source.index
    about = dict(index.get("metadata") or {}) | {"total_size": total}
    if isinstance(about.get("total_parameters"), int):
        about["total_parameters"] += sum(tensor.numel() for tensor in edit.new.values())
        about["total_parameters"] -= sum(prod(source.entries[gone].shape) for gone in edit.gone)
    weights = {source.written(tensor): file for file, names in shards.items() for tensor in names}
    text = json.dumps(index | {"metadata": about, "weight_map": dict(sorted(weights.items()))}, indent=2)
    replace_file(folder / name, [f"{text}\n".encode()], mode=_mode(source.folder / name))


def _copy_others(source: Checkpoint, folder: Path, skip: Mapping[str, bytes]) -> None:
    """Copy what is no weights: links become files, permissions stay, folders of tools stay behind."""
    for place, inner, names in os.walk(source.folder):
        inner[:] = sorted(set(inner) - _ASIDE)
        target = folder / Path(place).relative_to(source.folder)
        target.mkdir(exist_ok=True)
        for name in sorted(names):
            path, top = Path(place) / name, target == folder
            weights = path.suffix in _WEIGHTS or name.endswith(".index.json") or (top and name in skip)
            if not weights and path.is_file():
                with open(path, "rb") as file:
                    replace_file(target / name, iter(lambda: file.read(_CHUNK), b""), mode=_mode(path))


def _mode(path: Path) -> int | None:
    """Permissions that a copy of a file gets: the same, and writable by its owner."""
    return stat.S_IMODE(path.stat().st_mode) | stat.S_IWUSR if path.is_file() else None
