"""The delta file: the mask's own sections, then sections of values, one per dtype, then what is known of the base.

    values.<dtype>        trained values that stand alone, tensors in the order of the mask's index
    against.<dtype>       trained values coded against the base's, likewise
    buffers.<dtype>       buffers, sorted by name
    base.values.<dtype>   as all of ``values``, where the base's are kept; ``base.buffers.<dtype>`` likewise
    base.tensors          uint8 [T, 8]: first bytes of each parameter's digest, sorted by name, where known

Tensors of one dtype share a section, since every section costs ~250 bytes of header. ``coders`` in the metadata
names how each is coded (values.py). ``against`` says what ``against.<dtype>`` holds and against which values:

    nothing   there is no such section
    kept      every tensor of the dtype, against ``base.values``
    parts     the tensors that the mask covers in part, against the base itself: a *thin* file
    all       every tensor of the dtype, likewise, where the base's digest covers them all
"""

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pipeline.deltas import thin
from pipeline.deltas import values as coding
from pipeline.deltas.base import SHORT, Base
from pipeline.deltas.metadata import DTYPE_OF, of_type, shape_of, sound
from pipeline.deltas.target import Layout, dtype_name
from pipeline.masks import codec
from pipeline.masks.mask import Mask
from pipeline.parameters import Shape

if TYPE_CHECKING:
    from pipeline.deltas.delta import Delta

FORMAT = "fishmask-delta"
VERSION = 2  # 1 was never released
NOTHING, KEPT, PARTS, ALL = "nothing", "kept", "parts", "all"
Sections = Mapping[str, Tensor]
Form = tuple[torch.dtype, Shape]
Coded = dict[str, tuple[str, Tensor]]  # section -> coder and content
T = TypeVar("T")
_SECTION = 300  # bytes of header that one more section costs


def encode(
    delta: "Delta", before: Mapping[str, Tensor] | None = None, every: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Lay a delta out for the file writer.

    Args:
        delta: the delta.
        before: the base's values at the mask, to code against; where the delta keeps them, its own are taken.
        every: whether the base's digest covers the tensors that the mask covers whole.

    Returns:
        meta and sections.
    """
    layout, known, mask = delta.layout, delta.known, delta.mask
    order = list(mask.index)
    common = Counter(dtype_name(dtype) for dtype, _ in layout.parameters.values()).most_common(1)[0][0]
    against, own = _values(delta, before, every)
    own |= _alone("buffers", delta.buffers, sorted(delta.buffers))
    if known.values is not None:
        own |= _alone("base.values", known.values, order)
        own |= _alone("base.buffers", known.buffers, sorted(known.buffers))
    if known.tensors:
        digests = "".join(known.tensors[name] for name in sorted(known.tensors))
        table = torch.tensor(list(bytes.fromhex(digests)), dtype=torch.uint8).reshape(-1, SHORT // 2)
        own["base.tensors"] = (coding.RAW, table)
    meta = {
        "digest": delta.digest,
        "base": known.digest,
        "keeps_base": known.values is not None,
        "mask": {"digest": mask.digest, "info": mask.info},
        "against": against,
        "coders": {name: coder for name, (coder, _) in own.items()},
        "dtype": common,
        "dtypes": {n: dtype_name(d) for n, (d, _) in layout.parameters.items() if dtype_name(d) != common},
        "frozen": {n: list(shape) for n, (_, shape) in layout.parameters.items() if n not in mask.index},
        "ties": layout.ties,
        "buffers": {n: [dtype_name(b.dtype), list(b.shape)] for n, b in delta.buffers.items()},
        "info": delta.info,
    }
    return meta, {**mask.pack(), **{name: section for name, (_, section) in own.items()}}


def _values(delta: "Delta", before: Mapping[str, Tensor] | None, every: bool) -> tuple[str, Coded]:
    """Code the trained values, of each dtype against the base's where that is smaller."""
    order = list(delta.mask.index)
    if delta.thin is not None:  # as the file had it, since its values are not known
        own = _alone("values", delta.thin.ready, order)
        own |= {thin.section_of(dtype): (coding.RESIDUALS, row.section) for dtype, row in delta.thin.rows.items()}
        return (ALL if delta.thin.every else PARTS), own
    own = _alone("values", delta.values, order)
    kept = delta.known.values
    source = before if kept is None else kept
    if source is None:
        return NOTHING, own
    against, every = NOTHING, every or kept is not None
    for dtype, names in thin.names_of(delta.mask, delta.layout, every).items():
        alone, section = f"values.{dtype_name(dtype)}", thin.section_of(dtype)
        left = {n: v for n, v in delta.values.items() if v.dtype == dtype and n not in names}
        coded: Coded = _alone("values", left, order)
        coder, code = coding.encode_against(
            thin.joined(delta.values, names), thin.joined(source, names), thin.places(delta.mask, names)
        )
        coded[section] = coder, code
        if coder == coding.RESIDUALS and _bytes(coded) < _bytes({alone: own[alone]}):
            del own[alone]
            own |= coded
            against = KEPT if kept is not None else ALL if every else PARTS
    return against, own


def decode(make: Callable[..., T], where: str, meta: Mapping[str, Any], sections: Sections) -> T:
    """Build a delta from verified bytes, checking that they agree with each other.

    Args:
        make: the class Delta.
        where: the file, for messages.
        meta: as ``encode`` gave it.
        sections: likewise.

    Returns:
        The delta; of a thin file, one whose values await its base.

    Raises:
        ValueError: if counts, dtypes or digests disagree, or a section is missing, unknown or of another coder.
    """
    own = {name: (of_type(str, coder), sections[name]) for name, coder in of_type(dict, meta["coders"]).items()}
    packed = {name: section for name, section in sections.items() if name not in own}
    mask = Mask.unpack(packed, where, meta["mask"]["info"])
    if mask.digest != meta["mask"]["digest"] or set(packed) != {codec.TABLE, codec.BODY}:
        raise ValueError("its mask is not the one that the metadata names")
    layout, buffers = _layout(mask, meta), _forms(meta["buffers"])
    counts: dict[str, Form] = {name: (layout.parameters[name][0], (mask.count(name),)) for name in mask.index}
    against, kept = of_type(str, meta["against"]), of_type(bool, meta["keeps_base"])
    rows = {}
    if against != NOTHING:
        for dtype, names in thin.names_of(mask, layout, against in (KEPT, ALL)).items():
            if thin.section_of(dtype) in own:
                rows[dtype] = _row(mask, dtype, names, *own.pop(thin.section_of(dtype)))
        if not rows or against not in ((KEPT,) if kept else (PARTS, ALL)):
            raise ValueError(f"its values cannot be coded against {against!r:.40}")
    coded = {name for row in rows.values() for name in row.names}
    ready = _unpacked("values", {name: form for name, form in counts.items() if name not in coded}, own)
    held = _unpacked("buffers", buffers, own)
    base_values = _unpacked("base.values", counts, own) if kept else None
    base_buffers = _unpacked("base.buffers", buffers, own) if kept else {}
    known = Base(of_type(str, meta["base"]), base_values, base_buffers, _tensor_digests(layout, own))
    if own:
        raise ValueError(f"section '{next(iter(own))}' is unknown")
    content = thin.Thin(where, of_type(str, meta["digest"]), against == ALL, ready, rows)
    values = content if rows and base_values is None else content.decode(mask, base_values or {})
    delta = make(mask, values, held, known, layout, of_type(dict, meta["info"]))
    if getattr(delta, "digest", None) != content.digest:
        raise ValueError("the content does not have the digest that the file states")
    return delta


def checked(path: str | PathLike[str], make: Callable[..., T], meta: Mapping[str, Any], sections: Sections) -> T:
    """Build a delta as ``decode`` does, and blame the file for what does not fit.

    Returns:
        The delta.

    Raises:
        ArtifactError: if the file is no sound delta.
    """  # noqa: DOC502 - raised by sound
    with sound(path, "delta", "make the delta again"):
        return decode(make, str(path), meta, sections)


def _row(mask: Mask, dtype: torch.dtype, names: list[str], coder: str, section: Tensor) -> thin.Row:
    """Read the values of one dtype's tensors that are coded against the base's."""
    try:
        return thin.Row(names, section, coding.read_residuals(section, coder, dtype, thin.places(mask, names)))
    except ValueError as error:
        raise ValueError(f"section '{thin.section_of(dtype)}' is corrupt: {error}") from None


def _layout(mask: Mask, meta: Mapping[str, Any]) -> Layout:
    common, others = DTYPE_OF[meta["dtype"]], of_type(dict, meta["dtypes"])
    frozen = {name: shape_of(shape) for name, shape in of_type(dict, meta["frozen"]).items()}
    shapes = {**mask.index.shapes, **frozen}
    if len(shapes) != len(mask.index) + len(frozen) or not set(others) <= set(shapes):
        raise ValueError("names of frozen tensors or of dtypes do not fit the mask")
    dtypes = {name: DTYPE_OF[others[name]] if name in others else common for name in shapes}
    ties = {str(alias): of_type(str, name) for alias, name in of_type(dict, meta["ties"]).items()}
    if not set(ties.values()) <= set(shapes) or set(ties) & set(shapes):
        raise ValueError("ties name tensors that are not there")
    return Layout({name: (dtypes[name], shapes[name]) for name in shapes}, ties)


def _forms(buffers: Any) -> dict[str, Form]:
    return {n: (DTYPE_OF[form[0]], shape_of(form[1])) for n, form in sorted(of_type(dict, buffers).items())}


def _bytes(sections: Coded) -> int:
    """Bytes that sections take in a file, about."""
    return sum(part.numel() * part.element_size() + _SECTION for _, part in sections.values())


def _alone(kind: str, tensors: Mapping[str, Tensor], order: list[str]) -> Coded:
    """Join the tensors of one dtype into one flat section, coded on its own."""
    parts: dict[str, list[Tensor]] = {}
    for name in order:
        if name in tensors and tensors[name].numel():
            parts.setdefault(f"{kind}.{dtype_name(tensors[name].dtype)}", []).append(tensors[name].reshape(-1))
    return {section: coding.encode(torch.cat(flat)) for section, flat in parts.items()}


def _unpacked(kind: str, forms: Mapping[str, Form], sections: Coded) -> dict[str, Tensor]:
    """Decode flat sections, split them again and take them out of ``sections``; sizes must fit exactly."""
    sizes: dict[torch.dtype, int] = {}
    for dtype, shape in forms.values():
        sizes[dtype] = sizes.get(dtype, 0) + prod(shape)
    flat: dict[torch.dtype, Tensor] = {}
    for dtype, size in sizes.items():
        name = f"{kind}.{dtype_name(dtype)}"
        try:
            coder, section = sections.pop(name) if size else (coding.RAW, torch.empty(0, dtype=dtype))
            flat[dtype] = coding.decode(section, coder, dtype, size)
        except ValueError as error:
            raise ValueError(f"section '{name}' is corrupt: {error}") from None
    tensors, position = {}, dict.fromkeys(sizes, 0)
    for name, (dtype, shape) in forms.items():
        start = position[dtype]
        position[dtype] = start + prod(shape)
        tensors[name] = flat[dtype][start : position[dtype]].reshape(shape)
    return tensors


def _tensor_digests(layout: Layout, sections: Coded) -> dict[str, str]:
    """Take the digests of the base's single tensors out of ``sections``; none where it has none."""
    coder, table = sections.pop("base.tensors", (coding.RAW, None))
    if table is None:
        return {}
    if (
        coder != coding.RAW
        or table.dtype != torch.uint8
        or tuple(table.shape) != (len(layout.parameters), SHORT // 2)
    ):
        raise ValueError("section 'base.tensors' does not fit the tensors")
    return {n: bytes(row).hex() for n, row in zip(sorted(layout.parameters), table.tolist(), strict=True)}
