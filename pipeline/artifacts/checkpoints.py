"""Checkpoints as the hub lays them out: a safetensors file, or shards with an index; tensors read when asked for.

    model.safetensors                       one file, alone or in a folder with config.json and the tokenizer's
    model.safetensors.index.json            {"metadata": {...}, "weight_map": {"<tensor>": "<shard>", ...}}
    model-00001-of-00002.safetensors ...    the shards that it names

Only headers are read at first; a tensor costs its own bytes, for as long as the caller keeps it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import MismatchError, ModelError
from pipeline.parameters import Shape

FILE = "model.safetensors"
INDEX = ".safetensors.index.json"
# by the names in files, in the order (descending) in which the safetensors library stores them
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
_WINDOW = 1 << 24  # bytes read through one memory map before it is closed: its pages count as memory in use


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: the file's name in the checkpoint's folder.
        key: the tensor's name in that file.
        dtype: its dtype.
        shape: its shape.
    """

    file: str
    key: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


class _Reader:
    """Reads tensors through memory maps, one file at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None
        self._read = 0

    def tensor(self, path: Path, entry: Entry) -> Tensor:
        if self._path != path or self._read > _WINDOW:
            self._file = None  # before the next is mapped
            self._path, self._file, self._read = path, _open(path), 0
        self._read += entry.nbytes
        try:
            tensor: Tensor = self._file.get_tensor(entry.key)
        except (SafetensorError, OSError, RuntimeError) as error:
            _unreadable(path, error)
        return tensor


@dataclass(frozen=True)
class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read from its file on access (CPU; not to be written on).

    Attributes:
        where: as the user named it, for messages.
        folder: where its files lie.
        alone: True for a file that was named itself; False for a folder, whose other files belong to it.
        entries: name -> where the tensor lies, file by file.
        metadata: file -> the metadata of its header.
        index: the index's name and content, where there is one.
        added: what ``named_like`` put before the names in the files; they are to be written with it.
        dropped: what ``named_like`` left out of the names in the files; they are to be written with it.
    """

    where: str
    folder: Path
    alone: bool
    entries: dict[str, Entry]
    metadata: dict[str, dict[str, str] | None]
    index: tuple[str, dict[str, Any]] | None = None
    added: str = ""
    dropped: str = ""
    _reader: _Reader = field(default_factory=_Reader, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open a safetensors file, an index, or a folder that holds ``model.safetensors`` or an index.

        Returns:
            The checkpoint, headers read and checked.

        Raises:
            ModelError: if it is missing, foreign or corrupt, or an index and its shards do not fit together.
        """  # noqa: DOC502 - raised by what it calls
        if path.is_dir():
            return cls._of_folder(path)
        if path.name.endswith(INDEX) and path.is_file():
            return cls._of_index(str(path), path)
        entries, metadata = _header(path)
        return cls(str(path), path.parent, True, entries, {path.name: metadata})

    @classmethod
    def _of_folder(cls, folder: Path) -> "Checkpoint":
        if (folder / FILE).is_file():  # transformers reads it first, too
            entries, metadata = _header(folder / FILE)
            return cls(str(folder), folder, False, entries, {FILE: metadata})
        found = sorted(folder.glob(f"*{INDEX}"))
        if len(found) == 1:
            return cls._of_index(str(folder), found[0])
        reason = (
            f"{len(found)} indices; name the one that is meant" if found else f"neither {FILE} nor model{INDEX}"
        )
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        hint = "".join(
            f" ({name} is a pickle, which is never loaded: convert it with save_pretrained)"
            for name in pickled[:1]
        )
        raise ModelError(f"{folder}: holds {reason}; expected a folder in the hub's layout{hint}")

    @classmethod
    def _of_index(cls, where: str, path: Path) -> "Checkpoint":
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            shard_of = {str(name): str(shard) for name, shard in index["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: is no index of shards ({type(error).__name__}: {error})") from None
        entries: dict[str, Entry] = {}
        metadata: dict[str, dict[str, str] | None] = {}
        for shard in sorted(set(shard_of.values())):
            if Path(shard).name != shard:
                raise ModelError(f"{path}: names shard '{shard}'; expected a file beside the index")
            if not (path.parent / shard).is_file():
                raise ModelError(f"{path}: names shard '{shard}', which is missing; fetch the model again")
            held, metadata[shard] = _header(path.parent / shard)
            named = {name for name, file in shard_of.items() if file == shard}
            for name in sorted(named ^ set(held)):
                reason = f"not in {shard}" if name in named else f"in {shard}, but not named for it"
                raise ModelError(f"{path}: tensor '{name}' is {reason}; fetch index and shards again")
            entries |= held
        return cls(where, path.parent, False, entries, metadata, (path.name, index))

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        return self._reader.tensor(self.folder / entry.file, entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def written(self, name: str) -> str:
        """Name a tensor as a copy of these files has it.

        Returns:
            The name.
        """
        return self.entries[name].key if self.dropped and name in self.entries else self.dropped + name

    def named_like(self, names: Iterable[str]) -> "Checkpoint":
        """Name the tensors as a model does that holds this one's as its base, or is the base of this one's.

        A bare encoder's ``embeddings...`` is ``bert.embeddings...`` in a classifier: one leading component is
        added to all names, or taken off all that have it, whichever makes more of them known. Names that fit as
        they are stay.

        Args:
            names: of the model's tensors.

        Returns:
            The checkpoint under those names.

        Raises:
            MismatchError: if no name fits in any way.
        """
        wanted = set(names)
        fits = {("", ""): len(wanted & self.entries.keys())}
        for start in {name.split(".")[0] + "." for name in wanted}:
            fits[start, ""] = sum(start + name in wanted for name in self.entries)
        for start in {name.split(".")[0] + "." for name in self.entries}:
            bare = [name[len(start) :] for name in self.entries if name.startswith(start)]
            if not self.entries.keys() & set(bare):
                fits["", start] = sum(name in wanted for name in bare)
        added, dropped = max(fits, key=lambda way: (fits[way], way == ("", ""), way))
        if not fits[added, dropped] and wanted:
            raise MismatchError(
                f"{self.where}: none of its tensors is one of the delta's, such as '{min(wanted)}': another model"
            )
        entries = {added + name.removeprefix(dropped): entry for name, entry in self.entries.items()}
        return replace(self, entries=entries, added=added, dropped=dropped)


def _header(path: Path) -> tuple[dict[str, Entry], dict[str, str] | None]:
    """Read a file's header: its tensors in the order of their bytes, and its metadata."""
    file = _open(path)
    metadata: dict[str, str] | None = file.metadata()
    if metadata and "fishmask" in metadata:
        raise ModelError(f"{path}: is a fishmask artifact; name the model's safetensors file or folder")
    entries = {}
    for name in file.offset_keys():
        form = file.get_slice(name)
        dtype = DTYPES.get(form.get_dtype())
        if dtype is None:
            raise ModelError(f"{path}: tensor '{name}' is {form.get_dtype()}; expected one of {', '.join(DTYPES)}")
        entries[name] = Entry(path.name, name, dtype, tuple(form.get_shape()))
    return entries, metadata


def _open(path: Path) -> Any:
    if not path.is_file():  # opening a named pipe would wait forever
        raise ModelError(f"{path}: no such file; name a safetensors file or a model folder")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> NoReturn:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ModelError(f"{path}: is no sound safetensors file ({why}); fetch or make it again") from None
