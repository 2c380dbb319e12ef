"""A delta on model files: base + delta -> the trained model, and back, bit for bit."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.deltas.delta import Delta
from pipeline.errors import ModelError, ParamsError
from pipeline.files import write_bytes
from pipeline.tasks.saved import load_model, save_model


def apply(delta_file: Path, base: str, out: Path) -> str:
    """Write base + delta to ``out``.

    Args:
        delta_file: the delta.
        base: a safetensors file with the base's tensors, or a model source (package:, builtin:, hub id, folder).
        out: a file where the base is a file, else a new model folder in the hub's layout.

    Returns:
        One line that says what was written.
    """
    delta = Delta.load(delta_file)
    model, metadata = _read(base, delta)
    delta.apply_(model)
    _write(model, metadata, base, delta, out)
    return f"{out}: base + {delta.mask.nnz:,} of {delta.mask.index.total:,} values (delta {delta.digest[:12]})"


def revert(delta_file: Path, tuned: str, out: Path, base: str | None) -> str:
    """Write the base to ``out``, from a tuned model and its delta.

    Args:
        delta_file: the delta; where it keeps no values of its base, ``base`` must be given.
        tuned: the model that holds the delta, as in ``apply``.
        out: as in ``apply``.
        base: the base, to take its values at the mask from.

    Returns:
        One line that says what was written.

    Raises:
        ParamsError: if the delta keeps no base values and no base is given.
    """
    delta = Delta.load(delta_file)
    if delta.known.values is None and base is None:
        raise ParamsError(f"{delta_file}: keeps no values of its base; add --base MODEL to take them from")
    model, metadata = _read(tuned, delta)
    if base is not None:
        delta = delta.with_base(_read(base, delta)[0])
    delta.revert_(model)
    _write(model, metadata, tuned, delta, out)
    return f"{out}: the base again, {delta.mask.nnz:,} values restored"


def _read(source: str, delta: Delta) -> tuple[nn.Module | dict[str, Tensor], dict[str, str] | None]:
    """A model to write on: the tensors of a file, or a module; and the file's own metadata."""
    if not source.endswith(".safetensors"):
        return load_model(source, info=delta.info), None
    if not Path(source).is_file():
        raise ModelError(f"{source}: no such file; name a safetensors file or a model folder")
    with safe_open(source, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _write(
    model: nn.Module | dict[str, Tensor], metadata: dict[str, str] | None, source: str, delta: Delta, out: Path
) -> None:
    if isinstance(model, dict):
        write_bytes(out, save(model, metadata))
    else:
        save_model(model, source, out)
