"""Delta files for other tools: a dense model, a PEFT adapter, git-theta's updates, a vLLM patch."""

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from pipeline.artifacts import application
from pipeline.artifacts.application import Done, built, check_out, located
from pipeline.artifacts.checkpoints import Checkpoint
from pipeline.artifacts.streaming import Streamed
from pipeline.deltas import adapter, exports
from pipeline.deltas.delta import Delta
from pipeline.errors import ParamsError
from pipeline.files import write_bytes, write_json
from pipeline.runtime.atomic_folder import replace_folder

FORMATS = ("dense", "peft", "git-theta", "vllm")


def export(delta_file: Path, base: str, to: str, out: Path, *, whole: bool = False, force: bool = False) -> Done:
    """Write a delta in another tool's format.

    Args:
        delta_file: the delta.
        base: as ``application.apply``.
        to: the format, of ``FORMATS``.
        out: a folder for ``peft``, and for ``dense`` where the base is one; else a file.
        whole: for ``peft``, keep modules whole that have no sparse form.
        force: replace what stands there.

    Returns:
        What was written.

    Raises:
        ParamsError: if an option does not fit the format, or the output exists.
        MismatchError: if the base is not the delta's, or the delta does not fit the format.
    """  # noqa: DOC502 - raised by what it calls
    if to not in FORMATS:
        raise ParamsError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    if whole and to != "peft":
        raise ParamsError(f"--whole: is for --to peft; {to} has a form for every tensor")
    if to == "dense":
        return application.apply(delta_file, base, out, force=force)
    path = located(base)
    check_out(out, [delta_file, path], force=force, folder=to == "peft")
    delta = Delta.load(delta_file)
    if to == "peft":
        return _adapter(delta, base, path, out, whole)
    tensors, named = _tensors(delta, base, path)
    write = exports.write_update if to == "git-theta" else exports.write_patch
    size = write(out, delta, tensors, named)
    line = f"{out}: {delta.mask.nnz:,} values for {to}, {size:,} bytes (delta {delta.digest[:12]})"
    return Done(line, {"out": str(out), "to": to, "delta": delta.digest, "bytes": size})


def _adapter(delta: Delta, base: str, path: Path | None, out: Path, whole: bool) -> Done:
    if path is not None and not path.is_dir():
        raise ParamsError(f"{base}: is a file; a PEFT adapter needs the model's modules, name its folder")
    made = adapter.adapter_of(delta, built(base, delta), whole=whole, source=base)
    data = save(made.tensors, {"format": "pt"})
    with replace_folder(out) as folder:
        write_json(folder / adapter.CONFIG, made.config)
        write_bytes(folder / adapter.TENSORS, data)
    line = (
        f"{out}: PEFT adapter, {len(made.sparse)} layers sparse (r={made.config['r']}), {len(made.whole)} modules "
        f"whole, {len(data):,} bytes; base + difference rounds {made.inexact:,} of {delta.mask.nnz:,} values"
    )
    facts = {"out": str(out), "to": "peft", "delta": delta.digest, "bytes": len(data), "sparse": made.sparse}
    return Done(line, facts | {"whole": made.whole, "r": made.config["r"], "inexact": made.inexact})


def _tensors(delta: Delta, base: str, path: Path | None) -> tuple[Mapping[str, Tensor], Callable[[str], str]]:
    """The base's tensors by the module's names, and how to name them as its checkpoint does."""
    if path is None:
        return built(base, delta).state_dict(), str
    view = Streamed(Checkpoint.open(path), delta)
    entries = view.checkpoint.entries
    return view, lambda name: entries[name].key if name in entries else name
