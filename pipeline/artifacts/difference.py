"""The exact delta of two checkpoints: wherever a bit differs, the tuned one's value."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline import files
from pipeline.artifacts.application import Done, check_out, located
from pipeline.artifacts.checkpoints import Checkpoint
from pipeline.deltas.base import SHORT, Base
from pipeline.deltas.delta import Delta
from pipeline.deltas.target import Layout, dtype_name
from pipeline.errors import MismatchError, ModelError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex, byte_view, digest_of_digests, take, tensor_digest
from pipeline.runtime.workspace import VERSION
from pipeline.tasks.saved import classifier_info

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_UNKNOWN = "0" * SHORT  # for the digest of a tensor that the base does not have


def diff(
    base: str, tuned: str, out: Path, *, keep_base: bool = False, thin: bool = False, force: bool = False
) -> Done:
    """Write the delta that makes ``tuned`` of ``base``.

    Buffers, BatchNorm's statistics and integers included, count as parameters: two files do not tell them apart.
    A tensor that only the tuned model has is covered whole; one that only the base has is no part of the delta
    and stays in what is made of it. Equal checkpoints give a delta without values.

    Args:
        base: a safetensors file, or a folder in the hub's layout, or package:NAME.
        tuned: likewise, of the same shapes and dtypes; names may differ by one leading component.
        out: the delta file to write.
        keep_base: store the base's values too, so that the delta can be reverted without it.
        thin: code the values against the base's: a smaller file, which cannot be read without the base.
        force: replace what stands at ``out``.

    Returns:
        What was written.

    Raises:
        MismatchError: if a tensor is of another shape or dtype; names the first.
        ParamsError: if both are the same files, or the base lacks values that are to be kept.
    """  # noqa: DOC502 - raised by what it calls
    if keep_base and thin:
        raise ParamsError("--keep-base and --thin exclude each other: one holds the base's values, one needs them")
    paths = [_files_of(base), _files_of(tuned)]
    if paths[0].resolve() == paths[1].resolve():
        raise ParamsError(f"{base}: is both the base and the tuned model; name two")
    check_out(out, paths, force=force, folder=False)
    after = Checkpoint.open(paths[1])
    before = Checkpoint.open(paths[0]).named_like(after)
    for name, entry in after.entries.items():
        _check(name, before, after)
        if keep_base and name not in before:
            raise ParamsError(f"{base}: lacks tensor '{name}' {list(entry.shape)}: no --keep-base here")
    chosen: dict[str, Tensor] = {}
    whole: list[str] = []
    values: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for name in after:
        new = after[name]
        old = before[name] if name in before else None
        at = None if old is None else _differing(old, new)
        if at is None or at.numel() == new.numel():
            at = None
            whole.append(name)
        elif at.numel():
            chosen[name] = at
        values[name] = take(new, at)
        if old is not None:
            digests[name] = tensor_digest(old)
        if keep_base or thin:
            kept[name] = torch.zeros_like(values[name]) if old is None else take(old, at)
    index = ParameterIndex({name: entry.shape for name, entry in after.entries.items()})
    layout = Layout({name: (entry.dtype, entry.shape) for name, entry in after.entries.items()})
    known = Base(
        digest_of_digests(digests, without=whole),
        kept if keep_base else None,
        tensors={name: digests.get(name, _UNKNOWN)[:SHORT] for name in after},
    )
    info = {"made": "diff", "model": base, "tuned": tuned, "fishmask": VERSION} | classifier_info(after.folder)
    delta = Delta(Mask.covering(index, whole, chosen), values, {}, known, layout, info)
    size = delta.save(out, base=replace(known, values=kept) if thin else None)
    only = sorted(before.keys() - after.keys())
    line = (
        f"{out}: {delta.mask.nnz:,} of {index.total:,} values differ, {size:,} bytes (delta {delta.digest[:12]})"
    )
    if only:
        line += f"; not in {tuned}, so left as they are: {', '.join(only)}"
    facts = {"out": str(out), "delta": delta.digest, "values": delta.mask.nnz, "parameters": index.total}
    return Done(line, facts | {"bytes": size, "whole": whole, "base_only": only})


def _files_of(source: str) -> Path:
    path = located(source)
    if path is None:
        raise ModelError(f"{source}: names no files; expected a safetensors file, a model folder or package:NAME")
    return path


def _check(name: str, before: Checkpoint, after: Checkpoint) -> None:
    """Refuse a tensor that no delta can hold, or that changed its form."""
    entry, old = after.entries[name], before.entries.get(name)
    if entry.dtype not in files.DTYPES.values():
        known = ", ".join(dtype_name(dtype) for dtype in files.DTYPES.values())
        raise MismatchError(
            f"{after.where}: tensor '{name}' is {dtype_name(entry.dtype)}; expected one of {known}"
        )
    if old is not None and old.shape != entry.shape:
        forms = f"{list(old.shape)} in {before.where} and {list(entry.shape)} in {after.where}"
        raise MismatchError(f"tensor '{name}' is {forms}; expected two models of equal shapes")
    if old is not None and old.dtype != entry.dtype:
        forms = f"{dtype_name(old.dtype)} in {before.where} and {dtype_name(entry.dtype)} in {after.where}"
        raise MismatchError(f"tensor '{name}' is {forms}; store both in one dtype")


def _differing(old: Tensor, new: Tensor) -> Tensor:
    """Row-major coordinates where any bit differs."""
    bits = _BITS[new.element_size()]
    return (byte_view(old).view(bits) != byte_view(new).view(bits)).nonzero().reshape(-1)
