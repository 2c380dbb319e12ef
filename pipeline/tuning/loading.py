"""Load a tuned model: its base from where it came, and the delta on top, checked bit by bit."""

from pathlib import Path

from torch import nn

from pipeline.deltas.delta import Delta
from pipeline.errors import ArtifactError
from pipeline.tasks.saved import load_model
from pipeline.tuning.manifest import DELTA, Tuned


def load_tuned(folder: Path | str, base: str | None = None) -> nn.Module:
    """Load base + delta.

    Args:
        folder: what ``fishmask tune --out`` wrote.
        base: where the base is, if elsewhere than ``tune.json`` says.

    Returns:
        The tuned model in fp32 and eval mode, on the CPU.

    Raises:
        ArtifactError: if the folder's files are damaged or do not belong together. A base that is not to be had is
            a ModelError, another one than the delta's a MismatchError.
    """
    tuned = Tuned.load(folder)
    file = Path(folder) / DELTA
    delta = Delta.load(file)
    if delta.digest != tuned.delta.digest:
        raise ArtifactError(f"{file}: is not the delta that tune.json describes; copy the folder again")
    model = load_model(base or tuned.base.source, info=delta.info)
    delta.apply_(model)
    return model
