"""Selections: an order is kept within a group, groups get what they should, one ranking gives every density."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.masks.selection import SELECTIONS, layer_of, selected

SHAPES = {
    "bert.embeddings.word.weight": (50, 20),
    "bert.encoder.layer.0.up.weight": (20, 20),
    "bert.encoder.layer.0.up.bias": (20,),
    "bert.encoder.layer.1.up.weight": (20, 20),
    "bert.pooler.dense.weight": (20, 20),
    "classifier.weight": (2, 20),
}


def scores_of(seed: int = 0, levels: int = 10**6) -> dict[str, Tensor]:
    """Scores whose level differs by orders of magnitude from layer to layer, as real ones do."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(1, levels + 1, shape, generator=g) / levels * 10.0 ** (i * 2 % 5)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.mark.parametrize("selection", [name for name in SELECTIONS if name != "sampled"])
@given(st.integers(0, 50), st.sampled_from([2, 10**6]))
@settings(max_examples=20, deadline=None)
def test_the_order_within_a_tensor_stays(selection: str, seed: int, levels: int) -> None:
    scores = scores_of(seed, levels)
    for name, after in selected(scores, selection).items():
        assert after.shape == scores[name].shape
        before, after = scores[name].flatten(), after.flatten()
        above = before[:, None] > before[None, :]
        assert bool((after[:, None] > after[None, :])[above].all())


@pytest.mark.parametrize(("selection", "group"), [("per-layer", layer_of), ("per-tensor", str)])
def test_every_group_gets_its_share(selection: str, group) -> None:  # noqa: ANN001
    mask = Mask.top_k(selected(scores_of(), selection), 0.1)
    chosen: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name in mask.index:
        chosen[group(name)] = chosen.get(group(name), 0) + mask.count(name)
        sizes[group(name)] = sizes.get(group(name), 0) + mask.index.numel(name)
    assert all(abs(chosen[g] - 0.1 * sizes[g]) <= 1 for g in sizes)


def test_sampled_has_the_odds_of_the_fourth_root() -> None:
    """One pick of two coordinates, 4,000 times; and again the same, and never one without information."""
    odds = torch.tensor([81.0, 1.0])  # fourth roots 3 and 1
    scores = {f"{i}.weight": odds for i in range(4000)} | {"empty.weight": torch.zeros(2)}
    after = selected(scores, "sampled")
    first = sum(int(s[0] > s[1]) for name, s in after.items() if name != "empty.weight")
    assert abs(first / 4000 - 3 / 4) < 4 * (3 / 16 / 4000) ** 0.5
    assert not after["empty.weight"].any()
    assert all(torch.equal(s, after[name]) for name, s in selected(scores, "sampled").items())
    assert all(bool(torch.isfinite(s).all()) for s in after.values())


def test_global_is_the_papers() -> None:
    scores = scores_of()
    assert all(after is scores[name] for name, after in selected(scores, "global").items())


def test_a_normalised_score_is_over_the_mean_of_its_group() -> None:
    scores = scores_of()
    for selection, group, power in (
        ("layer-mean", layer_of, 1),
        ("tensor-mean", str, 1),
        ("tensor-root", str, 0.5),
    ):
        after = selected(scores, selection)
        for name in scores:
            members = torch.cat([scores[n].flatten() for n in scores if group(n) == group(name)]).double()
            expected = scores[name].double() / members.mean() ** power
            torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=0)


def test_a_tensor_without_information_is_never_preferred() -> None:
    scores = scores_of() | {"bert.pooler.dense.weight": torch.zeros(20, 20)}
    for selection in SELECTIONS:
        assert Mask.top_k(selected(scores, selection), 0.5).count("bert.pooler.dense.weight") == 0


def test_excluded_modules_are_no_candidates_but_the_head_stays() -> None:
    scores = scores_of()
    for selection in SELECTIONS:
        after = selected(scores, selection, ["bert.pooler", "bert.embeddings", "classifier"])
        mask = Mask.top_k(after, 0.2, always=["classifier"])
        assert mask.whole("classifier.weight") and mask.nnz == int(0.2 * mask.index.total)
        assert mask.count("bert.pooler.dense.weight") == mask.count("bert.embeddings.word.weight") == 0


@pytest.mark.parametrize("selection", SELECTIONS)
def test_masks_of_one_ranking_are_nested_and_exact(selection: str) -> None:
    after = selected(scores_of(), selection)
    ranking = Ranking.of(after, 0.5, ["classifier"])
    smaller: Mask | None = None
    for density in (0.05, 0.1, 0.3):
        mask = ranking.cut(density)
        assert mask == Mask.top_k(after, density, ["classifier"])
        if smaller is not None:
            assert all(set(smaller.indices[n].tolist()) <= set(mask.indices[n].tolist()) for n in mask.index)
        smaller = mask


def test_what_cannot_be_selected_is_refused() -> None:
    with pytest.raises(ParamsError, match="unknown selection 'perlayer'; did you mean 'per-layer'"):
        selected(scores_of(), "perlayer")
    with pytest.raises(ParamsError, match="leaves no parameter"):
        selected(scores_of(), exclude=["bert", "classifier"])
    with pytest.raises(MismatchError, match="'pooler'"):
        selected(scores_of(), exclude=["pooler"])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.3.output.dense.weight", "bert.encoder.layer.3"),
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings"),
        ("bert.pooler.dense.bias", "bert.pooler"),
        ("fc.weight", "fc"),
        ("scale", "scale"),
    ],
)
def test_the_layer_of_a_tensor(name: str, layer: str) -> None:
    assert layer_of(name) == layer
