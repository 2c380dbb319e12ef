"""Find the files of a data folder's splits by their names.

Plain: ``train.parquet``, ``train.csv.gz``; subsets: ``train_subset.parquet``, ``validation_matched.csv``; the
hub's shards: ``data/train-00000-of-00002.parquet``.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.tasks.tables import EXTENSIONS, parts_of

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_SHARD = re.compile(r"(?P<stem>.+?)-(?P<index>\d{5})-of-(?P<count>\d{5})")


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split.

    Attributes:
        paths: in order.
        variant: what the name says beyond the split's (``subset``, ``heldout_from_train``), else empty.
    """

    paths: tuple[Path, ...]
    variant: str


def find_splits(folder: Path, *, judged: bool = True) -> dict[str, SplitFiles]:
    """Find train, validation and test in a folder, its ``data/``, or its only subfolder.

    Where a split has several variants, the plain name wins, then ``_matched`` (MNLI's), beside which
    ``_mismatched`` is a split of its own.

    Args:
        folder: the folder.
        judged: whether validation or test must be there, too.

    Returns:
        Split -> its files; train is always there.

    Raises:
        DataError: if there is no data file, a split or a shard is missing, or two files could be the same split.
    """
    names = _stems(folder)
    for below in [folder / "data", *_only_subfolder(folder)]:
        names = names or (_stems(below) if below.is_dir() else {})
    if not names:
        raise DataError(
            f"{folder}: holds no data file; expected train.parquet and validation.parquet "
            f"(or {', '.join('.' + e for e in EXTENSIONS[1:])})"
        )
    found = {split: files for split in SPLITS if (files := _choose(folder, split, names))}
    for missing, there in (("train", "train" in found), ("validation", "validation" in found or "test" in found)):
        if not there and (judged or missing == "train"):
            raise DataError(
                f"{folder}: split '{missing}' is missing; expected {missing}.parquet (or .csv, .tsv, .jsonl, "
                ".json), "
                f"found {', '.join(sorted(p.name for paths in names.values() for p in paths))}"
            )
    for split in ("validation", "test"):
        if split in found and found[split].variant == "matched":
            also = [f"{name}_mismatched" for name in SPLITS[split] if f"{name}_mismatched" in names]
            found |= {f"{split}_mismatched": SplitFiles(_shards(folder, names[stem]), "") for stem in also[:1]}
    return found


def _only_subfolder(folder: Path) -> list[Path]:
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return below if len(below) == 1 else []


def _stems(folder: Path) -> dict[str, list[Path]]:
    """Name without extension and shard number -> its files."""
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = parts_of(path)
        if path.is_file() and name.kind in EXTENSIONS and not path.name.startswith("."):
            match = _SHARD.fullmatch(name.stem)
            names.setdefault(match["stem"] if match else name.stem, []).append(path)
    return names


def _choose(folder: Path, split: str, names: dict[str, list[Path]]) -> SplitFiles | None:
    variants: dict[str, str] = {}
    for stem in names:
        for name in SPLITS[split]:
            if stem == name or stem.startswith((name + "_", name + "-")):
                variants[stem] = stem[len(name) :].strip("_-")
                break
    for preferred in ("", "matched"):
        exact = [stem for stem, variant in variants.items() if variant == preferred]
        if exact:
            variants = {stem: preferred for stem in exact}
            break
    if not variants:
        return None
    if len(variants) > 1:
        raise DataError(
            f"{folder}: {' and '.join(sorted(variants))} could each be split '{split}'; "
            f"expected one file, name it {split}.parquet"
        )
    ((stem, variant),) = variants.items()
    return SplitFiles(_shards(folder, names[stem]), variant)


def _shards(folder: Path, paths: list[Path]) -> tuple[Path, ...]:
    shards = [_SHARD.fullmatch(parts_of(path).stem) for path in paths]
    numbers = sorted(int(shard["index"]) for shard in shards if shard)
    count = max((int(shard["count"]) for shard in shards if shard), default=0)
    if None in shards and len(paths) > 1:
        raise DataError(f"{folder}: {' and '.join(p.name for p in paths)} could each be the split; expected one")
    if None not in shards and numbers != list(range(count)):
        lost = sorted(set(range(count)) - set(numbers))
        raise DataError(
            f"{paths[0]}: {len(paths)} of {count} shards are there; expected all"
            + (f", number {lost[0]:05d} is missing" if lost else " once")
        )
    return tuple(paths)
