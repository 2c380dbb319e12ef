"""Table 1 and Figure 2 on a bare machine: no DVC, no MLflow; goes on where it was stopped.

    FISHMASK_DATA=FOLDER python -m benchmarks.glue --out glue-run
    FISHMASK_DATA=FOLDER python -m benchmarks.glue --out glue-run --jobs 12 --until 400 --result glue.md

Runs the stages of a profile in a project folder of its own (``--out``): fetch, tune-lr, score, mask, train,
forget, report, in ``--jobs`` worker processes: a training step of a small model waits for the CPU that launches
it, so one GPU serves many. The parts are cells, and single runs of the search of rates. Results do not depend on
the number of processes. Of ``--task A,B --task C`` and ``--method D,E --method F`` D and E on A and B come first,
then F on those with D and E on C, then F on C; of equals the longest. Figure 2 comes last, or with ``--sweep N``
after N such groups.
A cell with metrics is not run again: delete its file below ``metrics/`` to repeat it. After ``--until`` seconds,
or at SIGTERM, what runs is ended, and the report is written of the cells that are complete.
``--result FILE.md`` writes the tables, the command and the hardware as markdown; beside it stands FILE.json,
renewed with each cell: every seed's score, every rate that was tried, and seconds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.runtime.cpu import set_up_cpu

set_up_cpu()  # before torch, and inherited by the workers

from benchmarks import glue_work  # noqa: E402
from benchmarks.glue_result import write_scores, write_tables  # noqa: E402
from benchmarks.jobs import Board, Job, work  # noqa: E402
from pipeline.errors import FishmaskError, Interrupted  # noqa: E402
from pipeline.files import write_bytes  # noqa: E402
from pipeline.params import Params  # noqa: E402
from pipeline.reports.page import write_report  # noqa: E402
from pipeline.runtime.process import interruptible  # noqa: E402
from pipeline.runtime.workspace import Cell, Workspace  # noqa: E402
from pipeline.runtime.yaml_files import edit_yaml, parse_overrides  # noqa: E402
from pipeline.tasks.base import Task  # noqa: E402
from pipeline.training.halving import Scores, best_rate, rungs  # noqa: E402
from pipeline.training.methods import method_named  # noqa: E402
from stages.tune_lr import REACH, record  # noqa: E402

PROFILES = Path(__file__).parent.parent / "pipeline" / "profiles"
_LAST = 1_000  # the rank of what comes after all cells of Table 1


def main() -> None:
    """Run what is left of the profile, then write the report."""
    started = time.monotonic()
    options = _options()
    stopped = False
    try:
        plan = Plan(options)
        until = started + options.until if options.until else None
        with interruptible():
            try:
                prepare = glue_work.prepare, plan.root, plan.params
                work(plan.board, options.jobs, prepare, plan.root / "logs", until, plan.tell)
            except (Interrupted, KeyboardInterrupt):
                stopped = True
        plan.report(time.monotonic() - started)
    except FishmaskError as error:
        print(f"benchmarks.glue: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    for name, why in plan.board.failed.items():
        print(f"failed: {name}: {why}")
    if missing := plan.missing():
        print(f"not complete: {', '.join(missing)}; run the same command again to go on")
    if stopped:
        raise SystemExit(Interrupted.code)


class Plan:
    """What there is to do, what was found, and how it is written down.

    Attributes:
        root: the project's folder.
        params: its settings, with the rates found so far.
        board: the parts.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Put up the first parts: fetching each task puts up the rest of it."""
        self.options = options
        self.root = options.out.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self._file = self.root / "params.yaml"
        if not self._file.is_file():
            write_bytes(self._file, (PROFILES / f"{options.profile}.yaml").read_bytes())
        self._overrides = parse_overrides(options.set or [])
        tasks = _groups(options.task) or [Params.load(self._file, self._overrides).grid.tasks]
        if options.model:
            self._overrides |= {f"tasks.{t}.model.source": str(options.model) for group in tasks for t in group}
        params = Params.load(self._file, self._overrides)
        methods = _groups(options.method) or [params.grid.methods]
        for key, groups in (("tasks", tasks), ("methods", methods)):
            for name in (name for group in groups for name in group):
                params.at(f"{key}.{name}")  # or a ParamsError that suggests another
        self.tasks, self.methods = _ranks(tasks), _ranks(methods)
        self.params = self._load()
        self.workspace = Workspace(self.root, self.root)
        self.board = Board()
        for task in self.tasks:
            call = self._call(glue_work.fetch_task, task)
            self.board.add(Job(f"fetch {task}", call, (-1,), then=partial(self._open, task)))
        if options.forget and len(self.tasks) > 1 and "head" in self.methods:
            for method in {"dense", "fish", "random"} & set(self.methods):
                cells = {f"train {task}-{name}-main" for task in self.tasks for name in (method, "head")}
                kept = partial(self._kept_call, method)
                self.board.add(Job(f"forget {method}", kept, (_LAST,), after=frozenset(cells)))

    def tell(self, name: str, seconds: float, why: str) -> None:
        """Show that a part ended, and keep what is known once it is a cell."""
        print(f"{name}: {why or f'{seconds:.1f} s'}", flush=True)
        if name.startswith("train ") and self.options.result:
            write_scores(self.options.result.with_suffix(".json"), self.root)

    def missing(self) -> list[str]:
        """Cells that were asked for and have no metrics."""
        return [cell.name for cell in self._cells() if not self.workspace.metrics(cell).is_file()]

    def report(self, seconds: float) -> None:
        """Write the report, and the result if it is asked for."""
        write_report(self.root / "metrics", self.root / "reports", self.params.profile, self.params.grid.cells)
        print(f"report: {self.root / 'reports' / 'index.html'}; {seconds:.0f} s", flush=True)
        if self.options.result:
            write_scores(self.options.result.with_suffix(".json"), self.root)
            how = f"{self.options.jobs} processes, {seconds:.0f} s"
            write_tables(self.options.result, self.root, how, self.missing())

    def _load(self) -> Params:
        """The settings as they stand in the file, without the kinds of scores that no method here needs."""
        params = Params.load(self._file, self._overrides)
        needed = {method_named(method).variant for method in self.methods}
        tasks = {}
        for name, task in params.tasks.items():
            variants = {variant: how for variant, how in task.score.variants.items() if variant in needed}
            tasks[name] = task.model_copy(update={"score": task.score.model_copy(update={"variants": variants})})
        return params.model_copy(update={"tasks": tasks})

    def _open(self, task: str, rows: int) -> None:
        """Put up all parts of a fetched task."""
        train = self.params.tasks[task].train
        steps = train.epochs * rows / train.batch_size
        if ranked := [method for method in self.methods if method_named(method).needs_ranking]:
            file, key = self.workspace.metrics(Cell("score", task)), f"tasks.{task}.score"
            known = json.loads(file.read_text())["params"][key]["variants"] if file.is_file() else None
            if known is not None and set(self.params.tasks[task].score.variants) <= set(known):
                self.board.finish(f"score {task}")
            else:
                file.unlink(missing_ok=True)
                call = self._call(glue_work.score_task, task)
                self.board.add(Job(f"score {task}", call, self._rank(task, ranked[0]), steps))
        for method in self.methods:
            self._tune(task, method, steps)
        for cell in self._cells():
            if cell.task == task:
                self._put_up(cell, steps)

    def _put_up(self, cell: Cell, steps: float) -> None:
        """Put up one cell; it needs its rate, its scores, and a learned mask the rate of dense."""
        method, name = method_named(cell.method or ""), f"train {cell.name}"
        if self.workspace.metrics(cell).is_file():
            self.board.finish(name)
            return
        after = {f"tune {cell.task} {cell.method}"}
        after |= {f"score {cell.task}"} if method.needs_ranking else set()
        after |= {f"tune {cell.task} dense"} if method.strategy == "learned" and "dense" in self.methods else set()
        call = self._call(glue_work.train_cell, cell.task, method.name, cell.setting)
        rank = self._rank(cell.task, method.name) if cell.setting == "main" else (self.options.sweep, 0)
        rank = (*rank, 0)  # before the runs of a search: this ends in the tables
        self.board.add(Job(name, call, rank, len(self.params.seeds) * steps, frozenset(after)))

    def _rank(self, task: str, method: str) -> tuple[int, int]:
        """What is named later comes later, tasks and methods alike."""
        return self.tasks[task] + self.methods[method], self.tasks[task]

    def _cells(self) -> list[Cell]:
        """Every cell of this run: Table 1, then Figure 2."""
        names = [(task, method, "main") for task in self.tasks for method in self.methods]
        if self.options.sweep:
            sweep = self.params.grid.sweep.cells
            names += sorted(cell for cell in sweep if cell[0] in self.tasks and cell[1] in self.methods)
        return [Cell("train", *name) for name in dict.fromkeys(names)]

    def _tune(self, task: str, method: str, steps: float) -> None:
        """Begin the search of a rate, unless it was found or is not wanted."""
        file = self.workspace.metrics(Cell("tune-lr", task))
        found = json.loads(file.read_text())["methods"] if file.is_file() else {}
        if not self.options.tune or method in found:
            self.board.finish(f"tune {task} {method}")
            return
        start = self.params.at(self.params.rate_key(task, method, "main"))
        search = rungs(start, self.options.reach, self.params.seeds[: self.options.tune])
        self._rung(task, method, steps, search, next(search))

    def _rung(self, task: str, method: str, steps: float, search: Any, asked: list[tuple[float, int]]) -> None:
        """Put up the runs that a search asks for; the last of them to end asks for more, or finds the rate."""
        scores: dict[tuple[float, int], float] = {}

        def note(run: tuple[float, int], score: float) -> None:
            scores[run] = score
            if len(scores) < len(asked):
                return
            try:
                following = search.send([scores[run] for run in asked])
            except StopIteration as end:
                self._found(task, method, end.value)
            else:
                self._rung(task, method, steps, search, following)

        learned = method_named(method).strategy == "learned" and "dense" in self.methods
        dense = frozenset({f"tune {task} dense"} if learned else ())
        rank, goal = (*self._rank(task, method), 1), f"tune {task} {method}"
        for rate, seed in asked:
            chosen = f"mask {task} {method} seed {seed}"
            call = self._call(glue_work.choose_mask, task, method, seed)
            self.board.add(Job(chosen, call, rank, 2 * steps, dense, goal=goal))
            call = self._call(glue_work.try_rate, task, method, rate, seed)
            then, name = partial(note, (rate, seed)), f"try {task} {method} {rate:g} seed {seed}"
            self.board.add(Job(name, call, rank, steps, frozenset({chosen}), then, goal))

    def _found(self, task: str, method: str, tried: Scores) -> None:
        """Write a rate into params.yaml, and what was tried beside the metrics."""
        settings = self.params.tasks[task]
        data = Task.load(self.workspace.out(Cell("fetch", task)), settings.model, settings.metric)
        best = best_rate(tried)
        edit_yaml(self._file, {self.params.rate_key(task, method, "main"): best})
        self.params = self._load()
        record(self.workspace, task, "main", settings, data, {method: tried})
        runs = ", ".join(f"{rate:g}: {' '.join(f'{s:.4f}' for s in scores)}" for rate, scores in tried.items())
        print(f"tune {task} {method}: {best:g} ({runs})", flush=True)
        self.board.finish(f"tune {task} {method}")

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], tuple[Any, ...]]:
        """A call with the settings as they are when it is handed out."""
        return lambda: (function, self.params, *arguments)

    def _kept_call(self, method: str) -> tuple[Any, ...]:
        """Forgetting among the tasks of this run alone."""
        grid = self.params.grid.model_copy(update={"tasks": list(self.tasks)})
        return glue_work.forget, self.params.model_copy(update={"grid": grid}), method


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the project's folder")
    parser.add_argument("--profile", default="glue-full", choices=[path.stem for path in PROFILES.glob("*.yaml")])
    parser.add_argument("--task", action="append", metavar="A,B", help="only these tasks; repeat for later ones")
    parser.add_argument("--method", action="append", metavar="A,B", help="only these; repeat for later ones")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="in place of params.yaml's")
    parser.add_argument("--model", type=lambda text: Path(text).resolve(), help="a folder, as every task's model")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="worker processes")
    parser.add_argument("--until", type=float, metavar="SECONDS", help="end what runs then, and report")
    parser.add_argument(
        "--tune", type=int, default=2, metavar="RUNGS", help="seeds of tune-lr; 0: rates as they are"
    )
    parser.add_argument("--reach", type=int, default=REACH, help="rates of tune-lr on either side of the first")
    parser.add_argument(
        "--sweep",
        type=int,
        nargs="?",
        const=_LAST,
        metavar="N",
        help="Figure 2 too; N: with what is N groups later",
    )
    parser.add_argument("--forget", action="store_true", help="forgetting and overlaps too; needs method head")
    parser.add_argument("--result", type=lambda text: Path(text).resolve(), help="markdown file of the tables")
    return parser.parse_args()


def _groups(given: Sequence[str] | None) -> list[list[str]]:
    return [text.split(",") for text in given or []]


def _ranks(groups: list[list[str]]) -> dict[str, int]:
    """Name -> which of the groups names it first."""
    ranks: dict[str, int] = {}
    for rank, group in enumerate(groups):
        ranks = {name: rank for name in group} | ranks
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


if __name__ == "__main__":
    main()
