"""What dvc.lock names: the outs of every stage, the files in them, and where DVC keeps a copy of each.

Read from the files themselves and not from DVC's state: DVC 3.67 takes a read-only cache object at its name and
checks a flipped one out with exit 0.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import ParamsError
from pipeline.runtime.yaml_files import read_yaml

_FOLDER = ".dir"  # ends the hash of a folder


@dataclass(frozen=True)
class Out:
    """One out of one stage.

    Attributes:
        stage: such as ``train@words-fish-main``.
        path: relative to the folder of dvc.lock.
        md5: of the file; for a folder that of the list of its files, with ``.dir``.
        cached: whether DVC keeps a copy; metrics are ``cache: false``, git has those.
    """

    stage: str
    path: str
    md5: str
    cached: bool

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of files."""
        return self.md5.endswith(_FOLDER)


def locked_outs(root: Path) -> list[Out]:
    """Read the outs that a project's dvc.lock names.

    Returns:
        One entry an out, in the order of the lock.

    Raises:
        ParamsError: if dvc.lock is no lock of DVC.
    """
    plain = _uncached(root)
    outs = []
    try:
        for stage, entry in read_yaml(root / "dvc.lock")["stages"].items():
            for out in entry.get("outs", ()):
                path = str(out["path"])
                outs.append(Out(stage, path, str(out["md5"]), not any(form.fullmatch(path) for form in plain)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ParamsError(
            f"dvc.lock: is no lock of DVC 3 ({type(error).__name__}: {error}); restore it with git, or run "
            "`fishmask repro` again"
        ) from None
    return outs


def cache_folder(root: Path) -> Path | None:
    """Find the folder of DVC's cache objects: ``cache.dir`` of its configuration, else ``.dvc/cache``.

    Returns:
        The folder, which may not exist yet; None where the project is none of DVC's.

    Raises:
        ParamsError: if DVC refuses its configuration.
    """
    home = next((folder / ".dvc" for folder in (root, *root.parents) if (folder / ".dvc").is_dir()), None)
    if home is None:
        return None
    from dvc.config import Config, ConfigError  # four files and the rules that join them are DVC's own affair

    try:
        chosen = Config(str(home))["cache"].get("dir")
    except ConfigError as error:
        raise ParamsError(f"{home / 'config'}: {error}") from None
    return Path(chosen or home / "cache") / "files" / "md5"


def object_file(cache: Path, md5: str) -> Path:
    """Name the file of a cache object.

    Returns:
        Its path in the cache.
    """
    return cache / md5[:2] / md5[2:]


def objects_below(cache: Path) -> dict[str, Path]:
    """Find all objects of a cache, those of other commits and of the run cache too.

    Returns:
        md5 -> file.
    """
    found = {file.parent.name + file.name: file for file in sorted(cache.glob("??/*"))}
    return {md5: file for md5, file in found.items() if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", md5)}


def md5_of(path: Path) -> str | None:
    """Hash a file as DVC does.

    Returns:
        32 hex digits; None where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return None


def listed_files(content: bytes) -> dict[str, str]:
    """Parse the cache object of a folder.

    Args:
        content: its bytes, the hash of which was checked.

    Returns:
        Path below the folder -> md5.
    """
    return {entry["relpath"]: entry["md5"] for entry in json.loads(content)}


def folder_md5(files: Mapping[str, str | None]) -> str:
    """Hash a list of files as DVC does for a folder.

    Args:
        files: path below the folder -> md5.

    Returns:
        The hash, with ``.dir``.
    """
    entries = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    text = json.dumps(entries, sort_keys=True).encode()
    return hashlib.md5(text, usedforsecurity=False).hexdigest() + _FOLDER


def files_below(folder: Path) -> dict[str, Path]:
    """Find the files of an out that is a folder.

    Returns:
        Path below the folder, with slashes -> file.
    """
    found = (Path(top) / name for top, _, names in os.walk(folder, followlinks=True) for name in names)
    return {str(PurePosixPath(file.relative_to(folder))): file for file in sorted(found)}


def _uncached(root: Path) -> list[re.Pattern[str]]:
    """The paths that dvc.yaml declares ``cache: false``, each ``${...}`` standing for any text."""
    forms = []
    file = root / "dvc.yaml"
    for stage in (read_yaml(file).get("stages") or {}).values() if file.is_file() else ():
        body = stage.get("do", stage)  # a `foreach` keeps it one level down
        for kind in ("outs", "metrics", "plots"):
            for entry in body.get(kind) or ():
                for path, options in entry.items() if isinstance(entry, dict) else ():
                    if (options or {}).get("cache") is False:
                        forms.append(re.compile(".+".join(map(re.escape, re.split(r"\$\{.*?\}", path)))))
    return forms
