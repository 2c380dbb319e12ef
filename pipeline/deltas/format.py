"""The delta file: the mask's own sections, then one section of values per dtype, then what is known of the base.

    values.<dtype>        [sum of counts]   trained values, tensors in the order of the mask's index
    buffers.<dtype>       [sum of sizes]    buffers, sorted by name
    base.values.<dtype>   as ``values``     where the base's are kept; ``base.buffers.<dtype>`` likewise
    base.tensors          uint8 [T, 8]      first bytes of each parameter's digest, sorted by name, where known

Tensors of one dtype share a section, since every section costs ~250 bytes of header. ``coders`` in the metadata
names how each of these sections is coded; ``raw`` (the values in their dtype) is the only one of version 1.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pipeline.deltas.base import SHORT, Base
from pipeline.deltas.target import Layout, dtype_name
from pipeline.errors import ArtifactError, FishmaskError
from pipeline.files import DTYPES
from pipeline.masks import codec
from pipeline.masks.mask import Mask
from pipeline.parameters import Shape

if TYPE_CHECKING:
    from pipeline.deltas.delta import Delta

FORMAT = "fishmask-delta"
VERSION = 1
RAW = "raw"
Sections = Mapping[str, Tensor]
Form = tuple[torch.dtype, Shape]
T = TypeVar("T")
_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES.values()}


def encode(delta: "Delta") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Lay a delta out for the file writer.

    Returns:
        meta and sections.
    """
    layout, known = delta.layout, delta.known
    order = list(delta.mask.index)
    common = Counter(dtype_name(dtype) for dtype, _ in layout.parameters.values()).most_common(1)[0][0]
    own = _packed("values", delta.values, order) | _packed("buffers", delta.buffers, sorted(delta.buffers))
    if known.values is not None:
        own |= _packed("base.values", known.values, order)
        own |= _packed("base.buffers", known.buffers, sorted(known.buffers))
    if known.tensors:
        digests = "".join(known.tensors[name] for name in sorted(known.tensors))
        own["base.tensors"] = torch.tensor(list(bytes.fromhex(digests)), dtype=torch.uint8).reshape(-1, SHORT // 2)
    meta = {
        "digest": delta.digest,
        "base": known.digest,
        "keeps_base": known.values is not None,
        "mask": {"digest": delta.mask.digest, "info": delta.mask.info},
        "coders": dict.fromkeys(own, RAW),
        "dtype": common,
        "dtypes": {n: dtype_name(d) for n, (d, _) in layout.parameters.items() if dtype_name(d) != common},
        "frozen": {n: list(shape) for n, (_, shape) in layout.parameters.items() if n not in delta.mask.index},
        "ties": layout.ties,
        "buffers": {n: [dtype_name(b.dtype), list(b.shape)] for n, b in delta.buffers.items()},
        "info": delta.info,
    }
    return meta, {**delta.mask.pack(), **own}


def decode(make: Callable[..., T], where: str, meta: Mapping[str, Any], sections: Sections) -> T:
    """Build a delta from verified bytes, checking that they agree with each other.

    Args:
        make: the class Delta.
        where: the file, for messages.
        meta: as ``encode`` gave it.
        sections: likewise.

    Returns:
        The delta.

    Raises:
        ValueError: if counts, dtypes or digests disagree, or a section is missing, unknown or of another coder.
    """
    coders = _of_type(dict, meta["coders"])
    for name, coder in coders.items():
        if coder != RAW:
            raise ValueError(f"section '{name}' is coded as {coder!r}; this version reads {RAW}")
    own = {name: sections[name] for name in coders}
    packed = {name: section for name, section in sections.items() if name not in coders}
    mask = Mask.unpack(packed, where, meta["mask"]["info"])
    if mask.digest != meta["mask"]["digest"] or set(packed) != {codec.TABLE, codec.BODY}:
        raise ValueError("its mask is not the one that the metadata names")
    common, others = _DTYPES[meta["dtype"]], _of_type(dict, meta["dtypes"])
    frozen = {name: _shape(shape) for name, shape in _of_type(dict, meta["frozen"]).items()}
    shapes = {**mask.index.shapes, **frozen}
    if len(shapes) != len(mask.index) + len(frozen) or not set(others) <= set(shapes):
        raise ValueError("names of frozen tensors or of dtypes do not fit the mask")
    dtypes = {name: _DTYPES[others[name]] if name in others else common for name in shapes}
    ties = {str(alias): _of_type(str, name) for alias, name in _of_type(dict, meta["ties"]).items()}
    if not set(ties.values()) <= set(shapes) or set(ties) & set(shapes):
        raise ValueError("ties name tensors that are not there")
    layout = Layout({name: (dtypes[name], shapes[name]) for name in shapes}, ties)
    counts: dict[str, Form] = {name: (dtypes[name], (mask.count(name),)) for name in mask.index}
    buffers = {
        n: (_DTYPES[form[0]], _shape(form[1])) for n, form in sorted(_of_type(dict, meta["buffers"]).items())
    }
    values = _unpacked("values", counts, own)
    held = _unpacked("buffers", buffers, own)
    base_values, base_buffers = None, {}
    if _of_type(bool, meta["keeps_base"]):
        base_values = _unpacked("base.values", counts, own)
        base_buffers = _unpacked("base.buffers", buffers, own)
    known = Base(_of_type(str, meta["base"]), base_values, base_buffers, _tensor_digests(shapes, own))
    if own:
        raise ValueError(f"section '{next(iter(own))}' is unknown")
    delta = make(mask, values, held, known, layout, _of_type(dict, meta["info"]))
    if getattr(delta, "digest", None) != meta["digest"]:
        raise ValueError("the content does not have the digest that the file states")
    return delta


def checked(path: str | PathLike[str], make: Callable[..., T], meta: Mapping[str, Any], sections: Sections) -> T:
    """Build a delta as ``decode`` does, and blame the file for what does not fit.

    Returns:
        The delta.

    Raises:
        ArtifactError: if the file is no sound delta.
    """
    try:
        return decode(make, str(path), meta, sections)
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, FishmaskError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{path}: is no sound delta: {reason}; make the delta again") from None


def _packed(kind: str, tensors: Mapping[str, Tensor], order: list[str]) -> dict[str, Tensor]:
    """Join tensors of one dtype into one flat section."""
    parts: dict[str, list[Tensor]] = {}
    for name in order:
        if tensors[name].numel():
            parts.setdefault(f"{kind}.{dtype_name(tensors[name].dtype)}", []).append(tensors[name].reshape(-1))
    return {section: torch.cat(flat) for section, flat in parts.items()}


def _unpacked(kind: str, forms: Mapping[str, Form], sections: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split flat sections again and take them out of ``sections``; sizes must fit exactly."""
    sizes: dict[torch.dtype, int] = {}
    for dtype, shape in forms.values():
        sizes[dtype] = sizes.get(dtype, 0) + prod(shape)
    flat: dict[torch.dtype, Tensor] = {}
    for dtype, size in sizes.items():
        name = f"{kind}.{dtype_name(dtype)}"
        flat[dtype] = sections.pop(name) if size else torch.empty(0, dtype=dtype)
        if flat[dtype].dtype != dtype or tuple(flat[dtype].shape) != (size,):
            raise ValueError(
                f"section '{name}' is {flat[dtype].dtype} {list(flat[dtype].shape)}; expected {size} values"
            )
    tensors, position = {}, dict.fromkeys(sizes, 0)
    for name, (dtype, shape) in forms.items():
        start = position[dtype]
        position[dtype] = start + prod(shape)
        tensors[name] = flat[dtype][start : position[dtype]].reshape(shape)
    return tensors


def _tensor_digests(shapes: Mapping[str, Shape], sections: dict[str, Tensor]) -> dict[str, str]:
    """Take the digests of the base's single tensors out of ``sections``; none where it has none."""
    table = sections.pop("base.tensors", None)
    if table is None:
        return {}
    if table.dtype != torch.uint8 or tuple(table.shape) != (len(shapes), SHORT // 2):
        raise ValueError("section 'base.tensors' does not fit the tensors")
    return {name: bytes(row).hex() for name, row in zip(sorted(shapes), table.tolist(), strict=True)}


def _of_type(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} is expected where the metadata has {type(value).__name__}")
    return value


def _shape(value: Any) -> Shape:
    shape = tuple(_of_type(int, size) for size in _of_type(list, value))
    if any(size < 0 for size in shape):
        raise ValueError(f"{list(shape)} is no shape")
    return shape
