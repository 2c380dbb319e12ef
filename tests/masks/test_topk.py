"""Exact global top-k against sorting everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import ParamsError
from pipeline.masks import topk
from pipeline.masks.topk import top_coordinates


def oracle(scores: dict[str, Tensor], k: int) -> dict[str, list[int]]:
    """Sort all (score descending, flat coordinate ascending) and take the first k."""
    ranked = sorted(
        (-value, place, i)
        for place, tensor in enumerate(scores.values())
        for i, value in enumerate(tensor.flatten().tolist())
    )
    chosen: list[list[int]] = [[] for _ in scores]
    for _, place, i in ranked[:k]:
        chosen[place].append(i)
    return {name: sorted(own) for name, own in zip(scores, chosen, strict=True)}


def lists(found: dict[str, Tensor]) -> dict[str, list[int]]:
    assert all(t.dtype == torch.int64 and t.device.type == "cpu" for t in found.values())
    return {name: t.tolist() for name, t in found.items()}


# Few distinct values, so that ties are everywhere; -0.0 equals 0.0; the smallest and largest floats.
VALUES = st.sampled_from([0.0, -0.0, 1e-45, 1.0, 1.0000001, 2.5, 3e38])
TENSORS = st.lists(st.lists(VALUES, max_size=30), min_size=1, max_size=5)


@pytest.fixture(params=["sampled", "bits"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both roads to the same answer: the sampled floor, and the histogram it falls back on."""
    if request.param == "bits":
        monkeypatch.setattr(topk, "_collect", lambda *_, **__: None)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.usefixtures("way")
def test_many_ties_any_chunking(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    monkeypatch.setattr(topk, "_CHUNK", chunk)

    @settings(max_examples=12, deadline=None)
    @given(TENSORS, st.data())
    def check(values: list[list[float]], data: st.DataObject) -> None:
        scores = {f"t{i}": torch.tensor(own).clamp(max=6e4).to(dtype) for i, own in enumerate(values)}
        k = data.draw(st.integers(0, sum(map(len, values))))
        assert lists(top_coordinates(scores, k)) == oracle(scores, k)

    check()


def spread(n: int, seed: int) -> dict[str, Tensor]:
    """Heavy-tailed scores in tensors of very different sizes and scales, as Fisher scores are."""
    g = torch.Generator().manual_seed(seed)
    sizes = [n // 2, 3, n // 4, 0, 1000, n // 8]
    return {f"t{i}": torch.randn(size, generator=g).pow(8) * 10.0**-i for i, size in enumerate(sizes)}


@pytest.mark.parametrize("k", [1, 17, 5_000, 60_000])
def test_the_sampled_road_agrees_with_torch(k: int) -> None:
    scores = spread(600_000, k)
    assert topk._sampled_floor(topk._Scores(scores, torch.float32, False), k) > 0  # the sample is in use
    flat = torch.cat(list(scores.values()))
    expected = torch.zeros(flat.numel(), dtype=torch.bool)
    expected[flat.topk(k).indices] = True
    parts = expected.split([s.numel() for s in scores.values()])
    found = top_coordinates(scores, k)
    for coordinates, part in zip(found.values(), parts, strict=True):
        assert coordinates.equal(part.nonzero().flatten())


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_all_equal_takes_the_first(value: float) -> None:
    scores = {"a": torch.full((100_000,), value), "b": torch.full((300_000,), value)}
    found = top_coordinates(scores, 150_000)
    assert found["a"].equal(torch.arange(100_000)) and found["b"].equal(torch.arange(50_000))


def test_a_sample_that_misleads_is_noticed() -> None:
    score = torch.zeros(499 * 1200)
    score[::499] = torch.linspace(1, 2, 1200)  # the sample sees nothing but these
    score[1::499] = 0.5
    assert top_coordinates({"a": score}, 2000)["a"].tolist() == sorted([
        *range(0, 499 * 1200, 499),
        *range(1, 499 * 800, 499),
    ])


def test_growing_k_is_nested() -> None:
    scores = {"a": torch.randint(0, 50, (200_000,)).float(), "b": torch.rand(1000)}
    smaller: set[tuple[str, int]] = set()
    for k in (1, 10, 999, 30_000, 100_000):
        chosen = {(n, i) for n, t in top_coordinates(scores, k).items() for i in t.tolist()}
        assert len(chosen) == k and smaller <= chosen
        smaller = chosen


def test_absolute_and_mixed_dtypes() -> None:
    scores = {"a": torch.tensor([-3.0, 1.0]), "b": torch.tensor([2.0, -2.5], dtype=torch.bfloat16)}
    assert lists(top_coordinates(scores, 2, absolute=True)) == {"a": [0], "b": [1]}
    near = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0 + 1e-12, 1.0 - 1e-12], dtype=torch.float64)}
    assert lists(top_coordinates(near, 2)) == {"a": [0], "b": [0]}  # not compared in fp32


def test_views_and_gradients_are_fine() -> None:
    score = torch.arange(12.0).reshape(3, 4).t().requires_grad_()
    assert lists(top_coordinates({"a": score}, 2)) == {"a": [8, 11]}


@pytest.mark.parametrize("size", [5, 400_000])
@pytest.mark.parametrize(
    ("value", "what"),
    [(float("nan"), "NaN"), (float("inf"), "infinite"), (-1e-30, "negative"), (-float("inf"), "neg")],
)
def test_scores_that_cannot_be_ranked_are_refused(size: int, value: float, what: str) -> None:
    scores = {"good": torch.ones(size), "layer.bad": torch.rand(size)}
    scores["layer.bad"][size // 2] = value
    with pytest.raises(ParamsError, match=f"'layer.bad' hold.*{what}"):
        top_coordinates(scores, 2)


def test_integers_are_refused() -> None:
    with pytest.raises(ParamsError, match="'a' are torch.int64"):
        top_coordinates({"a": torch.ones(3, dtype=torch.int64)}, 1)
