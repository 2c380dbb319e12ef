"""The expected failures, each with its exit code.

Code that meets bad input raises one of these with ONE line that says what was wrong, where (file, key,
tensor), what was expected and what to do. The command prints that line on stderr and exits with ``code``;
anything else that escapes is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class FishmaskError(Exception):
    """An expected failure: its message is one line for the user, its ``code`` the process exit code."""

    code = 9


class ParamsError(FishmaskError):
    """A parameter or argument is missing, misspelt or out of range."""

    code = 2


class DataError(FishmaskError):
    """A data set is missing, empty, lacks a column or holds values that do not fit the task."""

    code = 3


class ModelError(FishmaskError):
    """A model cannot be found, loaded, or does not fit what is asked of it."""

    code = 4


class ArtifactError(FishmaskError):
    """A mask, delta, ranking or checkpoint file is corrupt, truncated, foreign or too new."""

    code = 5


class ForeignError(ArtifactError):
    """A sound safetensors file that another program wrote."""


class MismatchError(FishmaskError):
    """A sound artifact does not belong to the model at hand (wrong base, wrong shapes)."""

    code = 6


class StorageError(FishmaskError):
    """The disk is full, or a folder cannot be written."""

    code = 7


class BusyError(FishmaskError):
    """Another process is working on the same cell."""

    code = 8


class Interrupted(FishmaskError):
    """The process was asked to stop (SIGTERM, Ctrl-C); unfinished work is saved where it can be resumed."""

    code = 143


class WorkerError(FishmaskError):
    """A worker of a distributed run died, hung, or cannot be reached by the others."""

    code = 9


class DivergedError(FishmaskError):
    """Training diverged: the loss or a trained value is NaN or infinite.

    Args:
        message: one line for the user.
        history: the epochs that were finished before, as ``FitResult.history`` holds them; a search over learning
            rates counts such a run as the lowest score instead of stopping.
        step: the optimizer step, from 0, whose loss was the first that is not finite.
    """

    code = 9

    def __init__(self, message: str, history: list[dict[str, float]] | None = None, step: int = 0) -> None:
        super().__init__(message)
        self.history = history or []
        self.step = step


MENDABLE = frozenset(
    kind.code
    for kind in (ParamsError, DataError, ModelError, ArtifactError, MismatchError, StorageError, BusyError)
)
"""Exit codes of what the user has to mend first: the line that the process printed says all there is to say."""


def unknown(name: str, known: Iterable[str]) -> str:
    """Say that a name is not known, with the closest one that is.

    Returns:
        ``'wrods'; did you mean 'words'? (known: digits, words)``.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"'{name}'{hint} (known: {', '.join(names)})"
