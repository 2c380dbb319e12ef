"""The examples of a task as their source has them: one way in for packages, the hub, and folders."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import DataError, FishmaskError
from pipeline.tasks import cifar, demo
from pipeline.tasks.folders import SPLITS, SplitFiles, find_splits
from pipeline.tasks.published import Published, lookup
from pipeline.tasks.python_batches import LAYOUTS, SHAPE, find_layout, layout_files, read_layout
from pipeline.tasks.settings import DataSettings
from pipeline.tasks.sources import ZOOS, Source, data_folder, hub_error, offline, parse, prepare_hub
from pipeline.tasks.tables import read_table


@dataclass(frozen=True)
class RawSplit:
    """One split as read.

    Attributes:
        table: all its columns.
        where: the file (or source and split) to name in messages.
        remark: what a reader of a score must know (``18.6 % of train``), else empty.
    """

    table: pa.Table
    where: str
    remark: str = ""

    def class_names(self, label: str) -> list[str]:
        """Names of integer labels, where the file carries them as ``datasets`` writes them.

        Returns:
            The names in label order, or an empty list.
        """
        try:
            info = json.loads((self.table.schema.metadata or {})[b"huggingface"])["info"]["features"][label]
            return [str(name) for name in info["names"]]
        except (KeyError, TypeError, ValueError):
            return []


@dataclass(frozen=True)
class RawData:
    """A task's data as read.

    Attributes:
        splits: train, and validation or test or both.
        revision: the package's version, or the hub's revision as asked for.
        licence: what is known of its terms.
        published: what is known of the data set, where it is a known one.
        group: the column whose equal values must stay in one split, if any.
        shape: [C, H, W] of images that come decoded, else empty.
    """

    splits: dict[str, RawSplit]
    revision: str | None
    licence: str
    published: Published | None = None
    group: str | None = None
    shape: tuple[int, ...] = field(default=())


@dataclass(frozen=True)
class _Package:
    read: Callable[[], dict[str, pa.Table]]
    licence: str
    group: str | None = None
    shape: tuple[int, ...] = ()


_PACKAGES = {
    "vaderSentiment": _Package(demo.words, "MIT", group="family"),
    "scikit-learn": _Package(demo.digits, "BSD-3-Clause (the package)", shape=(1, 8, 8)),
}


def read_raw(task: str, data: DataSettings, files: Mapping[str, Path | str] | None = None) -> RawData:
    """Read a task's data from wherever it is.

    Args:
        task: its name, for messages and for ``FISHMASK_DATA/<task>``.
        data: the settings.
        files: split -> file, in place of ``data.source``.

    Returns:
        The data, unchecked but for being there and readable.

    Raises:
        DataError: if it is not there or not readable.
    """
    text = tuple(data.text or ())
    source = parse(data.source)
    known = lookup(source, task)
    licence = known.licence if known else "not stated; see its source"
    if files:
        found = {split: SplitFiles((Path(path),), "") for split, path in files.items() if split in SPLITS}
        if "train" not in found or len(found) < 2:
            raise DataError(f"tasks.{task}: expected a file for train and one for validation or test")
        return RawData(_read_files(found, text, None), None, licence)
    if source.kind == "package":
        return _read_package(task, source)
    if source.kind in ("builtin", *ZOOS):
        raise DataError(
            f"tasks.{task}.data.source: '{source.kind}:' names models; expected package:, a hub id or a folder"
        )
    folder = data_folder(task, source)
    if folder is None:
        return RawData(read_hub(task, source, data.revision), data.revision, licence, known)
    if (layout := find_layout(folder)) is not None:
        return _read_python_version(layout, data.revision)
    return RawData(_read_files(find_splits(folder), text, known), data.revision, licence, known)


def source_digest(task: str, data: DataSettings) -> str | None:
    """Digest the files that a task's data is read from, their names included.

    Args:
        task: its name, for ``FISHMASK_DATA/<task>``.
        data: the settings.

    Returns:
        BLAKE2b-256 as hex; None where data comes from a package or from the hub itself.

    Raises:
        DataError: if a file is missing or not readable.
    """
    folder = data_folder(task, parse(data.source))
    if folder is None:
        return None
    layout = find_layout(folder)
    files = layout_files(layout) if layout else [p for split in find_splits(folder).values() for p in split.paths]
    state = hashlib.blake2b(digest_size=32)
    for path in files:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        state.update(f"{path.name} {content.hexdigest()}\n".encode())
    return state.hexdigest()


def _read_python_version(folder: Path, revision: str | None) -> RawData:
    """Read CIFAR as torchvision lays it out; the layout itself says which data set it is."""
    known = cifar.TASKS[LAYOUTS[folder.name][0]]
    splits = {
        split: RawSplit(table, f"{folder} {split}", _remark("", table.num_rows, split, known))
        for split, table in read_layout(folder).items()
    }
    return RawData(splits, revision, known.licence, known, shape=SHAPE)


def _read_package(task: str, source: Source) -> RawData:
    if source.name not in _PACKAGES:
        raise DataError(
            f"tasks.{task}.data.source: no data is read from package '{source.name}'; "
            f"expected {' or '.join('package:' + name for name in _PACKAGES)}"
        )
    package = _PACKAGES[source.name]
    splits = {name: RawSplit(table, f"{source.name} {name}") for name, table in package.read().items()}
    version = importlib.metadata.version(source.name)
    return RawData(splits, version, package.licence, group=package.group, shape=package.shape)


def _read_files(
    found: Mapping[str, SplitFiles], text: tuple[str, ...], known: Published | None
) -> dict[str, RawSplit]:
    splits = {}
    for split, files in found.items():
        tables = [read_table(path, text) for path in files.paths]
        try:
            table = pa.concat_tables(tables)
        except pa.ArrowInvalid:
            raise DataError(f"{files.paths[0]}: its shards differ in their columns; expected the same") from None
        splits[split] = RawSplit(table, str(files.paths[0]), _remark(files.variant, table.num_rows, split, known))
    return splits


def _remark(variant: str, rows: int, split: str, known: Published | None) -> str:
    words = variant.replace("_", " ").replace("-", " ").replace("heldout", "held out")
    if split == "train" and known and rows < known.train_rows:
        percent = 100 * rows / known.train_rows
        share = f"{percent:{'.1f' if percent >= 0.1 else '.1g'}} % of train"
        return f"{words}: {share}" if words else share
    return words


def read_hub(task: str, source: Source, revision: str | None, *, judged: bool = True) -> dict[str, RawSplit]:
    """Read a data set from the hub, or from its cache: as ``datasets`` keeps it, or downloaded file by file.

    Args:
        task: its name, for messages.
        source: the hub id.
        revision: None for the newest.
        judged: whether validation or test must be there, beside train.

    Returns:
        Split -> its rows.

    Raises:
        DataError: if it is not to be had, or lacks a split.
    """  # noqa: DOC501 - raised through hub_error
    prepare_hub()
    import datasets

    key, name = f"tasks.{task}.data.source", f"{source.name}:{source.config}" if source.config else source.name
    datasets.disable_progress_bars()
    try:
        loaded = _load(source, revision)
    except FishmaskError:  # a SIGTERM meanwhile
        raise
    except Exception as error:  # whatever the hub, its client or the builder raises, the data is not to be had
        way_out = f"set FISHMASK_DATA to a folder that holds {task}/*.parquet, or name a folder as the source"
        raise hub_error(DataError, key, name, way_out, error) from error
    splits: dict[str, RawSplit] = {}
    for split in SPLITS:
        for variant in (split, f"{split}_matched"):
            if variant in loaded:
                part = loaded[variant]
                remark = variant.removeprefix(split).strip("_")
                splits.setdefault(split, RawSplit(part.with_format("arrow")[:], f"{name} {variant}", remark))
        if f"{split}_mismatched" in loaded:
            part, variant = loaded[f"{split}_mismatched"], f"{split}_mismatched"
            splits[variant] = RawSplit(part.with_format("arrow")[:], f"{name} {variant}")
    if "train" not in splits or (judged and len(splits) < 2):
        raise DataError(f"{key}: '{name}' holds {', '.join(loaded)}; expected train, and validation or test")
    return splits


def _load(source: Source, revision: str | None) -> Mapping[str, Any]:
    """A data set by ``datasets``, which overlooks what was downloaded as files (`hf download`) when offline."""
    import datasets

    try:
        return dict(datasets.load_dataset(source.name, source.config, revision=revision))
    except FishmaskError:  # a SIGTERM meanwhile
        raise
    except Exception as first:
        if not offline():
            raise
        from huggingface_hub import snapshot_download

        try:
            kept = snapshot_download(source.name, repo_type="dataset", revision=revision, local_files_only=True)
            return dict(datasets.load_dataset(kept, source.config))
        except FishmaskError:
            raise
        except Exception:  # no news: it is not there either
            raise first from None
