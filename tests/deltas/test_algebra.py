"""Arithmetic over deltas: exact where it can be, against dense float64 oracles elsewhere; wrong bases refused."""

import copy
from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.deltas.algebra import add, dare, scale, ties
from pipeline.deltas.delta import Delta
from pipeline.deltas.overlap import overlap
from pipeline.deltas.summing import rounded
from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex, base_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    def __init__(self, seed: int = 0, classes: int = 2) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.wide = nn.Parameter(torch.randn(4, 6, generator=draw))
        self.empty = nn.Parameter(torch.empty(0))
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(6, classes)
        for parameter in self.head.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)


def drawn(base: nn.Module, seed: int, density: float = 0.5, whole: Sequence[str] = ()) -> Delta:
    """A delta with random coordinates and values, some of them the base's own and some zeros of either sign."""
    draw = torch.Generator().manual_seed(seed)
    index = ParameterIndex.of(base)
    flags = {name: torch.rand(shape, generator=draw) < density for name, shape in index.shapes.items()}
    for name in index.within(whole):
        flags[name][:] = True
    mask = Mask.from_bool(flags)
    trained = copy.deepcopy(base)
    with torch.no_grad():
        for name, at in mask.indices.items():
            parameter = trained.get_parameter(name)
            values = torch.randn(at.numel(), generator=draw) * 2.0 ** float(
                torch.randint(-8, 8, (1,), generator=draw)
            )
            values[torch.rand(at.numel(), generator=draw) < 0.1] = -0.0
            keep = torch.rand(at.numel(), generator=draw) < 0.1
            parameter.view(-1)[at] = torch.where(keep, parameter.view(-1)[at], values.to(parameter.dtype))
    return Delta.of(trained, mask, base=base, info={"kind": "text", "seed": seed})


def with_nan(delta: Delta) -> Delta:
    delta.values["wide"][0] = torch.nan
    return delta


def held(delta: Delta, base: nn.Module) -> dict[str, Tensor]:
    model = copy.deepcopy(base)
    delta.apply_(model)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def raw(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


def raw_model(model: nn.Module) -> dict[str, bytes]:
    return raw({name: tensor.detach() for name, tensor in model.state_dict().items()})


seeds = st.integers(0, 2**31)
weight = st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.1, 2.0, 1.7])
dtypes = st.sampled_from(DTYPES)


def check_mask(made: Delta, deltas: Sequence[Delta], wanted: dict[str, dict[int, float]]) -> None:
    for name, moved in wanted.items():
        whole = any(delta.mask.whole(name) for delta in deltas)
        assert made.mask.indices[name].tolist() == (
            list(range(made.mask.index.numel(name))) if whole else sorted(moved)
        )


# --- the dense float64 oracle: whole tensors, sets of coordinates, one element at a time


def changes(base: nn.Module, delta: Delta) -> dict[str, dict[int, float]]:
    """name -> coordinate -> trained - base, in Python's float64."""
    after = held(delta, base)
    result = {}
    for name, parameter in base.named_parameters():
        new, old = (t.detach().double().reshape(-1).tolist() for t in (after[name], parameter))
        result[name] = {i: new[i] - old[i] for i in delta.mask.indices[name].tolist()}
    return result


def nearest(value: float, dtype: torch.dtype) -> float:
    """Round by trying the neighbours, in rational numbers."""
    if dtype == torch.float32:
        return float(np.float32(value))
    guess = torch.tensor(value).to(dtype)
    bits = guess.view(torch.int16)
    near = [(bits + step).view(dtype) for step in (-1, 0, 1)] + [torch.zeros((), dtype=dtype)]
    near = [t for t in near if t.isfinite()]
    return float(
        min(near, key=lambda t: (abs(Fraction(float(t)) - Fraction(value)), int(t.view(torch.int16)) & 1))
    )


def check(made: Delta, base: nn.Module, wanted: dict[str, dict[int, float]], dtype: torch.dtype) -> None:
    """Compare every element with base + wanted, rounded once, but for the last bits of the two float64 sums."""
    after = held(made, base)
    for name, parameter in base.named_parameters():
        for i, (before, got) in enumerate(
            zip(parameter.view(-1).tolist(), after[name].view(-1).tolist(), strict=True)
        ):
            exact, slack = before + wanted[name].get(i, 0.0), 1e-11
            assert nearest(exact - slack, dtype) <= got <= nearest(exact + slack, dtype), (name, i)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, dtype=dtypes, weights=st.lists(weight, min_size=1, max_size=3))
def test_add_is_the_weighted_sum_of_changes(seed: int, dtype: torch.dtype, weights: list[float]) -> None:
    base = Network(seed).to(dtype)
    deltas = [drawn(base, seed + 1 + i) for i in range(len(weights))]
    wanted: dict[str, dict[int, float]] = {name: {} for name, _ in base.named_parameters()}
    for delta, factor in zip(deltas, weights, strict=True):
        for name, moved in changes(base, delta).items():
            for i, change in moved.items():
                wanted[name][i] = wanted[name].get(i, 0.0) + factor * change
    made = add(deltas, base, weights)
    check(made, base, wanted, dtype)
    union = deltas[0].mask
    for delta in deltas[1:]:
        union |= delta.mask
    assert made.mask == union
    assert all(values.dtype == dtype for values in made.values.values())


@settings(max_examples=60, deadline=None)
@given(seed=seeds, dtype=dtypes)
def test_scaling_by_one_is_the_identity_and_by_zero_the_base(seed: int, dtype: torch.dtype) -> None:
    base = Network(seed).to(dtype)
    delta = drawn(base, seed + 1, whole=("head",))
    delta.values["wide"][:1] = torch.nan  # odd bits are kept, too
    one, zero = scale(delta, base, 1.0), scale(delta, base, 0.0)
    assert one == Delta(delta.mask, delta.values, delta.buffers, delta.known, delta.layout)
    assert raw(held(zero, base)) == raw_model(base)
    assert zero.mask == delta.mask


@settings(max_examples=20, deadline=None)
@given(seed=seeds, dtype=dtypes)
def test_adding_disjoint_deltas_is_applying_one_after_the_other(seed: int, dtype: torch.dtype) -> None:
    base = Network(seed).to(dtype)
    a, b = drawn(base, seed + 1), drawn(base, seed + 2)
    apart = b.mask - a.mask
    model = held(b, base)
    after = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            at = apart.indices[name]
            parameter.view(-1)[at] = model[name].view(-1)[at]
    b = Delta.of(after, apart, base=base)
    first = held(a, base)
    for name, at in b.mask.indices.items():
        first[name].view(-1)[at] = b.values[name]
    assert raw(held(add([a, b], base), base)) == raw(first)


@settings(max_examples=15, deadline=None)
@given(
    seed=seeds,
    dtype=dtypes,
    weights=st.lists(weight, min_size=3, max_size=3),
    method=st.sampled_from([add, ties, dare]),
)
def test_the_order_of_deltas_does_not_matter(seed: int, dtype: torch.dtype, weights: list[float], method) -> None:
    base = Network(seed).to(dtype)
    pairs = [(drawn(base, seed + 1 + i), w) for i, w in enumerate(weights)]
    made = [method([d for d, _ in order], base, [w for _, w in order]) for order in permutations(pairs)]
    assert len({delta.digest for delta in made}) == 1


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    dtype=dtypes,
    weights=st.lists(weight, min_size=2, max_size=3),
    density=st.sampled_from([0.1, 0.2, 0.5, 1.0]),
)
def test_ties_against_the_oracle(seed: int, dtype: torch.dtype, weights: list[float], density: float) -> None:
    base = Network(seed).to(dtype)
    deltas = [drawn(base, seed + 1 + i) for i in range(len(weights))]
    trimmed = []
    for delta, factor in zip(deltas, weights, strict=True):
        flat = [(name, i, c) for name, moved in changes(base, delta).items() for i, c in moved.items()]
        order = sorted(range(len(flat)), key=lambda n: -abs(flat[n][2]))  # stable: the lower coordinate first
        kept = [flat[n] for n in order[: round(density * len(flat))]]
        trimmed.append({(name, i): factor * c for name, i, c in kept})
    wanted: dict[str, dict[int, float]] = {name: {} for name, _ in base.named_parameters()}
    for name, i in {place for delta in trimmed for place in delta}:
        arriving = [delta[name, i] for delta in trimmed if (name, i) in delta]
        total = sum(sorted(arriving))
        agreeing = [change for change in arriving if change * total > 0]
        if agreeing:
            wanted[name][i] = sum(agreeing) / len(agreeing)
    made = ties(deltas, base, weights, density=density)
    check(made, base, wanted, dtype)
    check_mask(made, deltas, wanted)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    dtype=dtypes,
    weights=st.lists(weight, min_size=1, max_size=3),
    drop=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_dare_against_the_oracle(seed: int, dtype: torch.dtype, weights: list[float], drop: float) -> None:
    base = Network(seed).to(dtype)
    deltas = [drawn(base, seed + 1 + i) for i in range(len(weights))]
    wanted: dict[str, dict[int, float]] = {name: {} for name, _ in base.named_parameters()}
    for delta, factor in zip(deltas, weights, strict=True):
        for name, moved in changes(base, delta).items():
            key = int.from_bytes(blake2b(f"7 {delta.digest} {name}".encode(), digest_size=16).digest(), "little")
            draws = np.random.Generator(np.random.Philox(key=key)).random(len(moved))
            for draw, (i, change) in zip(draws, sorted(moved.items()), strict=True):
                if draw >= drop:
                    wanted[name][i] = wanted[name].get(i, 0.0) + factor * change / (1 - drop)
    made = dare(deltas, base, weights, drop=drop, seed=7)
    check(made, base, wanted, dtype)
    check_mask(made, deltas, wanted)
    if drop == 0.0:
        assert made == add(deltas, base, weights)


def test_dare_drops_as_many_as_it_says_and_keeps_the_mean() -> None:
    base = nn.Linear(400, 100, bias=False)
    trained = copy.deepcopy(base)
    trained.weight.data += 1.0
    half = Mask(ParameterIndex.of(base), {"weight": torch.arange(0, 40000, 2)})
    with torch.no_grad():
        trained.weight.view(-1)[1::2] = base.weight.view(-1)[1::2]
    delta = Delta.of(trained, half, base=base)
    made = dare([delta], base, drop=0.75, seed=3)
    assert made.mask.nnz == pytest.approx(5000, abs=5 * (20000 * 0.25 * 0.75) ** 0.5)
    moved = held(made, base)["weight"] - base.weight.detach()
    assert float(moved[moved != 0].mean()) == pytest.approx(4.0, rel=1e-5)
    assert made != dare([delta], base, drop=0.75, seed=4)
    assert made == dare([delta], base, drop=0.75, seed=3)


@settings(max_examples=600, deadline=None)
@given(value=st.floats(allow_nan=True), dtype=st.sampled_from([*DTYPES, torch.float64]))
def test_float64_is_rounded_once(value: float, dtype: torch.dtype) -> None:
    got = rounded(torch.tensor([value], dtype=torch.float64), dtype)[0]
    if value != value:
        assert bool(got.isnan())
    elif dtype == torch.float64:
        assert float(got) == value
    elif dtype == torch.float16:
        with np.errstate(over="ignore"):
            assert float(got) == float(np.float16(value))  # numpy rounds from float64 at once
    elif abs(value) < 3e38:
        assert float(got) == nearest(value, dtype)


def test_a_value_that_two_roundings_get_wrong() -> None:
    halfway = 1.0 + 2.0**-8  # between two bfloat16 values; a little more is nearer to the upper one
    value = torch.tensor([halfway + 2.0**-40, -halfway - 2.0**-40], dtype=torch.float64)
    assert value.to(torch.bfloat16).tolist() == [1.0, -1.0]
    assert rounded(value, torch.bfloat16).tolist() == [1.0078125, -1.0078125]


@pytest.mark.parametrize("merge", [add, ties, dare])
def test_the_result_names_its_parents_and_its_base(merge, tmp_path) -> None:
    base = Network()
    deltas = [drawn(base, 1), drawn(base, 2)]
    made = merge(deltas, base, [0.5, 0.25])
    made.save(tmp_path / "made.safetensors")
    made = Delta.load(tmp_path / "made.safetensors")
    assert [parent["digest"] for parent in made.info["parents"]] == [d.digest for d in deltas]
    assert made.info["compose"]["method"] == merge.__name__ and made.info["compose"]["weights"] == [0.5, 0.25]
    assert made.info["kind"] == "text" and "seed" not in made.info  # what all agree on, nothing else
    assert raw(held(made, base)).keys() == raw_model(base).keys()
    with pytest.raises(MismatchError, match="not the delta's base"):
        made.apply_(Network(5))


def test_a_delta_of_another_base_or_network_is_refused() -> None:
    base = Network()
    good = drawn(base, 1)
    with pytest.raises(MismatchError, match="delta 1: .*'wide' differs"):
        add([good, drawn(Network(9), 2)], base)
    with pytest.raises(MismatchError, match="delta 0: .*not the delta's base"):
        add([good], Network(9))
    other = Network()
    other.wide = nn.Parameter(torch.zeros(4, 7))
    with pytest.raises(MismatchError, match=r"'wide' is float32 \[4, 7\] in delta 1 and float32 \[4, 6\]"):
        add([good, drawn(other, 2)], base)
    with pytest.raises(MismatchError, match=r"'\w+' is bfloat16"):
        add([good, drawn(Network().bfloat16(), 2)], base)
    frozen = Network()
    frozen.wide.requires_grad_(False)
    with pytest.raises(MismatchError, match="'wide' is trainable in one delta and frozen in another"):
        add([good, drawn(frozen, 2)], base)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda d, b: add([], b), "no delta"),
        (lambda d, b: add([d], b, [1.0, 2.0]), "expected 1 finite"),
        (lambda d, b: add([d], b, [float("nan")]), "expected 1 finite"),
        (lambda d, b: ties([d], b, density=0.0), "density=0.0"),
        (lambda d, b: dare([d], b, drop=1.0), "drop=1.0"),
        (lambda d, b: add([d], b, head=1), "head=1"),
        (lambda d, b: add([d], b, buffers=-1), "buffers=-1"),
        (lambda d, b: add([d], b, buffers="mean"), "buffers=mean"),
        (lambda d, b: add([d], b, [1e300]), "'wide': add gives values that float32 cannot hold"),
        (lambda d, b: ties([with_nan(d)], b), "'wide' of delta 0 is not finite"),
        (lambda d, b: scale(with_nan(d), b, 0.5), "cannot hold"),
    ],
)
def test_bad_arguments_are_refused(call, named: str) -> None:
    base = Network()
    with pytest.raises(ParamsError, match=named):
        call(drawn(base, 1), base)


def test_heads_drawn_anew_are_not_added_unless_one_is_chosen() -> None:
    base, redrawn = Network(), Network()
    redrawn.head.reset_parameters()
    a, b = drawn(base, 1, whole=("head",)), drawn(redrawn, 2, whole=("head",))
    with pytest.raises(MismatchError, match=r"'head\.\w+' is covered whole by delta 1.*head=N"):
        add([a, b], base)
    made = add([a, b], base, head=1)
    assert torch.equal(held(made, base)["head.weight"], b.values["head.weight"].view(2, 6))
    assert torch.equal(held(made, redrawn)["head.weight"], b.values["head.weight"].view(2, 6))  # any head will do
    same = drawn(base, 3, whole=("head",))
    summed = held(add([a, same], base, [0.5, 0.5]), base)["head.weight"]
    mean = (a.values["head.weight"].double() + same.values["head.weight"].double()) / 2
    assert torch.allclose(summed.double().view(-1), mean, atol=1e-6)
    digest_only = Delta(a.mask, a.values, a.buffers, copy.deepcopy(a.known), a.layout)
    digest_only.known.tensors.clear()
    assert scale(digest_only, base, 1.0) == a  # nothing of the base is needed
    with pytest.raises(MismatchError, match="not known to hold"):
        scale(digest_only, base, 0.5)


@pytest.mark.parametrize("merge", [add, ties, dare])
def test_heads_of_other_sizes_are_taken_from_the_one_chosen(merge) -> None:
    two, three = Network(classes=2), Network(classes=3)
    a, b = drawn(two, 1, whole=("head",)), drawn(three, 2, whole=("head",))
    with pytest.raises(MismatchError, match=r"'head.bias' is float32 \[3\] in delta 1 .*head=N"):
        merge([a, b], two)
    for head, base, chosen in ((0, two, a), (1, three, b)):
        made = merge([a, b], base, head=head)
        assert torch.equal(made.values["head.weight"], chosen.values["head.weight"])
        assert made.mask.whole("head.weight") and made.info["seed"] == head + 1
        other = merge([b, a], base, head=1 - head)
        assert other == made


def test_buffers_are_equal_chosen_or_the_bases() -> None:
    base = Network()
    a, b = drawn(base, 1), drawn(base, 2)
    assert set(add([a, b], base).buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    b.buffers["norm.num_batches_tracked"] = torch.tensor(17)
    with pytest.raises(MismatchError, match="buffer 'norm.num_batches_tracked' differs in deltas 1 and 0"):
        add([a, b], base)
    assert add([a, b], base, buffers=1).buffers["norm.num_batches_tracked"] == 17
    assert add([a, b], base, buffers="base").buffers["norm.num_batches_tracked"] == 0


def test_state_dicts_are_bases_too_and_stay_as_they_are() -> None:
    base = Network()
    a, b = drawn(base, 1), drawn(base, 2)
    state = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
    before = raw(state)
    assert add([a, b], state) == add([a, b], base)
    assert raw(state) == before == raw_model(base)
    made = add([a, b], base)
    assert base_digest(base, without=[name for name in made.mask.index if made.mask.whole(name)]) == made.base


def test_thin_deltas_are_decoded_from_the_base(tmp_path) -> None:
    torch.manual_seed(0)
    base = nn.Linear(200, 50)
    deltas = []
    for seed in range(2):
        mask = Mask.from_bool({"weight": torch.rand(50, 200) < 0.5, "bias": torch.ones(50, dtype=torch.bool)})
        trained = copy.deepcopy(base)
        with torch.no_grad():  # so little that coding against the base pays
            for name, at in mask.indices.items():
                trained.get_parameter(name).view(-1)[at] *= 1.0001
        deltas.append(Delta.of(trained, mask, base=base))
        deltas[-1].save(tmp_path / f"{seed}", base=base)
    for call in (add, ties, dare, overlap):
        thin = [Delta.load(tmp_path / f"{seed}") for seed in range(2)]
        assert all(delta.thin is not None for delta in thin)
        assert call(thin, base) == call(deltas, base)
    assert scale(Delta.load(tmp_path / "0"), base, 1.0) == deltas[0]


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_overlap_against_sets(seed: int) -> None:
    base = Network(seed)
    deltas = [
        drawn(base, seed + i, density=d, whole=w) for i, d, w in ((1, 0.6, ()), (2, 0.4, ()), (3, 0.5, ("head",)))
    ]
    moved = [changes(base, delta) for delta in deltas]
    report = overlap(deltas, base)
    rows = {(row["a"], row["b"], row["name"]): row for row in report["tensors"]}
    assert [(row["a"], row["b"]) for row in report["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    for pair in report["pairs"]:
        a, b = pair["a"], pair["b"]
        shared = conflicts = either = 0
        for name, _ in base.named_parameters():
            one, two = moved[a][name], moved[b][name]
            common = one.keys() & two.keys()
            against = sum(one[i] * two[i] < 0 for i in common)
            if any(d.mask.whole(name) for d in (deltas[a], deltas[b])):
                against = 0  # such a tensor may have been drawn anew
            shared, conflicts, either = (
                shared + len(common),
                conflicts + against,
                either + len(one.keys() | two.keys()),
            )
            if one and two:
                row = rows[a, b, name]
                assert (row["shared"], row["conflicts"] or 0) == (len(common), against)
        assert (pair["shared"], pair["conflicts"]) == (shared, conflicts)
        assert pair["jaccard"] == pytest.approx(shared / either if either else 1.0)
        assert pair["jaccard"] == pytest.approx(deltas[a].mask.jaccard(deltas[b].mask))
    assert all(row["conflicts"] is None for row in overlap(deltas)["pairs"])
    with pytest.raises(MismatchError, match="not the delta's base"):
        overlap(deltas, Network(seed + 1))
