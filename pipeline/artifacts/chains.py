"""Chains of checkpoints on the command line: list them with their bytes, write a state as a model, join, drop."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pipeline.deltas.chain import Chain
from pipeline.deltas.steps import PARTS
from pipeline.errors import ModelError, ParamsError
from pipeline.files import write_bytes
from pipeline.tasks.saved import load_model, save_model


def describe(folder: Path) -> dict[str, Any]:
    """Describe a chain.

    Returns:
        Its provenance, one row a step, and its bytes: ``steps_bytes`` and ``bytes`` (with the base), and what
        ``dense_bytes`` the same states take as dense checkpoints; ``ratio`` is dense / sparse.
    """
    chain = Chain.open(folder)
    rows = [
        {"step": step.number, "values": step.count, "bytes": step.nbytes, "state": step.state, "info": step.info}
        for step in chain.steps
    ]
    return {
        "folder": str(folder),
        "info": chain.info,
        "keeps_base": chain.keeps_base,
        "state_bytes": chain.state_nbytes,
        "steps": rows,
        "steps_bytes": sum(sum(step.nbytes.values()) for step in chain.steps),
        "bytes": chain.nbytes,
        "dense_bytes": chain.dense_nbytes,
        "ratio": chain.dense_nbytes / chain.nbytes,
    }


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print a description of a chain: JSON, or a table of its steps and a line that compares its bytes."""
    if as_json:
        print(json.dumps(facts))
        return
    table = Table("step", *(Column(part, justify="right") for part in ("count", *PARTS, "bytes")), "info")
    for row in facts["steps"]:
        parts = [f"{row['bytes'][part]:,}" for part in PARTS]
        info = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row["info"].items())
        total = f"{sum(row['bytes'].values()):,}"
        table.add_row(str(row["step"]), f"{row['values']:,}", *parts, total, info)
    console = Console()
    console.print(table, width=max(console.width, 130), crop=False)
    count, steps, dense = len(facts["steps"]), facts["steps_bytes"], facts["state_bytes"]
    if count:
        print(f"steps        {steps:,} bytes; dense {count * dense:,}: {count * dense / steps:.1f} times as many")
    what = "with base" if facts["keeps_base"] else "without base"
    print(
        f"{what:<12} {facts['bytes']:,} bytes; dense {facts['dense_bytes']:,}: {facts['ratio']:.1f} times as many"
    )


def restore(folder: Path, step: int, out: Path, base: str | None) -> str:
    """Write a state of a chain as a model.

    Args:
        folder: the chain's.
        step: which; -1 for the newest, 0 for the base.
        out: a ``.safetensors`` file; or a new model folder, where the chain says what its model is.
        base: the base, where the chain does not keep it; a safetensors file or a model source. Without it the
            model that the chain names is loaded.

    Returns:
        One line that says what was written.

    Raises:
        ParamsError: if a folder is asked for and the chain does not say what its model is.
        ModelError: if ``base`` cannot be read.
    """
    chain = Chain.open(folder)
    source = chain.info.get("model")
    if not chain.keeps_base and (base or source):
        if base and base.endswith(".safetensors"):
            try:
                chain = Chain.open(folder, base=load_file(base))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{base}: is no readable safetensors file ({error})") from None
        else:
            chain = Chain.open(folder, base=load_model(base or str(source), info=chain.info))
    if out.suffix == ".safetensors":
        write_bytes(out, save(chain.state(step), {"format": "pt"}))
    elif source is None:
        raise ParamsError(
            f"{folder}: does not say what its model is; name a .safetensors file with --out, not {out}"
        )
    else:
        model = load_model(str(source), info=chain.info)
        chain.restore_(model, step)
        save_model(model, str(source), out)
    return f"{out}: step {step if step >= 0 else ([0] + [s.number for s in chain.steps])[step]} of {folder}"


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
