"""Delta files: save -> load is the identity; whatever was changed is refused by name."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline import files
from pipeline.deltas import format
from pipeline.deltas.delta import Delta
from pipeline.deltas.target import same_bits
from pipeline.errors import ArtifactError, StorageError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex, base_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


pytestmark = pytest.mark.usefixtures("one_thread")


def sample(seed: int = 0, keep_base: bool = True, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES[:2])) -> Delta:
    """A delta of a model of several dtypes, with a frozen tensor, a tie, buffers, and a whole tensor."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6))
    for layer, dtype in zip((base[2], base[3]), dtypes, strict=False):
        layer.to(dtype)
    base[3].bias.requires_grad_(False)
    base.add_module("tied", nn.Linear(5, 6, bias=False))
    base.tied.weight = base[0].weight
    index = ParameterIndex.of(base)
    flags = {name: torch.rand(shape) < 0.4 for name, shape in index.shapes.items()}
    flags["3.weight"][:] = True
    flags["1.weight"][:] = False
    mask = Mask.from_bool(flags, info={"seed": seed})
    trained = copy.deepcopy(base)
    with torch.no_grad():
        for name, flag in flags.items():
            parameter = dict(trained.named_parameters())[name]
            parameter[flag] = torch.randn(int(flag.sum())).to(parameter.dtype)
    trained[1].running_mean += 1
    trained[1].num_batches_tracked += 3
    return Delta.of(trained, mask, base=base, keep_base=keep_base, info={"task": "words", "seed": seed})


def assert_equal(one: Delta, two: Delta) -> None:
    assert one == two and one.digest == two.digest
    assert one.mask == two.mask and one.mask.info == two.mask.info and list(one.mask.index) == list(two.mask.index)
    assert (one.base, one.info, one.layout) == (two.base, two.info, two.layout)
    assert one.known.tensors == two.known.tensors
    assert (one.known.values is None) == (two.known.values is None)
    pairs = [(one.values, two.values), (one.buffers, two.buffers), (one.known.buffers, two.known.buffers)]
    for a, b in [*pairs, (one.known.values or {}, two.known.values or {})]:
        assert a.keys() == b.keys()
        for name in a:
            assert same_bits(a[name], b[name])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.booleans(), dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2))
def test_save_then_load_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, seed: int, keep: bool, dtypes: tuple[torch.dtype, ...]
) -> None:
    folder = tmp_path_factory.mktemp("delta")
    delta = sample(seed, keep, dtypes)
    size = delta.save(folder / "a.safetensors")
    loaded = Delta.load(folder / "a.safetensors")
    assert_equal(loaded, delta)
    assert size == (folder / "a.safetensors").stat().st_size
    loaded.save(folder / "b.safetensors")
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


def test_a_loaded_delta_applies_reverts_and_swaps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    index = ParameterIndex.of(base)
    masks = [
        Mask.covering(index, ["2.weight", "2.bias"], {"0.weight": torch.tensor(c)}) for c in ([3, 9], [9, 60])
    ]
    models = []
    for i, mask in enumerate(masks):
        models.append(copy.deepcopy(base))
        for name, p in models[-1].named_parameters():
            p.data.view(-1)[mask.indices[name]] += i + 1
        models[-1][1].num_batches_tracked += i
        Delta.of(models[-1], mask, base=base, keep_base=True).save(tmp_path / f"{i}.safetensors")
    a, b = (Delta.load(tmp_path / f"{i}.safetensors") for i in range(2))
    states = [m.state_dict() for m in (base, *models)]
    model = copy.deepcopy(models[0])
    Delta.swap_(model, a, b)
    assert all(torch.equal(t, states[2][n]) for n, t in model.state_dict().items())
    b.revert_(model)
    assert all(torch.equal(t, states[0][n]) for n, t in model.state_dict().items())
    a.apply_(model)
    assert all(torch.equal(t, states[1][n]) for n, t in model.state_dict().items())


REFUSED = r"delta.safetensors: section '[a-z.0-9]+' is corrupt"


def test_ten_thousand_flipped_bits_are_all_refused_by_section(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    sample().save(path)
    data = path.read_bytes()
    with path.open("r+b") as file:
        for bit in random.Random(0).sample(range(8 * len(data)), 10_000):
            at = bit // 8
            file.seek(at)
            file.write(bytes([data[at] ^ 1 << bit % 8]))
            file.flush()
            with pytest.raises(ArtifactError, match=REFUSED):
                Delta.load(path)
            file.seek(at)
            file.write(data[at : at + 1])
        file.flush()
        assert path.read_bytes() == data


def test_every_truncation_and_any_surplus_are_refused(tmp_path: Path) -> None:
    path, bad = tmp_path / "delta.safetensors", tmp_path / "bad.safetensors"
    sample().save(path)
    data = path.read_bytes()
    with path.open("r+b") as file:
        for size in reversed(range(len(data))):
            file.truncate(size)
            with pytest.raises(ArtifactError, match=REFUSED):
                Delta.load(path)
    for surplus in (b"\0", data):
        bad.write_bytes(data + surplus)
        with pytest.raises(ArtifactError, match="bad.safetensors.*after its last section"):
            Delta.load(bad)


Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]


def meta_edit(change: dict[str, Any]) -> Edit:
    return lambda meta, sections: meta.update(change)


def drop(key: str) -> Edit:
    return lambda meta, sections: meta.pop(key)


def section_edit(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda meta, sections: sections.update({name: change(sections[name])})


def another_buffer(meta: dict[str, Any], sections: dict[str, Tensor]) -> None:
    meta["buffers"] = {**meta["buffers"], "9.huge": ["float32", [1 << 40]]}


def surplus_section(meta: dict[str, Any], sections: dict[str, Tensor]) -> None:
    sections["values.int8"] = torch.zeros(3, dtype=torch.int8)
    meta["coders"]["values.int8"] = "raw"


def other_coder(meta: dict[str, Any], sections: dict[str, Tensor]) -> None:
    meta["coders"]["values.float32"] = "golomb"


HOSTILE: dict[str, Edit] = {
    "digest": meta_edit({"digest": "0" * 64}),
    "base": meta_edit({"base": "0" * 64}),
    "base of another type": meta_edit({"base": 3}),
    "dtype unknown": meta_edit({"dtype": "complex64"}),
    "dtype other": meta_edit({"dtype": "float16"}),
    "dtype no text": meta_edit({"dtype": [1]}),
    "dtypes of no tensor": meta_edit({"dtypes": {"nothing": "float32"}}),
    "frozen twice": meta_edit({"frozen": {"0.weight": [6, 5]}}),
    "frozen negative": meta_edit({"frozen": {"x": [-1]}}),
    "frozen no list": meta_edit({"frozen": {"x": "6"}}),
    "frozen is a list": meta_edit({"frozen": [["x", [6]]]}),
    "ties to nothing": meta_edit({"ties": {"a": "b"}}),
    "ties a tensor": meta_edit({"ties": {"0.weight": "0.bias"}}),
    "buffers forgotten": meta_edit({"buffers": {}}),
    "buffers of one entry": meta_edit({"buffers": {"1.running_mean": ["float32"]}}),
    "buffers larger": another_buffer,
    "info no mapping": meta_edit({"info": [1]}),
    "mask another": meta_edit({"mask": {"digest": "0" * 64, "info": {}}}),
    "mask no mapping": meta_edit({"mask": 7}),
    "keeps_base no boolean": meta_edit({"keeps_base": 1}),
    "keeps_base denied": meta_edit({"keeps_base": False}),
    "coders no mapping": meta_edit({"coders": ["values.float32"]}),
    "coder unknown": other_coder,
    "section surplus": surplus_section,
    "section short": section_edit("values.float32", lambda t: t[:-1]),
    "section long": section_edit("values.float32", lambda t: torch.cat([t, t])),
    "section square": section_edit("values.float32", lambda t: t[:, None]),
    "section of another dtype": section_edit("values.float32", lambda t: t.view(torch.int32)),
    "values changed": section_edit("values.float32", lambda t: t + 1),
    "buffers changed": section_edit("buffers.float32", lambda t: t + 1),
    "tensor digests short": section_edit("base.tensors", lambda t: t[1:]),
    **{f"without {key}": drop(key) for key in
       ("digest", "base", "keeps_base", "mask", "coders", "dtype", "dtypes", "frozen", "ties", "buffers", "info")},
    **{f"without section {name}": (lambda meta, sections, name=name: sections.pop(name)) for name in
       ("values.float32", "values.bfloat16", "buffers.int64", "base.values.float32", "base.tensors", "coordinates",
        "tensors")},
}  # fmt: skip


@pytest.mark.parametrize("edit", HOSTILE)
def test_a_file_with_sound_checksums_and_false_contents_is_refused(tmp_path: Path, edit: str) -> None:
    meta, sections = format.encode(sample())
    path = tmp_path / "bad.safetensors"
    files.write_file(path, format=format.FORMAT, version=format.VERSION, meta=meta, sections=sections)
    Delta.load(path)  # sound until edited
    HOSTILE[edit](meta, sections)
    files.write_file(path, format=format.FORMAT, version=format.VERSION, meta=meta, sections=sections)
    with pytest.raises(ArtifactError, match="bad.safetensors") as caught:
        Delta.load(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    delta = sample()
    delta.mask.save(tmp_path / "mask.safetensors")
    with pytest.raises(ArtifactError, match="mask.safetensors.*is a .*mask file"):
        Delta.load(tmp_path / "mask.safetensors")
    meta, sections = format.encode(delta)
    path = tmp_path / "new.safetensors"
    files.write_file(path, format=format.FORMAT, version=format.VERSION + 1, meta=meta, sections=sections)
    with pytest.raises(ArtifactError, match="newer fishmask"):
        Delta.load(path)
    old, _ = format.encode(delta)
    old.pop("against")  # as version 1, which was never released, had none
    files.write_file(path, format=format.FORMAT, version=1, meta=old, sections=sections)
    with pytest.raises(ArtifactError, match="new.safetensors: is no sound delta: 'against' is missing"):
        Delta.load(path)
    with pytest.raises(ArtifactError, match="no such file"):
        Delta.load(tmp_path / "nothing.safetensors")
    with pytest.raises(StorageError, match="create the folder"):
        delta.save(tmp_path / "nowhere" / "delta.safetensors")


def test_a_delta_costs_little_beyond_its_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)])
    index = ParameterIndex.of(base)
    mask = Mask.top_k({name: torch.rand(shape) for name, shape in index.shapes.items()}, 0.05)
    plain = Delta.of(base, mask, base=base_digest(base)).save(tmp_path / "plain.safetensors")
    assert plain < 4 * mask.nnz + mask.save(tmp_path / "mask.safetensors") + 2500
    known = Delta.of(base, mask, base=base).save(tmp_path / "known.safetensors")
    assert known < plain + 8 * len(index) + 500
