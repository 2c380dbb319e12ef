"""What every stage has in common: its params, its folders, its lock, its run in MLflow, its metrics file."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import FishmaskError, ParamsError, StorageError
from pipeline.files import write_json
from pipeline.params import Params
from pipeline.runtime.atomic_folder import make, put_in_place
from pipeline.runtime.process import alone, end_with_parent, interruptible
from pipeline.runtime.workspace import VERSION, Cell, Workspace, code_digest
from pipeline.tracking import Run, Tracker
from pipeline.training.fingerprint import fingerprint

if TYPE_CHECKING:
    from pipeline.tasks.base import Task

_SEEDED = {"score", "mask", "train", "checkpoint", "distribute"}


class Stage:
    """One cell at work.

    Attributes:
        cell: which one.
        workspace: the project's folders.
        out: the folder of its outputs, replaced in one move at the end.
        work: the folder it writes to until then.
        seeds: the seeds to run.
        settings: every params.yaml key that the stage has read, with its value: what dvc.yaml must declare.
    """

    def __init__(
        self,
        cell: Cell,
        params: Params,
        workspace: Workspace,
        *,
        seeds: list[int] | None = None,
        out: Path | None = None,
        track: bool = True,
    ) -> None:
        self.cell = cell
        self.workspace = workspace
        self.settings: dict[str, Any] = {}
        self._params = params
        self._partial = seeds is not None
        self._private = out is not None
        self.out = out or workspace.out(cell)
        self.work = self.out.with_name(f".{self.out.name}.partial")
        self.seeds = list(self.read("seeds")) if cell.stage in _SEEDED else []
        self.seeds = self.seeds if seeds is None else seeds
        self._metrics_file = self.out / "metrics.json" if out else workspace.metrics(cell)
        self._track = track
        self._record: dict[str, Any] = {}
        self._timing: dict[str, Any] = {}

    def read(self, key: str) -> Any:
        """Read one key of params.yaml, and remember that it was read."""
        value = self._params.at(key)
        self.settings[key] = value.model_dump() if hasattr(value, "model_dump") else value
        return value

    def of_task(self, key: str) -> Any:
        """Read a key of the cell's own task."""
        return self.read(f"tasks.{self.cell.task}.{key}")

    def folder(self, seed: int) -> Path:
        """Make the folder of one seed's outputs."""
        return make(self.work / f"seed-{seed}")

    def input(self, stage: str, *by: str) -> Path:
        """The outputs of an earlier stage for this cell's task, and its ``method`` and ``setting`` where named."""
        return self.workspace.out(Cell(stage, self.cell.task, *(getattr(self.cell, part) for part in by)))

    @contextlib.contextmanager
    def held(self, fingerprint: str, *, beside: bool = False, **tags: str) -> Iterator[Run]:
        """Own the cell: lock it, open its MLflow run, and at the end put its outputs and metrics in place.

        Args:
            fingerprint: identifies the inputs, so that a killed run is continued rather than repeated.
            beside: whether runs of this cell that write to other folders may go on at the same time.
            tags: more identity for MLflow, such as the data's digest.

        Yields:
            The cell's run in MLflow.
        """
        cell = self.cell
        lock = self.workspace.lock(cell)
        if beside and self._private:
            lock = lock.with_stem(
                f"{lock.stem}-{hashlib.blake2b(str(self.out).encode(), digest_size=6).hexdigest()}"
            )
        with interruptible(), alone(lock, f"{cell.stage} {cell.name}"), contextlib.ExitStack() as clean:
            clean.callback(shutil.rmtree, self.work, ignore_errors=True)  # what is unfinished lies in .resume/
            _make_empty(self.work)
            started = time.monotonic()
            tracker = Tracker.open(experiment(self._params.profile), enabled=self._track)
            tags = tags | {k: v for k, v in vars(cell).items() if v}
            settings = _flat(self.settings)
            with tracker.cell(cell.stage, cell.name, params=settings, tags=tags, fingerprint=fingerprint) as run:
                yield run
                seconds = time.monotonic() - started
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                run.log({"seconds": seconds, "peak_rss_mib": peak}, step=0)
            self._finish(seconds, peak)

    def keep_seeds(self, count: int | None) -> None:
        """Run the first so many of the profile's seeds; None: all, as do seeds that were asked for by number."""
        if count is not None and not self._partial:
            self.seeds = self.seeds[:count]

    def resumable(self, data: str, device: str) -> dict[int, Path]:
        """Where each seed's unfinished run and its result are kept, by all that decides it.

        Args:
            data: the data's digest.
            device: where it is computed, in words.

        Returns:
            seed -> folder, whose name is the fingerprint.
        """
        inputs = {"settings": self.settings, "data": data, "device": device, "code": code_digest()}
        inputs |= {"out": str(self.out)} if self._private else {}  # runs into several folders may go on at once
        keys = {seed: fingerprint(**inputs, cell=self.cell, seed=seed) for seed in self.seeds}
        return {seed: self.workspace.resume(self.cell.stage, key) for seed, key in keys.items()}

    def record(self, seed: int | None = None, **values: Any) -> None:
        """Add to the metrics file: reproducible values only, so that git sees a change where there is one."""
        if seed is None:
            self._record.update(values)
        else:
            self._record.setdefault("seeds", {}).setdefault(str(seed), {}).update(values)

    def provenance(self, task: "Task", seed: int) -> dict[str, Any]:
        """Say where what a seed leaves comes from: the model and the data, the cell, the code."""
        cell = {key: getattr(self.cell, key) for key in ("task", "method", "setting")}
        return task.model_info | cell | {"seed": seed, "data": task.data_digest, "fishmask": VERSION}

    @staticmethod
    def log_scores(run: Run, metric: str, scores: list[float]) -> None:
        """Log mean and sample standard deviation of the seeds that ended with a score."""
        if scores:
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            run.log({metric: statistics.mean(scores), f"{metric}_std": spread, "seeds": len(scores)}, step=0)

    def time(self, **values: Any) -> None:
        """Add to the timing file: what differs from run to run (seconds, memory, device)."""
        self._timing.update(values)

    def _finish(self, seconds: float, peak: float) -> None:
        for made in [*self.work.iterdir()] if self._partial else [self.work]:
            put_in_place(made, self.out / made.name if self._partial else self.out)
        cell = self.cell
        identity = {k: v for k, v in vars(cell).items() if v}
        document = identity | {"params": self.settings} | self._record
        if self._partial and self._metrics_file.is_file():
            before = json.loads(self._metrics_file.read_text())
            document["seeds"] = before.get("seeds", {}) | document.get("seeds", {})
        if "seeds" in document:
            document["seeds"] = dict(sorted(document["seeds"].items(), key=lambda item: int(item[0])))
        if self._record:
            _write(self._metrics_file, document)
        timing = {"seconds": round(seconds, 3), "peak_rss_mib": round(peak, 1)} | self._timing
        if not self._private:
            _write(self.workspace.timing(cell), timing)


def experiment(profile: str) -> str:
    """Name the MLflow experiment: one per profile, and one per DVC experiment where there is one."""
    name = os.environ.get("DVC_EXP_NAME")
    return f"fishmask-{profile}" + (f"/{name}" if name else "")


def use_threads(count: int) -> None:
    """Fix the number of CPU threads: it decides the order of sums, hence the last bits of every result."""
    import torch

    torch.set_num_threads(count)


def main(stage: str, work: Callable[[Stage], None], names: tuple[str, ...]) -> None:
    """Run one cell as DVC does: ``python -m stages.<stage> TASK [METHOD [SETTING]]``, from the project's root."""
    if "DVC_STAGE" in os.environ or "DVC_ROOT" in os.environ:
        end_with_parent()
    try:
        if len(sys.argv) != 1 + len(names):
            raise ParamsError(f"usage: python -m stages.{stage} {' '.join(n.upper() for n in names)}")
        workspace = Workspace.here()
        cell = Cell(stage, *(sys.argv[1:] or ["all"]))
        work(Stage(cell, Params.load(workspace.root / "params.yaml"), workspace))
    except FishmaskError as error:
        print(f"fishmask {stage}: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None


def _make_empty(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot make the output folder: {error.strerror}") from None


def _write(file: Path, document: dict[str, Any]) -> None:
    make(file.parent)
    write_json(file, document)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"tasks.words.train": {"epochs": 2}}`` -> ``{"tasks.words.train.epochs": 2}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
