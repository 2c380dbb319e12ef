"""A delta on model files: base + delta -> the trained model, and back, bit for bit.

Files, shards and folders are streamed: one pass checks that they are the delta's base, another writes them anew.
What is no such file (``builtin:``, a hub id), or lacks tensors that only building the model gives, is done in
memory.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.artifacts.checkpoints import INDEX, Checkpoint
from pipeline.artifacts.rewriting import Edit, rewrite
from pipeline.artifacts.streaming import Streamed
from pipeline.deltas.delta import Delta
from pipeline.deltas.origin import decode_
from pipeline.deltas.target import dtype_name
from pipeline.errors import MismatchError, ModelError, ParamsError
from pipeline.runtime.atomic_folder import replace_folder
from pipeline.tasks.saved import adapted_config, load_model, save_model
from pipeline.tasks.sources import ZOOS, package_model, parse

CONFIG = "config.json"


@dataclass
class Done:
    """What a command did.

    Attributes:
        line: for people.
        facts: for ``--json``.
    """

    line: str
    facts: dict[str, Any] = field(default_factory=dict)

    def show(self, as_json: bool) -> None:
        """Print it."""
        print(json.dumps(self.facts) if as_json else self.line)


def apply(delta_file: Path, base: str, out: Path, *, force: bool = False) -> Done:
    """Write base + delta to ``out``.

    Tensors that the base does not have and the delta covers whole (a head) are added, and config.json names the
    classifier that the delta was trained as, so that ``AutoModelForSequenceClassification`` loads the result.

    Args:
        delta_file: the delta.
        base: a safetensors file, a folder in the hub's layout (one file, or shards with an index), or another
            model source (package:, builtin:, hub id).
        out: a file where the base is a file, else a new model folder in the hub's layout.
        force: replace what stands there.

    Returns:
        What was written.

    Raises:
        MismatchError: if the base is not the delta's; nothing is written.
    """  # noqa: DOC502 - raised by what it calls
    delta = Delta.load(delta_file)
    path = located(base)
    check_out(out, [delta_file, path], force=force, folder=path is None or not _alone(path))
    view = _as_base(base, path, delta)
    if view is None:
        model = built(base, delta)
        delta.apply_(model)
        return _saved(model, base, out, delta, "base + {}")
    held = {name: (None, buffer) for name, buffer in delta.buffers.items() if name in view}
    new = {name: delta.values[name].reshape(delta.layout.parameters[name][1]) for name in view.lacking}
    new |= {name: buffer for name, buffer in delta.buffers.items() if name not in view}
    edit = Edit(view.spread(delta.values, delta) | held, view.dtypes, new, files=_config(view, delta))
    return _rewritten(view, out, edit, delta, "base + {}")


def revert(delta_file: Path, tuned: str, out: Path, base: str | None, *, force: bool = False) -> Done:
    """Write the base to ``out``, from a tuned model and its delta.

    Tensors that the base given does not have (a head that was new) are left out.

    Args:
        delta_file: the delta; where it keeps no values of its base, ``base`` must be given.
        tuned: the model that holds the delta, as in ``apply``.
        out: as in ``apply``.
        base: the base, to take its values at the mask from.
        force: replace what stands there.

    Returns:
        What was written.

    Raises:
        ParamsError: if the delta keeps no base values and no base is given.
        MismatchError: if the tuned model is not base + delta, or the base is another; nothing is written.
    """
    delta = Delta.load(delta_file)
    if delta.known.values is None and base is None:
        raise ParamsError(f"{delta_file}: keeps no values of its base; add --base MODEL to take them from")
    path, base_path = located(tuned), None if base is None else located(base)
    check_out(out, [delta_file, path, base_path], force=force, folder=path is None or not _alone(path))
    view = None if path is None else Streamed(Checkpoint.open(path), delta)
    if view is None or (not set(view.lacking) <= set(delta.whole) and _buildable(view, delta)):
        model = built(tuned, delta)
        if base is not None:
            delta = delta.with_base(built(base, delta))
        delta.revert_(model)
        return _saved(model, tuned, out, delta, "the base again, {} restored")
    if view.lacking:
        raise MismatchError(f"{tuned}: lacks tensor '{view.lacking[0]}' of the delta; name the tuned model")
    values, buffers = base_values(delta, base, base_path)
    unlike = view.unlike(delta)
    if unlike is not None:
        raise MismatchError(f"{tuned}: {unlike} does not hold this delta's values: it is not base + delta")
    restored = view.spread(values, delta)
    digests = view.digests({name: (delta.at(name), part) for name, part in values.items() if part.numel()})
    if not delta.known.is_of(digests, delta.whole):
        raise MismatchError(f"{tuned}: with the delta taken out, {delta.known.difference(digests, delta.whole)}")
    gone = view.without(set(delta.whole) - values.keys()) | (delta.buffers.keys() - buffers.keys())
    edit = Edit(restored | {name: (None, buffer) for name, buffer in buffers.items()}, view.dtypes, gone=gone)
    return _rewritten(view, out, edit, delta, "the base again, {} restored")


def located(source: str) -> Path | None:
    """Find the files of a model source.

    Returns:
        A safetensors file, an index or a folder; None for what is built or fetched (``builtin:``,
        ``torchvision:``, a hub id).

    Raises:
        ModelError: if a file or folder is named that is not there.
    """
    named = parse(source)
    if named.kind == "package":
        return package_model(named.name)
    file = Path(source).suffix in {".safetensors", ".json"}
    if named.kind in ("builtin", *ZOOS) or (named.kind == "hub" and not file):
        return None
    path = Path(source).expanduser()
    if not path.exists():
        raise ModelError(
            f"{source}: no such file or folder; name a safetensors file, a model folder, package:NAME, "
            "builtin:NAME or a hub id"
        )
    return path


def built(source: str, delta: Delta) -> nn.Module:
    """Build a model in memory, in the dtypes that a delta's base has.

    Args:
        source: of the model.
        delta: whose ``info`` says of which kind it is.

    Returns:
        The model.
    """
    model = load_model(source, info=delta.info)
    for name, parameter in model.named_parameters():
        if name in delta.layout.parameters:
            parameter.data = parameter.data.to(delta.layout.parameters[name][0])
    for name, buffer in model.named_buffers():
        if name in delta.buffers:
            buffer.data = buffer.data.to(delta.buffers[name].dtype)
    return model


def check_out(out: Path, inputs: Iterable[Path | None], *, force: bool, folder: bool) -> None:
    """Refuse an output that would lose something, before any work.

    Args:
        out: where to write.
        inputs: what is read.
        force: what stands there may go.
        folder: a folder will be written, else a file.

    Raises:
        ParamsError: if it is an input, a part of one or a folder around one, of the other kind, or exists.
    """
    if out.exists() and out.is_dir() != folder:
        kinds = "a folder; name a file" if out.is_dir() else "a file; name a folder"
        raise ParamsError(f"{out}: is {kinds} to write")
    place = out.resolve()
    for path in filter(None, inputs):
        source = path.resolve()
        inside = source in place.parents and (folder or out.exists())  # a new file beside what is read is fine
        around = folder and place in source.parents
        if place == source or inside or around:
            how = "is" if place == source else "lies in" if inside else "holds"
            raise ParamsError(f"{out}: {how} {path}, which is read; write elsewhere")
    if out.exists() and not force and not (folder and not any(out.iterdir())):
        raise ParamsError(f"{out}: exists; add --force to replace it, or write elsewhere")


def _alone(path: Path) -> bool:
    """Tell a file that is a whole model from a folder, or an index that stands for its folder."""
    return path.is_file() and not path.name.endswith(INDEX)


def _as_base(source: str, path: Path | None, delta: Delta) -> Streamed | None:
    """Open a base to be streamed, check all of it, and decode a thin delta; None where only building it tells."""
    if path is None:
        return None
    view, whole = Streamed(Checkpoint.open(path), delta), delta.whole
    buildable = _buildable(view, delta)
    unknown = [name for name in view.lacking if name not in whole]
    if unknown and not buildable:
        raise MismatchError(
            f"{source}: lacks tensor '{unknown[0]}' {list(delta.layout.parameters[unknown[0]][1])}, and the delta "
            "does not cover it whole; name the base with all of its tensors"
        )
    digests = {} if unknown else view.digests()
    if not unknown and delta.known.is_of(digests, whole):
        decode_(delta, view.read)
        return view
    if view.lacking and buildable:  # a head as the seed draws it may count in the digest
        return None
    if delta.mask.nnz and not delta.thin and not view.lacking and view.unlike(delta) is None:
        raise MismatchError(f"{source}: holds this delta's values already; name the base")
    raise MismatchError(f"{source}: {delta.known.difference(digests, whole)}")


def _buildable(view: Streamed, delta: Delta) -> bool:
    """Tell whether a folder's model can be built, whatever names its files have for the module's tensors."""
    found = not view.checkpoint.alone and (view.checkpoint.folder / CONFIG).is_file()
    return found and {"kind", "outputs"} <= delta.info.keys()


def base_values(delta: Delta, base: str | None, path: Path | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Find what a delta's base holds where the delta writes.

    Args:
        delta: a thin one has its values afterwards, where the base is given.
        base: the base, as in ``apply``; None for what the delta keeps of it.
        path: where ``located`` finds it.

    Returns:
        Its values at the mask, and its buffers; those of the tensors that it has.
    """
    known = delta.known
    if base is not None:
        view = _as_base(base, path, delta)
        if view is not None:
            values = {name: view.read(name, delta.at(name)) for name in delta.mask.index if view.copies[name]}
            return values, {name: view[name] for name in delta.buffers if name in view}
        known = delta.with_base(built(base, delta)).known
    assert known.values is not None
    return known.values, known.buffers


def _config(view: Streamed, delta: Delta) -> dict[str, bytes]:
    """The config.json of base + delta, where the base has one that must change."""
    path = view.checkpoint.folder / CONFIG
    if view.checkpoint.alone or not path.is_file():
        return {}
    dtypes = Counter(dtype for dtype, _ in delta.layout.parameters.values() if dtype.is_floating_point)
    common = dtype_name(dtypes.most_common(1)[0][0])
    return {CONFIG: adapted_config(path, delta.info, common if view.dtypes else None)}


def _saved(model: nn.Module, source: str, out: Path, delta: Delta, what: str) -> Done:
    with replace_folder(out) as folder:
        save_model(model, source, folder)
    return _done(out, delta, what, {})


def _rewritten(view: Streamed, out: Path, edit: Edit, delta: Delta, what: str) -> Done:
    size = rewrite(view.checkpoint, out, edit)
    more = {"bytes": size, "added": sorted(edit.new), "left_out": sorted(edit.gone)}
    return _done(out, delta, what, more)


def _done(out: Path, delta: Delta, what: str, more: dict[str, Any]) -> Done:
    count = what.format(f"{delta.mask.nnz:,} of {delta.mask.index.total:,} values")
    line = f"{out}: {count} (delta {delta.digest[:12]})"
    for key in ("added", "left_out"):
        if more.get(key):
            line += f"; {key.replace('_', ' ')}: {', '.join(more[key])}"
    return Done(line, {"out": str(out), "delta": delta.digest, "values": delta.mask.nnz} | more)
