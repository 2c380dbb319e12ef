"""`fishmask tune`: from a user's files and model to a folder with the delta, its description, its model card."""

import contextlib
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DivergedError, FishmaskError, Interrupted, ModelError, ParamsError, StorageError
from pipeline.runtime.process import alone, interruptible
from pipeline.tasks.metrics import needs_regression
from pipeline.training.device import choose_device
from pipeline.tuning.manifest import FILE, Tuned
from pipeline.tuning.plan import PLAN, Asked, Plan
from pipeline.tuning.preparing import prepared_plan
from pipeline.tuning.run import Trainer
from pipeline.tuning.writing import write

_OPTIONS = {"model.source": "--model", "model.max_length": "--max-length", "metric": "--metric"}


@dataclass
class Result:
    """What a run made.

    Attributes:
        folder: where it lies.
        tuned: its description.
        results: method -> epochs, seconds and so on.
    """

    folder: Path
    tuned: Tuned
    results: dict[str, Any]


def tune(asked: Asked, out: Path, *, resume: bool = False, force: bool = False, track: bool = True) -> Result:
    """Tune a model on a user's data.

    Args:
        asked: the options.
        out: the folder to write; the unfinished run lies beside it, as ``.<name>.tune``.
        resume: go on with the unfinished run.
        force: replace a tuned folder at ``out``, and start anew where a run is unfinished.
        track: log to MLflow.

    Returns:
        What was made. Options that are missing, contradict each other or would lose something are a ParamsError, a
        folder that cannot be written a StorageError; on SIGTERM or Ctrl-C an Interrupted says how to go on.
    """
    with _named_as_options():
        return _tune(asked, out, resume=resume, force=force, track=track)


def _tune(asked: Asked, out: Path, *, resume: bool, force: bool, track: bool) -> Result:
    folder = out.parent / f".{out.name}.tune"
    lock = folder / "lock"
    _check(asked, out, folder, resume=resume, force=force)
    try:
        with _going_on(out, folder), interruptible(), alone(lock, f"tune {out}"):
            if not resume:
                for entry in folder.iterdir():
                    if entry != lock:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if not resume:
                choose_device(asked.device, asked.precision)  # refuses what is not there, before any work
            settled = Plan.load(folder) if resume else prepared_plan(asked, folder, out, say)
            asked.check_against(settled.options, out)
            trainer = Trainer.open(settled, folder, say)
            say(f"device {trainer.device.reason}; {settled.threads} thread{'s' * (settled.threads > 1)}")
            results = trainer.run(track)
            tuned = write(trainer, results, out)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror or error}; choose another --out") from None
    return Result(out, tuned, results)


def say(sentence: str) -> None:
    """Show a sentence beside the progress."""
    print(f"fishmask tune: {sentence}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _going_on(out: Path, folder: Path) -> Iterator[None]:
    """Say how to go on after a signal, wherever it struck; leave nothing of a run that failed before it."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        what = str(stop).partition(";")[0] or "stopped"
        if not (folder / PLAN).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            raise Interrupted(f"{what} before anything was trained; run the same command again") from None
        raise Interrupted(f"{what}; to go on: fishmask tune --resume --out {out}") from None
    except BaseException as error:
        if isinstance(error, DivergedError) or not (folder / PLAN).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # the same again would diverge again
        raise


@contextlib.contextmanager
def _named_as_options() -> Iterator[None]:
    """Name the option where a message names the key of params.yaml that it stands for."""
    try:
        yield
    except (ParamsError, ModelError) as error:
        key, colon, rest = str(error).partition(": ")
        if key not in _OPTIONS:
            raise
        kind: type[FishmaskError] = type(error)
        raise kind(f"{_OPTIONS[key]}{colon}{rest}") from None


def _check(asked: Asked, out: Path, folder: Path, *, resume: bool, force: bool) -> None:
    """Refuse what cannot be done, before anything is read."""
    asked.seconds()
    unfinished = (folder / PLAN).is_file()
    if resume and not unfinished:
        raise ParamsError(f"--resume: there is no unfinished run of {out}; leave --resume out to start one")
    if not resume:
        for option, value in (("--model", asked.model), ("--train", asked.train)):
            if not value:
                raise ParamsError(
                    f"{option} is missing; expected --model MODEL --train FILE --out DIR to begin with"
                )
        if unfinished and not force:
            raise ParamsError(
                f"{out}: an unfinished run is there; add --resume to go on, or --force to start anew"
            )
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / FILE).is_file()):
        raise ParamsError(f"{out}: holds something else than a tuned model; choose another --out")
    if (out / FILE).is_file() and not force and not resume:
        raise ParamsError(f"{out}: exists; add --force to replace it, or choose another --out")
    if not 0 < asked.density <= 1:
        raise ParamsError(f"--density {asked.density:g}: expected a share of all parameters: above 0, at most 1")
    if asked.lr is not None and not (asked.lr > 0 and math.isfinite(asked.lr)):
        raise ParamsError(f"--lr {asked.lr:g}: expected a number above 0")
    if asked.metric is not None:
        needs_regression(asked.metric)
    if asked.epochs is not None and asked.budget is not None:
        raise ParamsError("--epochs and --budget: one of them decides; leave the other out")
