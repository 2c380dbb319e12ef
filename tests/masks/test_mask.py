"""Mask: checks, algebra, digest, exact files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import files
from pipeline.errors import ArtifactError, MismatchError, ParamsError
from pipeline.masks.mask import FORMAT, VERSION, Mask
from pipeline.parameters import ParameterIndex

SHAPES = {"body.weight": (4, 6), "body.bias": (6,), "scale": (), "none": (0, 3), "head.weight": (2, 3)}
INDEX = ParameterIndex(SHAPES)


def flags_of(bits: int) -> dict[str, Tensor]:
    flat = torch.tensor([bits >> i & 1 for i in range(INDEX.total)], dtype=torch.bool)
    parts = flat.split([INDEX.numel(name) for name in INDEX])
    return {name: part.reshape(SHAPES[name]) for name, part in zip(INDEX, parts, strict=True)}


FLAGS = st.integers(0, 2**INDEX.total - 1).map(flags_of)
MASKS = FLAGS.map(Mask.from_bool)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[name].equal(b[name]) for name in a)


@given(FLAGS)
def test_booleans_and_back(flags: dict[str, Tensor]) -> None:
    mask = Mask.from_bool(flags)
    assert same(mask.to_bool(), flags)
    assert mask.nnz == sum(int(f.sum()) for f in flags.values()) and mask.density == mask.nnz / INDEX.total
    for name, flag in flags.items():
        assert mask.indices[name].equal(flag.flatten().nonzero().flatten())
        assert mask.count(name) == int(flag.sum()) and mask.whole(name) == bool(flag.all())
    assert list(mask.indices) == list(INDEX) and Mask(INDEX, mask.indices) == mask


@given(FLAGS, FLAGS)
def test_algebra_is_that_of_sets(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    x, y = Mask.from_bool(a), Mask.from_bool(b)
    assert same((x | y).to_bool(), {n: a[n] | b[n] for n in a})
    assert same((x & y).to_bool(), {n: a[n] & b[n] for n in a})
    assert same((x - y).to_bool(), {n: a[n] & ~b[n] for n in a})
    assert same((x ^ y).to_bool(), {n: a[n] ^ b[n] for n in a})
    assert (x | y).nnz == x.nnz + y.nnz - (x & y).nnz
    both, least = (x & y).nnz, min(x.nnz, y.nnz)
    assert x.overlap(y) == y.overlap(x) == (both / least if least else float(x == y))
    assert x.jaccard(y) == (both / (x | y).nnz if (x | y).nnz else 1.0)


@settings(max_examples=30)
@given(MASKS, MASKS, MASKS)
def test_laws(x: Mask, y: Mask, z: Mask) -> None:
    everything = Mask.covering(INDEX, list(INDEX))
    assert x | y == y | x and x & (y | z) == (x & y) | (x & z)
    assert everything - (x | y) == (everything - x) & (everything - y)
    assert (x ^ y) ^ y == x and x ^ y == (x | y) - (x & y)


@given(MASKS, MASKS)
def test_equality_is_that_of_digests(x: Mask, y: Mask) -> None:
    assert (x == y) == same(x.to_bool(), y.to_bool()) == (x.digest == y.digest)
    assert x != object() and (x != y or hash(x) == hash(y))


def test_the_digest_depends_on_the_content_alone() -> None:
    flags = flags_of(0b1011)
    mask = Mask.from_bool(flags)
    turned = Mask.from_bool(dict(reversed(flags.items())), info={"seed": 1})
    assert turned.digest == mask.digest and turned == mask
    assert turned & mask == mask  # order does not keep masks of the same parameters apart
    reshaped = Mask.from_bool({n: f.reshape(3, 8) if n == "body.weight" else f for n, f in flags.items()})
    renamed = Mask.from_bool({n.replace("body", "core"): f for n, f in flags.items()})
    assert len({mask.digest, reshaped.digest, renamed.digest}) == 3


def test_the_digest_knows_no_coder(every_coder: Mask) -> None:
    ways = [every_coder.pack(compact=compact) for compact in (True, False)]
    assert ways[0]["coordinates"].numel() < ways[1]["coordinates"].numel()
    assert {Mask.unpack(way, "f", {"time": i}).digest for i, way in enumerate(ways)} == {every_coder.digest}


def test_masks_of_other_parameters_do_not_combine() -> None:
    other = Mask.from_bool({"body.weight": torch.ones(4, 5, dtype=torch.bool)})
    for join in (Mask.__or__, Mask.__and__, Mask.__sub__, Mask.__xor__, Mask.overlap, Mask.jaccard):
        with pytest.raises(MismatchError, match="tensor 'body.bias' is .* in one and absent"):
            join(Mask.from_bool(flags_of(3)), other)


@pytest.mark.parametrize(
    ("name", "coordinates", "error", "why"),
    [
        ("body.bias", torch.tensor([1], dtype=torch.int32), ParamsError, "'body.bias' are torch.int32"),
        ("body.bias", torch.tensor([[1]]), ParamsError, "one-dimensional"),
        ("body.bias", torch.tensor([2, 1]), ParamsError, "'body.bias' are not strictly increasing"),
        ("body.bias", torch.tensor([1, 1]), ParamsError, "not strictly increasing"),
        ("body.bias", torch.tensor([-1]), MismatchError, "has 6 elements"),
        ("body.bias", torch.tensor([6]), MismatchError, "'body.bias' reach from 6 to 6"),
        ("none", torch.tensor([0]), MismatchError, "has 0 elements"),
        ("other", torch.tensor([0]), MismatchError, "names tensor 'other'"),
    ],
)
def test_bad_coordinates_are_refused(name: str, coordinates: Tensor, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        Mask(INDEX, {name: coordinates})


def test_further_refusals() -> None:
    with pytest.raises(MismatchError, match="'other'"):
        Mask.covering(INDEX, ["other"])
    with pytest.raises(ParamsError, match="'a' is torch.uint8"):
        Mask.from_bool({"a": torch.ones(2, dtype=torch.uint8)})
    with pytest.raises(ParamsError, match="info of a mask is no JSON"):
        Mask(INDEX, {}, {"mean": float("nan")})


def test_a_mask_keeps_its_own_coordinates() -> None:
    given_ = torch.tensor([1, 3])
    mask = Mask(INDEX, {"body.bias": given_})
    given_[0] = 2
    assert mask.indices["body.bias"].tolist() == [1, 3]


def test_a_whole_tensor_of_any_size_costs_nothing(tmp_path: Path) -> None:
    index = ParameterIndex({"w": (2**31, 2**20), "huge": (2**40,)})
    far = torch.tensor([0, 2**31, 2**40 - 1])
    mask = Mask.covering(index, ["w"], {"huge": far}, {"seed": 1})
    assert mask.whole("w") and mask.nnz == 2**51 + 3
    assert mask.save(tmp_path / "m") < 2000
    again = Mask.load(tmp_path / "m")
    assert again == mask and again.indices["huge"].equal(far) and again.whole("w")


def test_top_k_is_exact_with_the_head_inside() -> None:
    scores = {n: torch.rand(s) for n, s in SHAPES.items()}
    scores["head.weight"].zero_()
    for density in (0.2, 0.5, 1.0):
        mask = Mask.top_k(scores, density, always=["head"], info={"kind": "label"})
        assert mask.nnz == int(density * INDEX.total) and mask.whole("head.weight")
        rest = torch.cat([scores[n].flatten() for n in list(SHAPES)[:-1]])
        expected = set(rest.topk(mask.nnz - 6).indices.tolist())
        flat = torch.cat([mask.to_bool()[n].flatten() for n in list(SHAPES)[:-1]])
        assert set(flat.nonzero().flatten().tolist()) == expected
        assert mask.info == {"kind": "label"} and mask.index == INDEX
    with pytest.raises(ParamsError, match=r"head \(head: 6 parameters\) is larger than the budget of 3 .*0\.163"):
        Mask.top_k(scores, 0.1, always=["head"])


@settings(max_examples=25, deadline=None)
@given(mask=MASKS)
def test_save_and_load_is_the_identity(mask: Mask, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("m") / "mask.safetensors"
    mask.info.update(seed=3, kind="label", nested={"a": [1, None]})
    assert mask.save(path) == path.stat().st_size
    again = Mask.load(path)
    assert again == mask and same(again.to_bool(), mask.to_bool())
    assert again.info == mask.info and again.index == mask.index
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


def test_a_sound_file_with_an_unsound_mask_is_refused(tmp_path: Path, every_coder: Mask) -> None:
    """Checksums that are right do not make the content right."""
    path = tmp_path / "m"
    every_coder.save(path)
    meta, sections = files.read_file(path, format=FORMAT, version=VERSION)

    def refused(match: str, meta: dict = meta, **changes: Tensor | None) -> None:
        kept = {n: t for n, t in {**sections, **changes}.items() if t is not None}
        files.write_file(path, format=FORMAT, version=VERSION, meta=meta, sections=kept)
        with pytest.raises(ArtifactError, match=match):
            Mask.load(path)

    refused("not the mask the header names", meta | {"digest": "0" * 64})
    refused("not the mask the header names", meta | {"nnz": 3})
    refused("provenance is no mapping", meta | {"info": [1]})
    refused("'coordinates' is missing", coordinates=None)
    refused("'tensors' is missing", tensors=torch.zeros(3))
    refused("'tensors' is corrupt", tensors=torch.zeros(3, dtype=torch.uint8))
    refused("'coordinates' is corrupt", coordinates=sections["coordinates"][:-1])


def test_the_same_mask_in_another_process_is_the_same_file(tmp_path: Path, every_coder: Mask) -> None:
    every_coder.save(tmp_path / "m")
    raw = (tmp_path / "m").read_bytes()
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; from pipeline.masks.mask import Mask; "
        "m = Mask.load(sys.argv[1]); m.save(sys.argv[1] + '2'); "
        "assert not {'mlflow', 'dvc', 'datasets', 'typer', 'pydantic'} & set(sys.modules)"
    )
    root = Path(files.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m"), str(root)], check=True, timeout=120)
    assert (tmp_path / "m2").read_bytes() == raw
