"""`fishmask publish`: a delta as a folder that a model hub takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifacts.application import Done, check_out
from pipeline.deltas.delta import Delta
from pipeline.errors import ParamsError
from pipeline.files import write_bytes
from pipeline.runtime.atomic_folder import replace_folder
from pipeline.serving.asked import Asked, read_delta
from pipeline.serving.predicting import say
from pipeline.tasks.sources import parse, relocated
from pipeline.tuning.card import model_card
from pipeline.tuning.manifest import CARD, DELTA, Tuned


def publish(
    path: Path,
    to: Path,
    *,
    base: str | None = None,
    name: str | None = None,
    licence: str | None = None,
    force: bool = False,
) -> Done:
    """Write a folder with the delta, its description and a model card.

    Folders of this machine are named by their last part only, in the card, in ``tune.json`` and in what the delta
    says of itself; the delta's content, hence its digest, stays as it is.

    Args:
        path: a delta file or a tuned folder.
        to: the folder to write.
        base: what others find the base by, a hub id; None keeps the source that the delta names.
        name: of the model; None takes the task's.
        licence: its identifier on the hub.
        force: replace what stands there.

    Returns:
        What was written.

    Raises:
        ParamsError: if the folder cannot be written there, or a base is named that is none of the hub's.
    """
    if base is not None and parse(base).kind not in ("hub", "package"):
        raise ParamsError(f"--base {base}: expected what others find it by: a hub id (owner/name) or package:NAME")
    asked = read_delta(path)
    check_out(to, [asked.file], force=force, folder=True)
    source = base or public(asked.interface.base)
    revision = asked.interface.revision if source == asked.interface.base else None
    delta = _renamed(asked.delta, source, revision)
    interface = replace(asked.interface, base=source, revision=revision)
    title = name or (asked.tuned.name if asked.tuned else str(delta.info.get("task") or to.resolve().name))
    with replace_folder(to) as folder:
        size = _write_delta(delta, asked, folder / DELTA)
        tuned = _public_tuned(asked.tuned, source, revision, size, name) if asked.tuned else None
        if tuned is not None:
            tuned.save(folder)
        write_bytes(folder / CARD, model_card(title, delta, size, interface, tuned, licence=licence).encode())
        total = sum(file.stat().st_size for file in folder.iterdir())
    if parse(source).kind == "folder":
        say(f"{to}: names its base '{source}', a folder of yours; add --base OWNER/NAME so that others find it")
    facts: dict[str, Any] = {"out": str(to), "delta": delta.digest, "base": source, "bytes": total}
    line = f"{to}: {title}, {total:,} bytes (delta {delta.digest[:12]} over {source})"
    return Done(f"{line}\nupload it:  hf upload OWNER/NAME {to} .", facts)


def public(source: str) -> str:
    """Name a source without a path of this machine.

    Returns:
        A folder's own name; of ``timm:NAME@FILE`` and the like, the file's; anything else as it is.
    """
    return relocated(source, lambda path: path.resolve().name)


def _renamed(delta: Delta, source: str, revision: str | None) -> Delta:
    if delta.info.get("model", source) == source:
        return delta
    values = delta.thin if delta.thin is not None else delta.values
    info = delta.info | {"model": source, "revision": revision}
    return Delta(delta.mask, values, delta.buffers, delta.known, delta.layout, info)


def _write_delta(delta: Delta, asked: Asked, file: Path) -> int:
    """Write the delta anew where what it says of itself changed."""
    if delta is not asked.delta:
        return delta.save(file)
    data = asked.file.read_bytes()
    write_bytes(file, data)
    return len(data)


def _public_tuned(tuned: Tuned, source: str, revision: str | None, size: int, name: str | None) -> Tuned:
    document = tuned.model_dump()
    document["name"] = name or tuned.name
    document["base"] |= {"source": source, "revision": revision}
    document["delta"]["bytes"] = size
    data = document["data"]
    for key in ("train", "validation"):
        if (held := data[key]) is not None:
            data[key] = public(held)
            data["remarks"] = [remark.replace(held, data[key]) for remark in data["remarks"]]
    return Tuned.model_validate(document)
