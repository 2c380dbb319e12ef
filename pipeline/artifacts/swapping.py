"""Swapping through the deltas of one base in one process: every variant checked bit by bit, every swap timed."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.artifacts.application import built, located
from pipeline.artifacts.checkpoints import Checkpoint
from pipeline.artifacts.streaming import Streamed
from pipeline.deltas.delta import Delta
from pipeline.deltas.target import Model, Target, persistent_buffers
from pipeline.deltas.variants import Variants
from pipeline.errors import MismatchError, ParamsError
from pipeline.parameters import digest_of_digests, tensor_digest
from pipeline.runtime.progress import ProgressLine
from pipeline.runtime.terminal import print_table


def rehearse(files: Sequence[Path], base: str, *, rounds: int = 10) -> dict[str, Any]:
    """Hold a base in memory, become each of its variants in turn and the base again, and measure it.

    The digest that a variant must have is taken from the base and the delta before the first swap. It is compared
    with that of all parameters and buffers after the first and after the last swap to each variant, and the base's
    after the last round. Reloading, for comparison, reads a dense checkpoint of the same tensors from a temporary
    file and copies it in, once a round.

    Args:
        files: the deltas.
        base: their base, as ``application.apply`` takes it.
        rounds: how often to go through all of them.

    Returns:
        ``variants``: a row a delta, with ``file``, ``delta`` and ``state`` (digests), ``values``, ``bytes`` (in
        memory), ``load_ms``, ``swap_ms`` and ``ratio`` (reload / swap in the same round); the last two as median,
        least and most. ``reload_ms`` likewise, ``back_ms`` (to the base), ``swaps``, and bytes of one dense model.

    Raises:
        ParamsError: if a delta is named twice.
        MismatchError: if a delta is of another base, or a swap is not exact.
    """
    names = [str(file) for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ParamsError(f"{twice}: is named twice; name each delta once")
    deltas, loads = {}, {}
    for name, file in zip(names, files, strict=True):
        loads[name], deltas[name] = _timed(Delta.load, file)
    model = _loaded(base, deltas[names[0]])
    variants = Variants(model, deltas)
    tensors = _tensors(model, deltas[names[0]])
    wanted = {name: _digest(tensors, model, delta) for name, delta in deltas.items()}
    ground = _digest(tensors, model)
    swaps: dict[str | None, list[float]] = {name: [] for name in [*names, None]}
    reloads: list[float] = []
    with tempfile.TemporaryDirectory() as folder, ProgressLine("swap") as line:
        dense = Path(folder) / "dense.safetensors"
        save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, dense)
        reload_(tensors, dense)  # untimed, as the first swaps are: their pages are new
        for turn in range(rounds + 1):
            for key, times in swaps.items():
                seconds, _ = _timed(variants.use, key)
                times += [1e3 * seconds] * bool(turn)
                if turn in (0, rounds) and _digest(tensors, model) != (wanted[key] if key else ground):
                    raise MismatchError(
                        f"{key or base}: swap {turn * len(swaps)} did not give it back bit for bit; report this"
                    )
            seconds, _ = _timed(reload_, tensors, dense)
            reloads += [1e3 * seconds] * bool(turn)
            line.update(turn, rounds, "rounds")
    rows = [
        {
            "file": name,
            "delta": delta.digest,
            "state": wanted[name],
            "values": delta.mask.nnz,
            "bytes": delta.nbytes,
        }
        | {"load_ms": 1e3 * loads[name], "swap_ms": _spread(swaps[name])}
        | {"ratio": _spread([dense / swap for dense, swap in zip(reloads, swaps[name], strict=True)])}
        for name, delta in deltas.items()
    ]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    facts = {"base": base, "state": ground, "dense_bytes": size, "rounds": rounds}
    facts |= {"swaps": (rounds + 1) * len(swaps), "reload_ms": _spread(reloads), "back_ms": _spread(swaps[None])}
    return facts | {"variants": rows}


def show(facts: Mapping[str, Any]) -> None:
    """Print what ``rehearse`` found."""
    rows, size = facts["variants"], facts["dense_bytes"]
    print(f"base     {facts['base']}: {size:,} bytes in memory, and {sum(r['bytes'] for r in rows):,} of deltas")
    print(f"exact    {facts['swaps']} swaps; every variant and, in the end, the base again bit for bit")
    print(f"reload   {_text(facts['reload_ms'])} ms to read a dense checkpoint and copy it in")
    cells = [(r["file"], f"{r['values']:,}", _text(r["swap_ms"]), _text(r["ratio"])) for r in rows]
    back = ("the base again", "", _text(facts["back_ms"]), "")
    print_table(("delta", "values", "swap ms", "reload / swap"), [*cells, back])


def reload_(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copy a safetensors file into tensors in memory, as ``load_state_dict`` does."""
    with torch.no_grad():
        for name, tensor in load_file(file).items():
            tensors[name].copy_(tensor)


def _loaded(base: str, lead: Delta) -> Model:
    """The base in the delta's dtypes: its files' tensors, or built where they lack a head."""
    path = located(base)
    if path is not None:
        view = Streamed(Checkpoint.open(path), lead)
        if not view.lacking and not lead.buffers.keys() - view.keys():
            return {name: view[name].clone() for name in view}
        if view.checkpoint.alone:
            raise MismatchError(f"{base}: lacks tensor '{view.lacking[0]}' of the delta; name the base's folder")
    return built(base, lead)


def _tensors(model: Model, lead: Delta) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name, tied weights once."""
    buffers = lead.buffers if isinstance(model, Mapping) else persistent_buffers(model)
    target = Target(model, lead.layout, buffers)
    return {**target.parameters, **target.buffers}


def _digest(tensors: Mapping[str, Tensor], model: Model, delta: Delta | None = None) -> str:
    """Digest all parameters and buffers, as they are or as a delta makes them."""
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    if delta is not None:
        writes = {name: (delta.at(name), part) for name, part in delta.values.items() if part.numel()}
        digests |= Target(model, delta.layout, {}).digests(writes)
        digests |= {name: tensor_digest(buffer) for name, buffer in delta.buffers.items()}
    return digest_of_digests(digests)


def _timed(act: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    done = act(*arguments)
    return time.perf_counter() - start, done


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _text(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['least']:.1f}-{spread['most']:.1f})"
