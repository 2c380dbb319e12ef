"""Whether files are as they were written: given files and folders, or all that dvc.lock names.

A file of a DVC project is held twice, in the workspace and in the cache. Each copy is hashed against dvc.lock; a
mask, ranking or delta in the workspace is also read, with all of its own checksums and digests. Every fault comes
with what to do about it.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from os.path import relpath
from pathlib import Path

from pipeline import files
from pipeline.artifacts import dvc_lock
from pipeline.artifacts.dvc_lock import Out
from pipeline.artifacts.inspection import READERS
from pipeline.errors import ArtifactError, ForeignError
from pipeline.runtime.progress import ProgressLine
from pipeline.runtime.workspace import Workspace

OK, MISSING, CHANGED, DAMAGED, FOREIGN = "ok", "missing", "changed", "damaged", "foreign"
_BAD = (DAMAGED, CHANGED, MISSING)


@dataclass(frozen=True)
class Finding:
    """One file as it was found.

    Attributes:
        file: its path from the current folder.
        state: ``ok``; ``missing``; ``changed`` (sound as far as can be told, but not what dvc.lock names);
            ``damaged`` (its own checksums or its name in the cache contradict it); ``foreign`` (a safetensors file
            that fishmask did not write: it carries no checksum to verify).
        place: ``workspace`` or ``cache``.
        stage: the stage that makes it, where known.
        digest: of the mask, ranking or delta that it holds.
        reason: what is wrong.
        todo: what to do.
    """

    file: str
    state: str
    place: str = "workspace"
    stage: str | None = None
    digest: str | None = None
    reason: str = ""
    todo: str = ""

    def line(self) -> str:
        """Format a fault, or a foreign file, for the terminal."""
        return f"{self.state.upper():<8} {self.file}: {self.reason}{self.todo and f'; {self.todo}'}"


def verify(paths: list[Path], as_json: bool) -> None:
    """Verify files, folders, or the whole project where none is given, and print what was found.

    Raises:
        ArtifactError: if anything is missing, changed or damaged, or there is nothing to verify.
    """
    found = list(_below(paths) if paths else _project(Path(relpath(Workspace.here().root))))
    rows = [row for _, group in found for row in group]
    count = Counter(row.state for row in rows)
    if as_json:
        totals = {state: count[state] for state in (OK, *_BAD, FOREIGN)}
        print(json.dumps(totals | {"files": [asdict(row) | {"ok": row.state == OK} for row in rows]}))
    else:
        for label, group in found:
            if all(row.state == OK for row in group):
                print(f"{OK:<8} {label}")
            for row in group:
                if row.state != OK:
                    print(row.line())
    bad = [row for state in _BAD for row in rows if row.state == state]
    if bad:
        parts = ", ".join(f"{count[state]} {state}" for state in _BAD if count[state])
        raise ArtifactError(f"of {len(rows)} files {parts}, the first: {bad[0].file}")
    if not count[OK]:
        where = ", ".join(map(str, paths)) or "this project"
        others = f"; {count[FOREIGN]} of another program" if count[FOREIGN] else ""
        raise ArtifactError(f"{where}: holds no file written by fishmask{others}: nothing to verify")


def _below(paths: list[Path]) -> Iterator[tuple[str, list[Finding]]]:
    """Check files, and every safetensors file below folders, by their own checksums."""
    chosen: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ArtifactError(f"{path}: no such file or folder")
        chosen += sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    with ProgressLine("verify") as line:
        for done, file in enumerate(chosen, 1):
            row = _read(file)
            yield f"{(row.digest or '')[:16]:<16}  {file}", [row]
            if len(chosen) > 1:
                line.update(done, len(chosen), "files")


def _project(root: Path) -> Iterator[tuple[str, list[Finding]]]:
    """Check every out of dvc.lock; without one, what lies in ``artifacts/``."""
    if not (root / "dvc.lock").is_file():
        yield from _below([root / "artifacts"])
        return
    outs, project = dvc_lock.locked_outs(root), _Project(root)
    with ProgressLine("verify") as line:
        for done, out in enumerate(outs, 1):
            rows = project.check(out)
            yield f"{root / out.path}  ({out.stage}: {_tally(rows)})", rows
            line.update(done, len(outs), "outs")
        rows = list(project.others())
        if rows:
            yield f"{len(rows)} more files in the cache", rows


def _tally(rows: list[Finding]) -> str:
    kept = sum(row.place == "cache" for row in rows)
    return f"{len(rows) - kept} files, {kept} in the cache"


class _Project:
    """The files of a DVC project, in the workspace and in the cache."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cache = dvc_lock.cache_folder(root.absolute())
        self._objects: dict[str, str] = {}  # md5 -> state of the cache object

    def check(self, out: Out) -> list[Finding]:
        """Check one out: its files, and the cache's copy of each."""
        rows = list(self._rows(out))
        bad = {row.place for row in rows if row.state != OK}
        return [
            row if row.state == OK or row.todo else replace(row, todo=self._todo(out, row, bad)) for row in rows
        ]

    def others(self) -> Iterator[Finding]:
        """Check the other objects of the project's own cache; one that it shares holds those of other projects.

        Yields:
            What was found, object by object.
        """
        if self._cache is None or not self._cache.is_relative_to(self._root.absolute()):
            return
        for md5 in [md5 for md5 in dvc_lock.objects_below(self._cache) if md5 not in self._objects]:
            row = self._object_row(md5, None, "an object of the run cache, another commit or a lost list")
            todo = f"`rm -f {row.file}`, then `dvc fetch --all-commits --run-cache` where a remote has it"
            yield row if row.state == OK else replace(row, todo=todo)

    def _rows(self, out: Out) -> Iterator[Finding]:
        target = self._root / out.path
        stored = {out.md5: ""} if out.cached and self._cache is not None else {}
        if out.is_folder:
            here = {name: dvc_lock.md5_of(file) for name, file in dvc_lock.files_below(target).items()}
            wanted = self._wanted(out, here)
            yield from self._folder(out, target, wanted, here)
            stored |= {md5: f"/{name}" for name, md5 in (wanted or {}).items()} if stored else {}
        else:
            yield self._file(out, target, out.md5, dvc_lock.md5_of(target))
        for md5, name in stored.items():
            what = "the list of the files of" if out.is_folder and not name else "the copy of"
            yield self._object_row(md5, out.stage, f"{what} {target}{name}")

    def _folder(
        self, out: Out, target: Path, wanted: dict[str, str] | None, here: dict[str, str | None]
    ) -> Iterator[Finding]:
        """Check the files of a folder in the workspace: those wanted, where that is known, and those found."""
        if not target.is_dir():
            yield self._missing(out, target, out.md5)
        elif wanted is None:
            why = "is not the folder that dvc.lock names; the cache has no sound list to tell in which file"
            yield Finding(str(target), CHANGED, stage=out.stage, reason=why)
            found = [self._differing(out, target / name) for name in here]
            yield from (row for row in found if row.state == DAMAGED)
        else:
            for name in sorted(wanted.keys() | here.keys()):
                if name in wanted:
                    yield self._file(out, target / name, wanted[name], here.get(name))
                else:
                    why = "is not among the files that dvc.lock names"
                    yield Finding(str(target / name), CHANGED, stage=out.stage, reason=why)

    def _wanted(self, out: Out, here: dict[str, str | None]) -> dict[str, str] | None:
        """The files of a folder: as they lie there if that is right, else as the cache lists them, if it does."""
        if dvc_lock.folder_md5(here) == out.md5:
            return {name: str(md5) for name, md5 in here.items()}
        if self._cache is None or self._object(out.md5) != OK:
            return None
        return dvc_lock.listed_files(dvc_lock.object_file(self._cache, out.md5).read_bytes())

    def _file(self, out: Out, file: Path, md5: str, found: str | None) -> Finding:
        """Check a file of the workspace, whose hash is ``found``."""
        if found == md5:
            row = _read(file, out.stage)
            if row.state == DAMAGED:
                return replace(row, todo=f"it was made so: `dvc repro --force --single-item {out.stage}`")
            return replace(row, state=OK, reason="", todo="")
        return self._differing(out, file) if file.exists() else self._missing(out, file, md5)

    def _differing(self, out: Out, file: Path) -> Finding:
        """Tell a damaged file from one that was changed."""
        row = _read(file, out.stage)
        if row.state == DAMAGED:
            return replace(row, todo="")
        what = f"is sound, of digest {row.digest[:12]}, but " if row.digest else "is "
        return replace(row, state=CHANGED, reason=f"{what}not the file that dvc.lock names", todo="")

    def _missing(self, out: Out, file: Path, md5: str) -> Finding:
        stored = out.cached and self._object(md5) == OK
        reason = (
            "is not checked out" if stored else "is neither here nor in the cache" if out.cached else "is not here"
        )
        return Finding(str(file), MISSING, stage=out.stage, reason=reason)

    def _object_row(self, md5: str, stage: str | None, what: str) -> Finding:
        """Check a cache object."""
        assert self._cache is not None
        state, file = self._object(md5), dvc_lock.object_file(self._cache, md5)
        name = relpath(file) if file.is_relative_to(Path.cwd()) else str(file)
        reasons = {MISSING: "is not in the cache", DAMAGED: "is not what its name in the cache says"}
        reason = f"{what} {reasons[state]}" if state in reasons else ""
        return Finding(name, state, "cache", stage, reason=reason)

    def _object(self, md5: str) -> str:
        """The state of a cache object, which is hashed once however many outs hold it."""
        if self._cache is None:
            return MISSING
        if md5 not in self._objects:
            file = dvc_lock.object_file(self._cache, md5)
            sound = dvc_lock.md5_of(file) == md5.removesuffix(".dir")
            self._objects[md5] = OK if sound else DAMAGED if file.exists() else MISSING
        return self._objects[md5]

    def _todo(self, out: Out, row: Finding, bad: set[str]) -> str:
        """Say how an out becomes sound again, where the places ``bad`` hold a fault.

        Returns:
            The commands. What is wrong is removed first: DVC and git take a file for unchanged whose time and size
            are.
        """
        path, stage = self._root / out.path, out.stage
        wrong = row.state in (DAMAGED, CHANGED) and not Path(row.file).is_dir()
        clear = f"`rm -f {row.file}`, then " if wrong else ""
        if not out.cached or self._cache is None:
            return f"{clear}`git checkout {path}` or `dvc repro {stage}`"
        if bad == {"cache"}:
            return f"{clear}`dvc commit --force {stage}`"
        if bad == {"workspace"}:
            keep = f", or `dvc commit --force {stage}` to keep the change" if row.state == CHANGED else ""
            return f"{clear}`dvc checkout --force {path}`{keep}"
        return f"{clear}`dvc pull --force {path}` or `dvc repro {stage}`"


def _read(file: Path, stage: str | None = None) -> Finding:
    """Read a file of this project's formats with all of its checks; of another kind there is nothing to check."""
    name = str(file)
    if stage is not None and file.suffix != ".safetensors":
        return Finding(name, OK, stage=stage)
    try:
        kind = files.format_of(file)
        if kind in READERS:
            digest: str | None = READERS[kind](file).digest
        else:  # of any other format the checksums alone
            digest = files.read_file(file, format=kind, version=sys.maxsize)[0].get("digest")
        return Finding(name, OK, stage=stage, digest=digest)
    except ArtifactError as error:
        reason, _, todo = str(error).removeprefix(f"{file}: ").partition("; ")
        state = FOREIGN if isinstance(error, ForeignError) else DAMAGED
        return Finding(name, state, stage=stage, reason=reason, todo=todo)
