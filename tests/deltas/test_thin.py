"""Thin files: values coded against the base, decoded where the base is met, refused everywhere else."""

import copy
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline import files
from pipeline.deltas import format
from pipeline.deltas.base import Base
from pipeline.deltas.delta import Delta
from pipeline.deltas.target import Model, same_bits
from pipeline.errors import ArtifactError, MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex, base_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(24, 40), nn.BatchNorm1d(40), nn.Linear(40, 40, bias=False))
        self.classifier = nn.Linear(40, 3)


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().to(dtype)


def mask_of(model: nn.Module, seed: int = 1, whole: tuple[str, ...] = ("classifier",)) -> Mask:
    draw = torch.Generator().manual_seed(seed)
    index = ParameterIndex.of(model)
    flags = {name: torch.rand(shape, generator=draw) < 0.4 for name, shape in index.shapes.items()}
    for name in index.within(whole):
        flags[name][:] = True
    return Mask.from_bool(flags, info={"seed": seed})


@torch.no_grad()
def trained(base: nn.Module, mask: Mask, seed: int = 2) -> nn.Module:
    """Small steps, as training makes them, with a NaN, an infinity and both zeros among the values."""
    draw = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        at = mask.indices[name]
        values = parameter.view(-1)[at].double() + 1e-3 * torch.randn(len(at), generator=draw, dtype=torch.float64)
        values[:4] = torch.tensor([torch.nan, -torch.inf, -0.0, 0.0], dtype=torch.float64)[: len(at)]
        parameter.view(-1)[at] = values.to(parameter.dtype)
    model.body[1].running_mean += 1
    model.body[1].num_batches_tracked += seed
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(same_bits(one[name], two[name]) for name in one)


def files_of(
    folder: Path, base: nn.Module, mask: Mask, source: Base | Model | None = None
) -> tuple[nn.Module, Delta, Path]:
    """A trained model, its delta, and a thin file of it."""
    model = trained(base, mask)
    delta = Delta.of(model, mask, base=base, info={"task": "words"})
    path = folder / "thin.safetensors"
    delta.save(path, base=source or base)
    return model, delta, path


def bytes_of_values(path: Path) -> int:
    sizes = files.read_header(path, format=format.FORMAT, version=format.VERSION)[1]
    return sum(size for name, size in sizes.items() if name.startswith(("values.", "against.")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["module", "state dict", "taken before"])
def test_a_thin_file_is_smaller_and_gives_the_trained_model(
    tmp_path: Path, given: str, dtype: torch.dtype
) -> None:
    base = net(dtype)
    mask = mask_of(base)
    source = {"module": base, "state dict": base.state_dict(), "taken before": Base.of(base, mask)}[given]
    model, delta, path = files_of(tmp_path, base, mask, source)
    alone = tmp_path / "alone.safetensors"
    assert path.stat().st_size < delta.save(alone)
    assert bytes_of_values(path) < {4: 0.8, 2: 0.65}[dtype.itemsize] * bytes_of_values(alone)  # the head's alone
    loaded = Delta.load(path)
    assert loaded.thin is not None and loaded == delta and loaded.digest == delta.digest
    assert (loaded.nbytes, loaded.info, loaded.layout) == (delta.nbytes, delta.info, delta.layout)
    assert (loaded.mask, loaded.base, loaded.known.tensors) == (delta.mask, delta.base, delta.known.tensors)
    assert loaded.norms() == {} and [row["norm"] for row in loaded.summary()] == [None] * len(mask.index)
    assert same(loaded.buffers, delta.buffers)
    there = copy.deepcopy(base)
    there.classifier.reset_parameters()  # drawn anew in every run, and replaced whole
    before = bits(there)
    loaded.apply_(there)
    assert same(bits(there), bits(model)) and loaded.thin is None and same(loaded.values, delta.values)
    loaded.revert_(there)
    assert same(bits(there), before)


def test_values_wait_for_the_base(tmp_path: Path) -> None:
    base = net()
    model, delta, path = files_of(tmp_path, base, mask_of(base))
    loaded = Delta.load(path)
    with pytest.raises(MismatchError, match=r"thin.safetensors: .* coded against its base .*; apply it") as caught:
        _ = loaded.values
    assert "\n" not in str(caught.value)
    with pytest.raises(MismatchError):
        loaded.revert_(model)
    assert loaded.resolve(base) is loaded and same(loaded.values, delta.values)
    assert same(Delta.load(path).resolve(base.state_dict()).values, delta.values)
    assert same(Delta.load(path).resolve(Base.of(base, delta.mask)).values, delta.values)
    assert delta.resolve(net(seed=5)) is delta  # nothing to resolve
    kept = Delta.load(path).with_base(base)
    assert kept == delta and same(kept.known.values or {}, Base.of(base, delta.mask).values or {})
    kept.revert_(model)
    assert same(bits(model), bits(base))


def test_a_thin_delta_is_saved_as_it_was_read(tmp_path: Path) -> None:
    base = net()
    _, delta, path = files_of(tmp_path, base, mask_of(base))
    again, alone = tmp_path / "again.safetensors", tmp_path / "alone.safetensors"
    Delta.load(path).save(again)
    assert again.read_bytes() == path.read_bytes()
    Delta.load(path).save(again, base=base)
    assert again.read_bytes() == path.read_bytes()
    Delta.load(path).resolve(base).save(alone)
    assert Delta.load(alone).thin is None and same(Delta.load(alone).values, delta.values)


def test_kept_values_are_coded_against_too_and_need_nothing(tmp_path: Path) -> None:
    base = net()
    mask = mask_of(base)
    model = trained(base, mask)
    delta = Delta.of(model, mask, base=base, keep_base=True)
    size = delta.save(tmp_path / "kept.safetensors")
    assert size < 1.75 * Delta.of(model, mask, base=base).save(tmp_path / "alone.safetensors")
    meta, _ = files.read_file(tmp_path / "kept.safetensors", format=format.FORMAT, version=format.VERSION)
    assert meta["against"] == "kept" and meta["coders"]["against.float32"] == "residuals"
    loaded = Delta.load(tmp_path / "kept.safetensors")
    assert (
        loaded.thin is None and same(loaded.values, delta.values) and loaded.norms().keys() == delta.norms().keys()
    )
    assert loaded.save(tmp_path / "again.safetensors", base=base) == size
    before = Base.of(base, mask)
    assert Delta.of(model, mask, base=before, keep_base=True).save(tmp_path / "again.safetensors") == size


def test_a_fresh_head_is_never_coded_against(tmp_path: Path) -> None:
    """The reader's head is another one; only a digest of all parameters vouches for it."""
    base = net()
    mask = mask_of(base)
    model = trained(base, mask)
    for name, digest, against in (
        ("parts", base_digest(base, without=["classifier.weight", "classifier.bias"]), "parts"),
        ("all", base_digest(base), "all"),
    ):
        path = tmp_path / f"{name}.safetensors"
        Delta.of(model, mask, base=digest).save(path, base=base)
        meta, sections = files.read_file(path, format=format.FORMAT, version=format.VERSION)
        assert meta["against"] == against and ("values.float32" in sections) == (against == "parts")
        there = copy.deepcopy(base)
        Delta.load(path).apply_(there)
        assert same(bits(there), bits(model))
    there = copy.deepcopy(base)
    there.classifier.reset_parameters()
    before = bits(there)
    with pytest.raises(MismatchError, match="not the delta's base"):
        Delta.load(tmp_path / "all.safetensors").apply_(there)
    assert same(bits(there), before)
    dense = Mask.covering(ParameterIndex.of(base), list(ParameterIndex.of(base)))
    Delta.of(trained(base, dense), dense, base=base).save(tmp_path / "dense.safetensors", base=base)
    assert Delta.load(tmp_path / "dense.safetensors").thin is None


def test_values_that_the_base_says_nothing_of_stand_alone(tmp_path: Path) -> None:
    base = net()
    mask = mask_of(base)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.view(-1)[mask.indices[name]] = torch.randn(mask.count(name)) * 1e20
    delta = Delta.of(model, mask, base=base)
    size = delta.save(tmp_path / "thin.safetensors", base=base)
    assert Delta.load(tmp_path / "thin.safetensors").thin is None
    assert size == delta.save(tmp_path / "alone.safetensors") <= 4 * mask.nnz + 6000


def valued(kind: str, before: Tensor) -> Tensor:
    """Values of a kind, in place of those of a base."""
    if kind == "noise":
        integers = {2: torch.int16, 4: torch.int32}[before.element_size()]
        return torch.randint(0, 2**16, before.shape).mul(40503).to(integers).view(before.dtype)
    if kind == "pattern":
        return torch.randn(300).to(before.dtype).repeat(len(before) // 300 + 1)[: len(before)]
    return before + (1e-3 * torch.randn(before.shape)).to(before.dtype) if kind == "near" else before


@settings(max_examples=60)
@given(
    kinds=st.lists(st.sampled_from(["near", "noise", "pattern", "unmoved"]), min_size=3, max_size=3),
    whole=st.lists(st.booleans(), min_size=3, max_size=3),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    keep=st.booleans(),
)
def test_values_of_any_kind_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[str],
    whole: list[bool],
    dtypes: list[torch.dtype],
    keep: bool,
) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(columns, 40, bias=False).to(t) for columns, t in zip((60, 30, 90), dtypes, strict=True)]
    base, path = nn.Sequential(*layers), tmp_path_factory.mktemp("kinds") / "delta"
    chosen = {f"{n}.weight": torch.rand(layer.weight.shape) < 0.7 for n, layer in enumerate(layers)}
    for flags, every in zip(chosen.values(), whole, strict=True):
        flags |= every
    mask, model = Mask.from_bool(chosen), copy.deepcopy(base)
    with torch.no_grad():
        for kind, (name, at) in zip(kinds, mask.indices.items(), strict=True):
            values = model.get_parameter(name).view(-1)
            values[at] = valued(kind, values[at])
    delta = Delta.of(model, mask, base=base, keep_base=keep)
    assert delta.save(path, base=base) <= delta.save(path.with_name("alone")) + 300
    there, loaded = copy.deepcopy(base), Delta.load(path)
    loaded.apply_(there)
    assert same(bits(there), bits(model)) and loaded == delta
    loaded.revert_(there)
    assert same(bits(there), bits(base))


def test_a_head_that_packs_well_beside_noise_is_no_reason_for_a_thin_file(tmp_path: Path) -> None:
    """Apart from the noise the head is smaller, and the noise against the base as large as it is."""
    base = nn.Sequential(nn.Linear(200, 900), nn.Linear(300, 40, bias=False))
    index = ParameterIndex.of(base)
    mask = Mask.covering(index, ["1.weight"], {"0.weight": torch.arange(1, index.numel("0.weight"))})
    model = copy.deepcopy(base)
    with torch.no_grad():
        model[0].weight.view(-1)[1:] = (
            torch.randint(-(2**31), 2**31, (index.numel("0.weight") - 1,)).int().view(torch.float32)
        )
        model[1].weight[:] = model[1].weight[:1].clone()
    Delta.of(model, mask, base=base).save(tmp_path / "thin.safetensors", base=base)
    there = copy.deepcopy(base)
    loaded = Delta.load(tmp_path / "thin.safetensors")
    assert loaded.thin is None
    loaded.apply_(there)
    assert same(bits(there), bits(model))


@pytest.mark.parametrize("way", ["apply", "resolve", "save", "with_base", "taken before"])
def test_a_wrong_base_is_refused_before_a_byte_changes(tmp_path: Path, way: str) -> None:
    base = net()
    _, delta, path = files_of(tmp_path, base, mask_of(base))
    other = copy.deepcopy(base)
    other.body[2].weight.data[0, 0] += 1
    before, stored = bits(other), path.read_bytes()
    actions = {
        "apply": lambda d: d.apply_(other),
        "resolve": lambda d: d.resolve(other),
        "save": lambda d: d.save(path, base=other),
        "with_base": lambda d: d.with_base(other),
        "taken before": lambda d: d.save(path, base=Base.of(other, d.mask)),
    }
    for one in (Delta.load(path), delta):
        if one is delta and way == "resolve":
            continue
        with pytest.raises(MismatchError, match="base"):
            actions[way](one)
    assert same(bits(other), before) and path.read_bytes() == stored
    with pytest.raises(ParamsError, match="Base.of"):
        delta.save(path, base=Base(delta.base))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapping_decodes_from_the_model_and_what_the_first_overwrote(tmp_path: Path, dtype: torch.dtype) -> None:
    base = net(dtype)
    masks = [mask_of(base, 1), mask_of(base, 2, whole=("classifier", "body.2"))]
    models = [trained(base, mask, seed) for seed, mask in enumerate(masks)]
    for i, (model, mask) in enumerate(zip(models, masks, strict=True)):
        Delta.of(model, mask, base=base).save(tmp_path / f"{i}.safetensors", base=base)
    a, b = (Delta.load(tmp_path / f"{i}.safetensors") for i in range(2))
    there = copy.deepcopy(base)
    a.apply_(there)
    assert b.thin is not None
    Delta.swap_(there, a, b)
    assert b.thin is None and same(bits(there), bits(models[1]))
    b.revert_(there)
    assert same(bits(there), bits(base))
    a, b = (Delta.load(tmp_path / f"{i}.safetensors") for i in range(2))
    held = copy.deepcopy(models[0])  # nothing here knows what the base held
    with pytest.raises(MismatchError):
        Delta.swap_(held, a, b)
    a.resolve(base)
    with pytest.raises(MismatchError, match="coded against them"):
        Delta.swap_(held, a, b)
    assert same(bits(held), bits(models[0]))


def edited(path: Path, change: object) -> None:
    """Write the file again with sound checksums and false contents."""
    meta, sections = files.read_file(path, format=format.FORMAT, version=format.VERSION)
    change(meta, sections)  # type: ignore[operator]
    files.write_file(path, format=format.FORMAT, version=format.VERSION, meta=meta, sections=sections)


def code_of(change: object) -> object:
    def edit(meta: dict, sections: dict[str, Tensor]) -> None:
        sections["against.float32"] = change(sections["against.float32"].clone())  # type: ignore[operator]

    return edit


def flip(at: int) -> object:
    def change(code: Tensor) -> Tensor:
        code[at] ^= 16
        return code

    return code_of(change)


AT_LOAD = {
    "against nothing": lambda meta, sections: meta.update(against="nothing"),
    "against all": lambda meta, sections: meta.update(against="all"),
    "against kept": lambda meta, sections: meta.update(against="kept"),
    "against what": lambda meta, sections: meta.update(against="x" * 1000),
    "against no text": lambda meta, sections: meta.update(against=["parts"]),
    "without against": lambda meta, sections: meta.pop("against"),
    "without the section": lambda meta, sections: sections.pop("against.float32"),
    "claims base values": lambda meta, sections: meta.update(keeps_base=True),
    "coder no text": lambda meta, sections: meta["coders"].update({"against.float32": 1}),
    "coder unknown": lambda meta, sections: meta["coders"].update({"against.float32": "golomb"}),
    "coder another": lambda meta, sections: meta["coders"].update({"against.float32": "raw"}),
    "base no digest": lambda meta, sections: meta.update(base="x" * 64),
    "code short": code_of(lambda code: code[:-1]),
    "code long": code_of(lambda code: torch.cat([code, code[:1]])),
    "code empty": code_of(lambda code: code[:0]),
    "code square": code_of(lambda code: code[:, None]),
    "code of another dtype": code_of(lambda code: code[: len(code) // 4 * 4].view(torch.int32)),
    "first byte": flip(0),
}
AT_DECODING = {
    "noise": flip(-1),
    "digest": lambda meta, sections: meta.update(digest="0" * 64),
}


@pytest.mark.parametrize("edit", [*AT_LOAD, *AT_DECODING])
def test_false_contents_are_refused_before_a_byte_changes(tmp_path: Path, edit: str) -> None:
    base = net()
    _, _, path = files_of(tmp_path, base, mask_of(base))
    edited(path, AT_LOAD.get(edit) or AT_DECODING[edit])
    before = bits(base)
    if edit in AT_LOAD:
        with pytest.raises(ArtifactError, match="thin.safetensors"):
            Delta.load(path)
        return
    loaded = Delta.load(path)
    for action in (loaded.apply_, loaded.resolve):
        with pytest.raises(ArtifactError, match=r"thin.safetensors: section 'against.*corrupt") as caught:
            action(base)
        assert "\n" not in str(caught.value) and loaded.thin is not None
    assert same(bits(base), before)


def test_every_flipped_bit_and_truncation_of_a_thin_file_names_its_section(tmp_path: Path) -> None:
    base = net()
    _, _, path = files_of(tmp_path, base, mask_of(base))
    data = path.read_bytes()
    draw = random.Random(0)
    with path.open("r+b") as file:
        for bit in draw.sample(range(8 * len(data)), 2000):
            file.seek(bit // 8)
            file.write(bytes([data[bit // 8] ^ 1 << bit % 8]))
            file.flush()
            with pytest.raises(ArtifactError, match=r"thin.safetensors: section '[a-z.0-9]+' is corrupt"):
                Delta.load(path)
            file.seek(bit // 8)
            file.write(data[bit // 8 : bit // 8 + 1])
        file.flush()
        assert path.read_bytes() == data and Delta.load(path).thin is not None
        for size in reversed(range(len(data))):
            file.truncate(size)
            with pytest.raises(ArtifactError, match=r"thin.safetensors: section '[a-z.0-9]+' is corrupt"):
                Delta.load(path)
