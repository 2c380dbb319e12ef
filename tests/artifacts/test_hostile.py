"""Files with sound checksums and wrong content: refused by name, in memory that the file justifies."""

import copy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline import files
from pipeline.deltas import chain_base, steps
from pipeline.deltas import format as delta_format
from pipeline.deltas import values as coding
from pipeline.deltas.chain import Chain
from pipeline.deltas.delta import Delta
from pipeline.deltas.prediction import Place
from pipeline.errors import ArtifactError, MismatchError
from pipeline.masks import mask as mask_format
from pipeline.masks import ranking as ranking_format
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.parameters import ParameterIndex, tensor_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
FORGED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.one_of(st.integers(-2, 9), st.integers(2**20, 2**40), st.sampled_from([2**31, 2**62, 2**63, 2**70]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


def sample(folder: Path) -> dict[str, Callable[[], object]]:
    """A file of each format, and what reads all of it."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 4))
    base[2].bfloat16()
    trained = copy.deepcopy(base)
    shapes = ParameterIndex.of(base).shapes
    mask = Mask.from_bool({name: torch.rand(shape) < 0.3 for name, shape in shapes.items()}, {"seed": 1})
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            at = mask.indices[name]
            parameter.view(-1)[at] += (1e-3 * torch.randn(len(at))).to(parameter.dtype)
        trained[1].running_mean += 1
    mask.save(folder / "mask")
    Ranking.of({name: torch.rand(shape) for name, shape in shapes.items()}, 0.3, ["2"]).save(folder / "ranking")
    delta = Delta.of(trained, mask, base=base, keep_base=True)
    delta.save(folder / "kept")
    Delta.of(trained, mask, base=base).save(folder / "thin", base=base)
    chain = Chain.create(folder / "chain", base)
    chain.append(trained, mask)
    read: dict[str, Callable[[], object]] = {
        "mask": lambda: Mask.load(folder / "mask"),
        "ranking": lambda: Ranking.load(folder / "ranking"),
        "kept": lambda: Delta.load(folder / "kept"),
        "thin": lambda: Delta.load(folder / "thin").resolve(base),
        "chain/base.safetensors": lambda: Chain.open(folder / "chain").verify(),
        "chain/step-000001.safetensors": lambda: Chain.open(folder / "chain").verify(),
    }
    for act in read.values():
        act()
    return read


FORMATS = {
    "mask": (mask_format.FORMAT, mask_format.VERSION),
    "ranking": (ranking_format.FORMAT, ranking_format.VERSION),
    "kept": (delta_format.FORMAT, delta_format.VERSION),
    "thin": (delta_format.FORMAT, delta_format.VERSION),
    "chain/base.safetensors": (chain_base.FORMAT, chain_base.VERSION),
    "chain/step-000001.safetensors": (steps.STEP, steps.VERSION),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Callable[[], object]]]:
    folder = tmp_path_factory.mktemp("hostile")
    return folder, sample(folder)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in metadata, provenance aside: what it says is free."""
    inner: list[tuple[Any, ...]] = [path] if path else []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        inner += places_in(value[key], (*path, key)) if key != "info" else []
    return inner


def test_a_thin_file_whose_tensors_changed_their_dtypes_is_refused_before_the_base_is_met(samples: Any) -> None:
    """A residual for each value of each dtype: a table of other dtypes does not fit the sections."""
    folder, read = samples
    path = folder / "thin"
    sound = path.read_bytes()
    meta, sections = files.read_file(path, format=delta_format.FORMAT, version=delta_format.VERSION)
    names = list(Delta.load(path).layout.parameters)
    assert meta["dtypes"] == {"2.weight": "bfloat16", "2.bias": "bfloat16"}
    some = [*({n: d for n, d in meta["dtypes"].items() if n != gone} for gone in meta["dtypes"]), {}]
    some += [meta["dtypes"] | {name: other} for name in names for other in ("float16", "float64", "int32")]
    some += [meta["dtypes"] | {name: "bfloat16"} for name in names if name not in meta["dtypes"]]
    try:
        for dtypes in some:
            files.write_file(
                path, format=delta_format.FORMAT, version=delta_format.VERSION, meta=meta | {"dtypes": dtypes},
                sections=sections,
            )  # fmt: skip
            with pytest.raises(ArtifactError, match="thin: is no sound delta: "):
                Delta.load(path)
        files.write_file(
            path, format=delta_format.FORMAT, version=delta_format.VERSION, meta=meta | {"base": "f" * 64},
            sections=sections,
        )  # fmt: skip
        with pytest.raises(MismatchError, match="not the delta's base"):  # sound in itself, and of another base
            read["thin"]()
    finally:
        path.write_bytes(sound)


def changed_meta(meta: dict[str, Any], data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(places_in(meta)))
    holder: Any = meta
    for key in place[:-1]:
        holder = holder[key]
    act = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if act == "replace":
        holder[place[-1]] = data.draw(JSON)
    elif act == "remove":
        del holder[place[-1]]
    elif isinstance(holder, dict):
        holder[data.draw(st.text(max_size=3))] = data.draw(JSON)
    else:
        holder.append(data.draw(JSON))


def changed_section(sections: dict[str, Tensor], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(sections)))
    raw = bytearray(tensor_bytes(sections[name]))
    act = data.draw(st.sampled_from(["bytes", "bytes", "cut", "grow", "remove", "rename", "dtype", "shape"]))
    if act == "remove":
        del sections[name]
    elif act == "rename":
        sections[data.draw(st.text(min_size=1, max_size=8))] = sections.pop(name)
    elif act == "dtype":
        sections[name] = torch.zeros(
            sections[name].shape, dtype=data.draw(st.sampled_from(list(files.DTYPES.values())))
        )
    elif act == "shape":
        sections[name] = sections[name].reshape(*[1] * data.draw(st.integers(0, 3)), -1)
    elif sections[name].dtype != torch.uint8:
        sections[name] = sections[name].reshape(-1)[: data.draw(st.integers(0, 3))]
    else:
        for _ in range(data.draw(st.integers(1, 4)) if act == "bytes" and raw else 0):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        if act == "cut":
            del raw[data.draw(st.integers(0, len(raw))) :]
        if act == "grow":
            raw += data.draw(st.binary(min_size=1, max_size=40))
        sections[name] = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)


@pytest.mark.parametrize("name", sorted(FORMATS))
@FORGED
@given(data=st.data())
def test_forged_files_are_read_in_whole_or_refused(samples: Any, name: str, data: st.DataObject) -> None:
    folder, read = samples
    path, (form, version) = folder / name, FORMATS[name]
    sound = path.read_bytes()
    meta, sections = files.read_file(path, format=form, version=version)
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()) or not sections:
            changed_meta(meta, data)
        else:
            changed_section(sections, data)
        if "header" in sections or "__metadata__" in sections:
            return
    try:
        files.write_file(path, format=form, version=version, meta=meta, sections=sections)
        size = path.stat().st_size
        tracemalloc.start()
        try:
            read[name]()  # what was changed may not matter, such as the order of a list
        except ArtifactError as refusal:
            assert str(path) in str(refusal) or "chain" in str(refusal)
            assert "\n" not in str(refusal)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 3e7 + 60 * 1024 * size
    finally:
        path.write_bytes(sound)


@settings(max_examples=400, deadline=None)
@given(
    code=st.binary(max_size=200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]),
    count=st.one_of(st.integers(0, 300), st.integers(2**20, 2**50)),
)
def test_no_bytes_harm_the_decoder_of_values(code: bytes, dtype: torch.dtype, count: int) -> None:
    section = torch.frombuffer(bytearray(code), dtype=torch.uint8) if code else torch.empty(0, dtype=torch.uint8)
    tracemalloc.start()
    try:
        values = coding.decode(section, coding.PLANES, dtype, count)
        assert values.dtype == dtype and values.shape == (count,)
    except ValueError as refusal:
        assert "\n" not in str(refusal)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8e6 + 20 * 1024 * len(code)


@settings(max_examples=400, deadline=None)
@given(
    code=st.binary(max_size=200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]),
    seed=st.integers(0, 99),
)
def test_no_bytes_harm_the_decoder_of_residuals(code: bytes, dtype: torch.dtype, seed: int) -> None:
    draw = np.random.Generator(np.random.PCG64(seed))
    base = torch.from_numpy(draw.normal(size=60)).to(dtype)
    places = [Place((6, 5), None, 30), Place((40,), torch.arange(30), 30)]
    section = torch.frombuffer(bytearray(code), dtype=torch.uint8) if code else torch.empty(0, dtype=torch.uint8)
    try:
        values = coding.decode_against(section, coding.RESIDUALS, base, places)
        assert values.dtype == dtype and values.shape == (60,)
    except ValueError as refusal:
        assert "\n" not in str(refusal)
