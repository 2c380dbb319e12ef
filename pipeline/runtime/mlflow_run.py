"""One MLflow run while it is open: curves in batches, tags, small figures and tables, and how it ended.

Only ``pipeline.tracking`` makes one; a stage logs to what it is given.
"""

import contextlib
import csv
import io
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import Interrupted, StorageError
from pipeline.runtime.mlflow_store import Store, uninterrupted

_FLUSH_POINTS = 500
_FLUSH_SECONDS = 10.0
_FAILURES = 3  # failed writes in a row after which a run goes on untracked
_ARTIFACT_BYTES = 1 << 20
_ARTIFACT_TYPES = (".csv", ".html", ".json", ".md", ".png", ".svg", ".txt")


class Run:
    """One MLflow run while it is open. With tracking off every call does nothing."""

    def __init__(self, name: str, store: Store | None) -> None:
        self.run_id: str | None = None
        self._name = name
        self._store = store
        self._inherited: dict[str, str] = {}
        self._params: dict[str, Any] = {}
        self._last: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._points: list[tuple[str, float, int, int]] = []
        self._tags: dict[str, str] = {}
        self._flushed = time.monotonic()
        self._failures = 0

    @contextlib.contextmanager
    def child(
        self,
        name: str | int,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        fingerprint: str = "",
    ) -> Iterator["Run"]:
        """Open a child run, such as one seed of a cell; it carries its parent's tags and settings too.

        Args:
            name: its name; a number is a seed.
            params: its own settings.
            tags: its own identity.
            fingerprint: of what it computes; found again among this parent's children only.

        Yields:
            The child.
        """
        tags = dict(tags or {})
        if isinstance(name, int):
            tags, name = {"seed": name} | tags, f"seed-{name}"
        run = Run(f"{self._name} {name}", self._store)
        tags = self._inherited | tags | {"level": "seed", "fingerprint": fingerprint or name}
        with run.opened(self._params | dict(params or {}), tags, parent=self.run_id):
            yield run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one point to each named curve; written in batches. A step that is already there is dropped."""
        if self._store is None:
            return
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            key = _clean(name, self._names)
            if key not in self._last or step > self._last[key]:
                self._last[key] = step
                self._points.append((key, float(value), now, step))
        if len(self._points) >= _FLUSH_POINTS or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def tag(self, **tags: object) -> None:
        """Set tags; written with the next batch."""
        self._tags |= _texts(tags, 8000)

    def figure(self, figure: Any, name: str) -> None:
        """Attach a small figure: a path, or a matplotlib figure (kept as svg).

        A file above 1 MiB, or of a kind that is no figure or table, is refused with a ``StorageError``.
        """
        if isinstance(figure, str | Path):
            source = Path(figure)
            name = name if Path(name).suffix else name + source.suffix
            _check_small(name, source.stat().st_size)
            self._attach("figures", name, source.read_bytes())
        else:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg")
            self._attach("figures", name if Path(name).suffix else f"{name}.svg", buffer.getvalue())

    def table(self, rows: Iterable[Mapping[str, Any]], name: str) -> None:
        """Attach a small table as csv; above 1 MiB it is refused with a ``StorageError``."""
        rows = list(rows)
        text = io.StringIO()
        columns = dict.fromkeys(column for row in rows for column in row)
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._attach("tables", f"{name.removesuffix('.csv')}.csv", text.getvalue().encode())

    def _attach(self, folder: str, name: str, data: bytes) -> None:
        _check_small(name, len(data))
        if self._store is None:
            return
        with self._guarded("attaching " + name), tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / re.sub(r"[^\w.-]", "_", name)
            file.write_bytes(data)
            self._store.client.log_artifact(self.run_id, str(file), folder)

    @contextlib.contextmanager
    def opened(self, params: Mapping[str, Any], tags: Mapping[str, Any], parent: str | None) -> Iterator[None]:
        """Start or continue the run, and end it as FINISHED, KILLED or FAILED.

        Args:
            params: its settings.
            tags: its identity, ``fingerprint`` among them.
            parent: the id of its parent run, if it is a child.

        Yields:
            Nothing.
        """  # noqa: DOC501 - whatever the body raises goes on
        self._inherited, self._params = _texts(tags, 8000), dict(params)
        with self._guarded("opening its run", fatal=True):
            self._start(params, self._inherited, parent)
        try:
            yield
        except (Interrupted, KeyboardInterrupt, SystemExit, GeneratorExit):
            self._end("KILLED")
            raise
        except BaseException as error:
            self.tag(error=f"{type(error).__name__}: {line_of(error)}")
            self._end("FAILED")
            raise
        else:
            self._end("FINISHED")

    def _start(self, params: Mapping[str, Any], tags: dict[str, str], parent: str | None) -> None:
        if self._store is None:
            return
        client = self._store.client
        values = _texts(params, 6000)
        found = self._store.find(tags["fingerprint"], parent)
        attempt = int(found.data.tags.get("attempt", 1)) if found else 1
        if found and parent is None and found.info.status == "FINISHED":
            # A child is looked for below its parent only: where that is continued, so is a finished child.
            found, attempt = None, attempt + 1
        if found:
            self.run_id = found.info.run_id
            for key in found.data.metrics:
                self._last[key] = max(point.step for point in client.get_metric_history(self.run_id, key))
            client.update_run(self.run_id, status="RUNNING")
            values = {key: value for key, value in values.items() if key not in found.data.params}
            tags = tags | {"resumed": str(int(found.data.tags.get("resumed", 0)) + 1)}
        else:
            made = client.create_run(
                self._store.experiment,
                run_name=self._name,
                tags=({"mlflow.parentRunId": parent} if parent else {}) | {"attempt": str(attempt)},
            )
            self.run_id = made.info.run_id
        self._store.write(self.run_id, params=values, tags=tags)

    def _end(self, status: str) -> None:
        if self._store is None:
            return
        store = self._store
        with self._guarded("logging its last points", fatal=True):
            store.write(self.run_id or "", points=self._points, tags=self._tags)
        with self._guarded("closing its run", fatal=True):
            store.client.set_terminated(self.run_id, status)

    def _flush(self) -> None:
        if self._store is None:
            return
        self._flushed = time.monotonic()
        with self._guarded("logging"):
            # Kept until written: a repeated write of the same points (same time, step, value) adds nothing twice.
            self._store.write(self.run_id or "", points=self._points, tags=self._tags)
            self._points.clear()
            self._tags.clear()
            self._failures = 0

    @contextlib.contextmanager
    def _guarded(self, doing: str, *, fatal: bool = False) -> Iterator[None]:
        with uninterrupted():
            try:
                yield
            except Exception as error:
                self._failures += 1
                if self._store is not None and (fatal or self._failures >= _FAILURES):
                    warn(
                        f"{self._name}: MLflow failed while {doing}; the run goes on without it: {line_of(error)}"
                    )
                    self._store = None


def _clean(name: str, taken: dict[str, str]) -> str:
    """A name that MLflow accepts (letters, digits and ``_-./``), another one for each other name."""
    if name not in taken:
        parts = re.sub(r"[^\w\-. /]", "_", name)[:240].split("/")
        base = clean = "/".join(part for part in parts if part not in {"", ".", ".."}) or "_"
        count = 1
        while clean in taken.values():
            count += 1
            clean = f"{base}-{count}"
        taken[name] = clean
    return taken[name]


def _texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    """Clean names; strings as they are, everything else as JSON, cut to MLflow's limit."""
    names: dict[str, str] = {}
    return {
        _clean(key, names): (value if isinstance(value, str) else json.dumps(value, default=str))[:limit]
        for key, value in values.items()
    }


def _check_small(name: str, size: int) -> None:
    if Path(name).suffix not in _ARTIFACT_TYPES or size > _ARTIFACT_BYTES:
        raise StorageError(
            f"{name} ({size:,} bytes): MLflow gets figures and tables ({', '.join(_ARTIFACT_TYPES)}) of at most "
            f"{_ARTIFACT_BYTES:,} bytes; leave masks, deltas and checkpoints to DVC"
        )


def line_of(error: BaseException) -> str:
    """The first line of a failure's message, for one line on stderr."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def warn(message: str) -> None:
    """Say on stderr what went wrong with MLflow."""
    print(f"fishmask: {message}", file=sys.stderr)
