"""Chains of checkpoints on the command line: list them with their bytes, write a state as a model, join, drop."""

import json
from pathlib import Path
from typing import Any

from pipeline.artifacts.application import Done, check_out, located
from pipeline.artifacts.checkpoints import Checkpoint
from pipeline.artifacts.rewriting import write_tensors
from pipeline.deltas.chain import Chain
from pipeline.deltas.steps import PARTS
from pipeline.deltas.target import Model
from pipeline.errors import MismatchError, ParamsError
from pipeline.parameters import tensor_bytes
from pipeline.runtime.atomic_folder import replace_folder
from pipeline.runtime.terminal import print_table
from pipeline.tasks.saved import load_model, save_model


def describe(folder: Path) -> dict[str, Any]:
    """Describe a chain.

    Returns:
        Its provenance; ``steps``, a row each with ``bytes`` on disk and their ``sizes`` by kind of content; its
        ``steps_bytes`` and ``bytes`` (with the base), and what ``dense_bytes`` the same states take as dense
        checkpoints, of ``state_bytes`` each; ``ratio`` is dense / sparse.
    """
    chain = Chain.open(folder)
    rows = [
        {"step": step.number, "after": step.after, "state": step.state, "mask": step.mask, "count": step.count}
        | {"bytes": sum(step.nbytes.values()), "sizes": step.nbytes, "info": step.info}
        for step in chain.steps
    ]
    return {
        "file": str(folder),
        "format": "fishmask-chain",
        "info": chain.info,
        "keeps_base": chain.keeps_base,
        "state_bytes": chain.state_nbytes,
        "steps": rows,
        "steps_bytes": sum(row["bytes"] for row in rows),
        "bytes": chain.nbytes,
        "dense_bytes": chain.dense_nbytes,
        "ratio": chain.dense_nbytes / chain.nbytes,
    }


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print a description of a chain: JSON, or a table of its steps and a line that compares its bytes."""
    if as_json:
        print(json.dumps(facts))
        return
    rows = []
    for row in facts["steps"]:
        parts = [f"{row['sizes'][part]:,}" for part in PARTS]
        info = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row["info"].items())
        rows.append((str(row["step"]), f"{row['count']:,}", *parts, f"{row['bytes']:,}", info))
    print_table(("step", "count", *PARTS, "bytes", "info"), rows, notes=1)
    count, steps, dense = len(facts["steps"]), facts["steps_bytes"], facts["state_bytes"]
    if count:
        print(f"steps        {steps:,} bytes; dense {count * dense:,}: {count * dense / steps:.1f} times as many")
    what = "with base" if facts["keeps_base"] else "without base"
    print(
        f"{what:<12} {facts['bytes']:,} bytes; dense {facts['dense_bytes']:,}: {facts['ratio']:.1f} times as many"
    )


def restore(folder: Path, step: int, out: Path, base: str | None, *, force: bool = False) -> Done:
    """Write a state of a chain as a model.

    Args:
        folder: the chain's.
        step: which; -1 for the newest, 0 for the base.
        out: a ``.safetensors`` file; or a model folder, where the chain says what its model is.
        base: the base, where the chain does not keep it, as ``application.apply`` takes it. Without it the model
            that the chain names is loaded.
        force: replace what stands at ``out``.

    Returns:
        What was written.

    Raises:
        ParamsError: if a folder is asked for and the chain does not say what its model is, or ``out`` would lose
            something.
    """
    chain = Chain.open(folder)
    source = chain.info.get("model")
    asked, alone = base or source, out.suffix == ".safetensors"
    path = located(str(asked)) if asked and not chain.keeps_base else None
    check_out(out, [folder, path], force=force, folder=not alone)
    if not alone and source is None:
        raise ParamsError(
            f"{folder}: does not say what its model is; name a .safetensors file with --out, not {out}"
        )
    if asked and not chain.keeps_base:
        chain = Chain.open(folder, base=_base(str(asked), path, chain))
    if alone:
        state = chain.state(step, copy=False)
        forms = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        write_tensors(out, forms, lambda name: [tensor_bytes(state[name])], {"format": "pt"})
    else:
        model = load_model(str(source), info=chain.info)
        chain.restore_(model, step)
        with replace_folder(out) as made:
            save_model(model, str(source), made)
    number = step if step >= 0 else [0, *(step.number for step in chain.steps)][step]
    state_digest = chain.digest(number)
    line = f"{out}: step {number} of {folder}, state {state_digest[:12]}"
    return Done(line, {"out": str(out), "step": number, "state": state_digest})


def _base(source: str, path: Path | None, chain: Chain) -> Model:
    """The base of a chain: its files' tensors, each read when asked for, or built where they lack some."""
    if path is None:
        return load_model(source, info=chain.info)
    layout = chain.layout
    view = Checkpoint.open(path).named_like([*layout.parameters, *layout.ties])
    lacking = [name for name in layout.parameters if name not in view]
    if lacking and view.alone:
        raise MismatchError(f"{source}: lacks tensor '{lacking[0]}' of the chain; name its base")
    same = not lacking and all(view.entries[name].dtype == form[0] for name, form in layout.parameters.items())
    return view if same or view.alone else load_model(source, info=chain.info)


def squash(folder: Path, first: int, last: int) -> str:
    """Join the steps of a range.

    Returns:
        One line that says what came of it.
    """
    chain = Chain.open(folder)
    before = chain.nbytes
    chain.squash(first, last)
    return _changed(chain, before)


def prune(folder: Path, newest: int | None, only: list[int]) -> str:
    """Drop all steps but the newest, or but some.

    Args:
        folder: the chain's.
        newest: how many to keep.
        only: numbers of the steps to keep.

    Returns:
        One line that says what came of it.

    Raises:
        ParamsError: unless exactly one of the two is given.
    """
    if (newest is None) == (not only):
        raise ParamsError("give either --keep N for the newest N steps, or --step N for each step to keep")
    chain = Chain.open(folder)
    before = chain.nbytes
    chain.prune(only if newest is None else newest)
    return _changed(chain, before)


def _changed(chain: Chain, before: int) -> str:
    return f"{len(chain)} steps, {chain.nbytes:,} bytes instead of {before:,}"
