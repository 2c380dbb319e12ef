"""Checkpoints however they are cut into files: the same tensors; rewritten unchanged, the same bytes."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.artifacts.checkpoints import Checkpoint
from pipeline.artifacts.rewriting import Edit, rewrite
from pipeline.deltas.target import same_bits
from pipeline.errors import MismatchError, ModelError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
NAMES = st.lists(st.from_regex(r"[ab](\.[cd01]){0,3}", fullmatch=True), min_size=1, max_size=8, unique=True)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    found = {}
    for number, name in enumerate(draw(NAMES)):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        generator = torch.Generator().manual_seed(number)
        found[name] = (100 * torch.rand(shape, generator=generator)).to(draw(st.sampled_from(DTYPES)))
    return found


def write(folder: Path, held: dict[str, Tensor], shards: int) -> Path:
    """Write tensors as one file, or as shards with an index."""
    folder.mkdir()
    if shards == 1:
        save_file(held, folder / "model.safetensors", {"format": "pt"})
        return folder
    places: dict[str, str] = {}
    for shard in range(shards):
        own = {name: tensor for at, (name, tensor) in enumerate(held.items()) if at % shards == shard}
        if own:
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            save_file(own, folder / file, {"format": "pt"})
            places |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in held.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(same_bits(tensor, two[name]) for name, tensor in one.items())


@settings(max_examples=60, deadline=None)
@given(held=tensors(), shards=st.integers(1, 3))
def test_any_sharding_reads_the_same_and_is_rewritten_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, held: dict[str, Tensor], shards: int
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    base = write(folder / "base", held, shards)
    checkpoint = Checkpoint.open(base)
    assert same(dict(checkpoint), held)
    assert {name: entry.nbytes for name, entry in checkpoint.entries.items()} == {
        n: t.nbytes for n, t in held.items()
    }
    assert rewrite(checkpoint, folder / "out", Edit()) == sum(tensor.nbytes for tensor in held.values())
    for file in base.glob("*.safetensors"):
        assert (folder / "out" / file.name).read_bytes() == file.read_bytes()
    assert same(dict(Checkpoint.open(folder / "out")), held)


@settings(max_examples=60, deadline=None)
@given(held=tensors(), shards=st.integers(1, 3), data=st.data())
def test_edits_are_those_of_dictionaries(
    tmp_path_factory: pytest.TempPathFactory, held: dict[str, Tensor], shards: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("edit")
    checkpoint, wanted, edit = Checkpoint.open(write(folder / "base", held, shards)), dict(held), Edit()
    for name, tensor in held.items():
        act = data.draw(st.sampled_from(["stay", "values", "whole", "gone", "dtype"]))
        if act == "gone" and len(edit.gone) < len(held) - 1:
            edit.gone.add(name)
            del wanted[name]
        elif act in ("values", "whole"):
            at = None if act == "whole" else (torch.rand(tensor.numel()) < 0.5).nonzero().reshape(-1)
            new = torch.ones(tensor.numel() if at is None else at.numel()).to(tensor.dtype)
            edit.values[name] = (at, new)
            flat = tensor.clone().reshape(-1)
            flat[slice(None) if at is None else at] = new
            wanted[name] = flat.reshape(tensor.shape)
        elif act == "dtype" and tensor.is_floating_point():
            edit.dtypes[name] = torch.bfloat16
            wanted[name] = tensor.to(torch.bfloat16)
    edit.new["z.new"] = wanted["z.new"] = torch.arange(3.0)
    rewrite(checkpoint, folder / "out", edit)
    assert same(dict(Checkpoint.open(folder / "out")), wanted)


@settings(max_examples=60, deadline=None)
@given(names=NAMES, start=st.sampled_from(["bert.", "model.", "x.y."]))
def test_one_leading_component_is_added_or_taken_off(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], start: str
) -> None:
    folder, held = tmp_path_factory.mktemp("names"), {name: torch.zeros(1) for name in names}
    save_file(held, folder / "bare.safetensors")
    save_file({start + name: tensor for name, tensor in held.items()}, folder / "full.safetensors")
    bare, full = (Checkpoint.open(folder / f"{name}.safetensors") for name in ("bare", "full"))
    if start.count(".") > 1:  # two components are another model
        with pytest.raises(MismatchError, match="none of its tensors is one of the delta's"):
            bare.named_like(full)
        return
    for one, other in ((bare, full), (full, bare)):
        seen = one.named_like(other)
        assert seen.keys() == other.keys()
        assert {seen.written(name) for name in seen} == set(
            full
        )  # a copy of a bare one gets the classifier's names
    assert bare.named_like(names).entries == bare.entries


def broken(folder: Path, case: str) -> None:
    """Spoil a checkpoint of two shards."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if case == "outside":
        content["weight_map"]["a"] = "../other.safetensors"
    elif case == "missing":
        (folder / content["weight_map"]["a"]).unlink()
    elif case == "not named":
        del content["weight_map"]["a.0"]
        content["weight_map"]["b"] = content["weight_map"]["a"]
    elif case == "two indices":
        (folder / "other.safetensors.index.json").write_text(index.read_text())
    index.write_text("[1" if case == "no JSON" else "[]" if case == "no mapping" else json.dumps(content))


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json; "
    ):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="pytorch_model.bin is a pickle, which is never loaded"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("outside", "expected a file beside the index"),
        ("missing", "which is missing; fetch the model again"),
        ("not named", "fetch index and shards again"),
        ("two indices", "2 indices; name the one that is meant"),
        ("no JSON", "is no index of shards"),
        ("no mapping", "is no index of shards"),
    ],
)
def test_spoiled_indices_are_one_line(tmp_path: Path, case: str, part: str) -> None:
    names = ["a", "b", "a.0", "b.0"]
    folder = write(tmp_path / "base", {name: torch.rand(4) for name in names}, 2)
    broken(folder, case)
    with pytest.raises(ModelError) as refusal:
        Checkpoint.open(folder)
    assert part in str(refusal.value) and "\n" not in str(refusal.value)


def test_reading_is_lazy_and_nothing_is_kept(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", {name: torch.rand(4) for name in "abcd"}, 2)
    checkpoint = Checkpoint.open(folder)
    new = {name: torch.rand(4) for name in "ac"}
    save_file(new, folder / checkpoint.entries["a"].file)
    assert same_bits(checkpoint["a"], load_file(folder / checkpoint.entries["a"].file)["a"])
    (folder / checkpoint.entries["b"].file).unlink()
    with pytest.raises(ModelError, match="no such file"):
        checkpoint["b"]
